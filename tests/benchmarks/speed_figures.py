"""The figures of the appendix on speed, which shows what `make bench` wrote.

times_as_long(table)     # of speed.json
growth(table)
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from paramspec_book import panels

CONTENDER_TITLES = {
    "paramspec": "this book",
    "lm-eval": "lm-evaluation-harness",
    "nnsight": "nnsight",
    "hooks": "one option at a time",
}
GROWTH_TITLES = {
    "questions": "questions",
    "concepts": "concepts, a mask each",
    "ratios": "ratios, for each concept",
    "controls": "control masks, for each concept",
    "prompt": "tokens before each question",
    "shared_prompt": "the same tokens before all",
    "parameters": "weights of the model",
}


def times_as_long(table: pd.DataFrame) -> Figure:
    """How many times as long as the engine each contender takes, a panel a work and precision.

    Args:
        table: columns `work`, `dtype`, `contender`, `variant`, `ratio`, without the engine's own
            row at 1.
    """
    parts = dict(list(table.groupby(["work", "dtype"], sort=False)))
    heights = [len(part) for part in parts.values()]
    size = (7.4, 0.9 + 0.42 * sum(heights) + 0.35 * len(parts))
    options = {"figsize": size, "height_ratios": heights, "sharex": True, "squeeze": False}
    figure, grid = plt.subplots(len(parts), **options)
    for axes, (titles, part) in zip(grid[:, 0], parts.items(), strict=True):
        places, own = np.arange(len(part))[::-1], part["contender"] == "paramspec"
        colours = [panels.GENERAL if one else panels.OWN for one in own]
        bars = axes.barh(places, part["ratio"], color=colours, height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        names = part["contender"].map(CONTENDER_TITLES)
        axes.set_yticks(places, names.where(~own, names + ", " + part["variant"]))
        axes.tick_params(axis="y", length=0)
        axes.axvline(1, **panels.DASHED)
        axes.set_title(", ".join(titles))
    axes.set_xlim(0, 1.12 * float(table["ratio"].max()))
    axes.set_xlabel("times as long as this book's engine")
    return figure


def growth(table: pd.DataFrame) -> Figure:
    """Seconds along each axis, a panel an axis, beside what the needed operations would take.

    Args:
        table: columns `axis`, `x`, `seconds`, `low`, `high`, `flops`.
    """
    parts = list(table.groupby("axis", sort=False))
    rows = -(-len(parts) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(7.6, 2.5 * rows + 0.4), squeeze=False)
    for axes, (name, part) in zip(grid.flat, parts, strict=False):
        part = part.sort_values("x")
        expected = part["flops"] * (part["seconds"] / part["flops"]).iloc[0]
        axes.plot(part["x"], expected, **panels.DASHED, label="as the needed operations grow")
        panels.band(axes, part["x"], part["low"], part["high"], panels.GENERAL)
        axes.plot(part["x"], part["seconds"], "o-", color=panels.GENERAL, label="measured")
        axes.set(xlim=(0, None), ylim=(0, None), xlabel=GROWTH_TITLES[name])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds")
    for axes in grid.flat[len(parts) :]:
        axes.axis("off")
    panels.legend_below(figure, grid[0, 0], 2)
    return figure
