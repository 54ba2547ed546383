"""The figures of the appendix on speed, which shows what `make bench` wrote.

times_as_long(table)     # of speed.json
growth(table)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from paramspec_book import panels
from paramspec_book.figures import drawn

CONTENDER_TITLES = {
    "paramspec": "this book",
    "lm-eval": "lm-evaluation-harness",
    "nnsight": "nnsight",
    "hooks": "one option at a time",
}
GROWTH_TITLES = {
    "concepts": "concepts, a mask each",
    "masks": "masks of each concept",
    "prompt": "tokens before each question",
    "shared_prompt": "the same tokens before all",
}


@drawn
def times_as_long(table: pd.DataFrame) -> Figure:
    """How many times as long as the engine each other row of the benchmark's table takes."""
    parts = dict(list(table.groupby(["work", "dtype"], sort=False)))
    heights = [len(part) for part in parts.values()]
    size = (7.4, 0.9 + 0.42 * sum(heights) + 0.35 * len(parts))
    figure, grid = panels.panels(len(parts), 1, size, height_ratios=heights, sharex=True)
    for axes, (titles, part) in zip(grid[:, 0], parts.items(), strict=True):
        places, own = np.arange(len(part))[::-1], part["contender"] == "paramspec"
        colours = [panels.GENERAL if one else panels.OWN for one in own]
        bars = axes.barh(places, part["ratio"], color=colours, height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        names = part["contender"].map(CONTENDER_TITLES)
        axes.set_yticks(places, names.where(~own, names + ", " + part["variant"]))
        axes.axvline(1, **panels.DASHED)
        axes.set_title(", ".join(titles))
        axes.margins(x=0.12)
    axes.set_xlabel("times as long as this book's engine")
    return figure


@drawn
def growth(table: pd.DataFrame) -> Figure:
    """Seconds along each axis, a panel per axis, beside what the needed operations would take."""
    parts = list(table.groupby("axis", sort=False))
    rows = -(-len(parts) // 3)
    figure, grid = panels.panels(rows, 3, (7.6, 2.5 * rows + 0.4))
    for axes, (name, part) in zip(grid.flat, parts, strict=False):
        part = part.rename(columns={"low": "seconds_low", "high": "seconds_high"})
        expected = part["flops"] * (part["seconds"] / part["flops"]).iloc[0]
        axes.plot(part["x"], expected, **panels.DASHED, label="as the needed operations grow")
        style = {"shade": True, "color": panels.GENERAL, "label": "measured"}
        panels.draw(axes, part, "x", "seconds", **style)
        axes.set(xlim=(0, None), ylim=(0, None), xlabel=GROWTH_TITLES.get(name, name))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    grid[0, 0].set_ylabel("seconds")
    for axes in grid.flat[len(parts) :]:
        axes.axis("off")
    panels.legend_below(figure, 2)
    return figure
