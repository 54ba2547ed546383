"""The parts of the book's figures: colours, and values with their intervals in a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One colour has one meaning through the book, and within a figure no two are alike to a reader who
# is colour-blind.
OWN, GENERAL, OTHER, NULL = "#d55e00", "#4477aa", "#333333", "#8a8a8a"
# A line to compare with
DASHED: dict[str, Any] = {"color": "0.5", "linestyle": "--", "linewidth": 1}
Names = Mapping[Any, tuple[str, Any, str]]  # of each group of rows: its title, colour and marker

MASKS: Names = {
    "concept": ("the concept's own vectors", OWN, "o"),
    "other": ("another concept's vectors", "#8c4a00", "s"),
    "magnitude": ("equally active vectors", "#004488", "^"),
    "random": ("random vectors", NULL, "D"),
}
FAMILIES: Names = {
    "llama": ("Llama", "#332288", "o"),
    "qwen": ("Qwen", "#b8860b", "s"),
    "mistral": ("Mistral", "#aa4499", "^"),
    "gemma": ("Gemma", "#117733", "v"),
    "olmo": ("OLMo", "#882255", "P"),
}
METHODS: Names = {
    "original": ("original", OTHER, "x"),
    "FT-FV": ("FT-FV, all vectors", GENERAL, "s"),
    "FT-PV": ("FT-PV, the concept's own", OWN, "o"),
    "FT-CV": ("FT-CV, all but those", "#b0307a", "^"),
    "FT-RV": ("FT-RV, random", NULL, "D"),
}
MARKERS = ("o", "s", "^", "v", "D", "P", "X")


def run_names(table: pd.DataFrame) -> Names:
    """Return how each run is drawn: as its family is, or in a way of its own."""
    runs = list(dict.fromkeys(table["run"]))
    if "family" in table:
        families = dict(zip(table["run"], table["family"], strict=True))
        looks = {run: FAMILIES.get(families[run], ("", OTHER, "x")) for run in runs}
        return {run: (FAMILIES.get(run, (run,))[0], *looks[run][1:]) for run in runs}
    colours = sns.color_palette("colorblind", len(runs))
    return {
        run: (run, colour, MARKERS[number % len(MARKERS)])
        for number, (run, colour) in enumerate(zip(runs, colours, strict=True))
    }


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def draw(
    axes: Axes, table: pd.DataFrame, x: str, value: str, *, shade: bool = False, **style: Any
) -> None:
    """Draw a column over another, with the intervals `_low` to `_high` of either: bars, or a band
    with `shade`.
    """
    colour, at = style["color"], table[x]
    usual: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.4}
    axes.plot(at, table[value], **(usual | style))
    if f"{value}_low" in table:
        low, high = table[f"{value}_low"], table[f"{value}_high"]
        if shade:
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(at, low, high, color=colour, linewidth=1.3, alpha=0.7)
    if f"{x}_low" in table:
        low, high = table[f"{x}_low"], table[f"{x}_high"]
        axes.hlines(table[value], low, high, color=colour, linewidth=0.8, alpha=0.35)


def groups(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    value: str,
    by: str,
    names: Names,
    *,
    apart: float = 0,
    **style: Any,
) -> None:
    """Draw each named group that has rows, at a distance of `apart` from the next one."""
    for number, (name, (title, colour, marker)) in enumerate(names.items()):
        part = table[table[by] == name].dropna(subset=[value]).sort_values(x)
        if len(part):
            part = part.assign(**{x: part[x] + apart * (number - (len(names) - 1) / 2)})
            # A label that begins with an underscore would be left out of a legend.
            label = f"\u200a{title}" if title.startswith("_") else title
            draw(axes, part, x, value, **({"marker": marker} | style), color=colour, label=label)


def rows(
    axes: Axes, table: pd.DataFrame, value: str, names: Sequence[str], colours: Any, **style: Any
) -> np.ndarray:
    """Draw a value and `low` to `high` in a row each, the first on top; return the rows' places."""
    places = np.arange(len(table))[::-1]  # not names: two rows may have one
    axes.hlines(places, table["low"], table["high"], colors=colours, linewidth=1.8, **style)
    axes.scatter(table[value], places, color=colours, s=30, zorder=3)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return places


def null_band(axes: Axes, table: pd.DataFrame, x: str, value: str) -> None:
    """Draw the intervals of a measure under random masks, if the table has them, as a band."""
    if f"null_{value}" not in table:
        return
    null = table.groupby(x)[[f"null_{value}_low", f"null_{value}_high"]].mean()
    style: dict[str, Any] = {"color": NULL, "alpha": 0.25, "linewidth": 0}
    axes.fill_between(null.index, *null.to_numpy().T, label="random masks, 95 %", **style)


def on_ratios(axes: Axes, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table sorted by `place`, a ratio's on the axis: ratios are spaced by factors."""
    ratios = sorted(table["ratio"].unique())
    names = ["none" if ratio == 0 else f"{ratio:.1%}" for ratio in ratios]
    axes.set_xticks(range(len(ratios)), names)
    axes.set_xlabel("value vectors masked")
    return table.assign(place=table["ratio"].map(ratios.index)).sort_values("place")


def legend_below(figure: Figure, columns: int = 3) -> None:
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    place: Any = {"loc": "outside lower center", "ncols": columns}
    figure.legend(list(named.values()), list(named), **place)
