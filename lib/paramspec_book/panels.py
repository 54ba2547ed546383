"""What the book's figures are made of: colours, and values with their intervals in a panel.

for part, style in each_group(table, "method", METHODS):
    points(axes, part["step"], part, "accuracy", **style)    # `accuracy_low` to `accuracy_high`
legend_below(figure, axes)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = sns.color_palette("colorblind")
OWN, GENERAL, OTHER, NULL = COLOURS[3], COLOURS[0], "0.2", "0.55"
# A line to compare with
DASHED: dict[str, Any] = {
    "color": "0.5",
    "linestyle": "--",
    "linewidth": 1,
}
Names = Mapping[str, tuple[str, object]]  # the title and the colour of each group of rows

# A mask, a family and a method keep their colours through the book.
MASKS: Names = {
    "concept": ("the concept's own vectors", OWN),
    "other": ("another concept's vectors", COLOURS[1]),
    "magnitude": ("equally active vectors", COLOURS[2]),
    "random": ("random vectors", COLOURS[7]),
}
FAMILIES: Names = {
    "llama": ("Llama", COLOURS[0]),
    "qwen": ("Qwen", COLOURS[1]),
    "mistral": ("Mistral", COLOURS[2]),
    "gemma": ("Gemma", COLOURS[4]),
    "olmo": ("OLMo", COLOURS[5]),
}
METHODS: Names = {
    "original": ("original", "0.35"),
    "FT-FV": ("FT-FV, all vectors", COLOURS[0]),
    "FT-PV": ("FT-PV, the concept's own", OWN),
    "FT-CV": ("FT-CV, all but those", COLOURS[2]),
    "FT-RV": ("FT-RV, random", COLOURS[7]),
}


def family_names(groups: Iterable[str], families: Iterable[str]) -> Names:
    """Return each group's title, and the colour of its family."""
    return {
        group: (FAMILIES.get(group, (group,))[0], FAMILIES.get(family, ("", OTHER))[1])
        for group, family in zip(groups, families, strict=True)
    }


def each_group(
    table: pd.DataFrame, by: str, names: Names
) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Yield the rows of each named group that has some, with its colour and its label.

    matplotlib leaves labels that begin with an underscore out of a legend: a hair space goes first.
    """
    for group, (title, colour) in names.items():
        part = table[table[by] == group]
        if len(part):
            label = f"\u200a{title}" if title.startswith("_") else title
            yield part, {"color": colour, "label": label}


def points(
    axes: Axes,
    x: Any,
    table: pd.DataFrame,
    value: str,
    *,
    color: object,
    label: str | None = None,
    join: float = 0,
    bar: float = 1.1,
    alpha: float = 0.6,
    **style: Any,
) -> None:
    """Draw points, with the intervals `value_low` to `value_high` as upright bars.

    An interval is drawn where it is: that of a maximum of absolute values may lie beyond the value.

    Args:
        join: width of a line that joins the points.
        bar: width of the bars, whose opacity is `alpha`.
    """
    if join:
        axes.plot(x, table[value], color=color, lw=join, label=label)
    low, high = table[f"{value}_low"], table[f"{value}_high"]
    axes.vlines(x, low, high, color=color, lw=bar, alpha=alpha)
    style = {"marker": "o", "label": None if join else label} | style
    axes.plot(x, table[value], color=color, linestyle="none", **style)


def accuracy_bars(axes: Axes, table: pd.DataFrame, value: str, color: object) -> None:
    """Draw the intervals of the accuracy as level bars through points above it."""
    low, high = table["accuracy_low"], table["accuracy_high"]
    axes.hlines(table[value], low, high, color=color, lw=0.8, alpha=0.35)


def line(axes: Axes, x: Any, table: pd.DataFrame, value: str, **style: Any) -> None:
    """Draw a line, with the intervals `value_low` to `value_high`, if they are there, as a band."""
    axes.plot(x, table[value], **({"marker": "o"} | style))
    if f"{value}_low" in table:
        band(axes, x, table[f"{value}_low"], table[f"{value}_high"], style["color"])


def band(axes: Axes, x: Any, low: Any, high: Any, color: object, **style: Any) -> None:
    """Colour lightly what lies between `low` and `high`."""
    axes.fill_between(x, low, high, color=color, lw=0, **({"alpha": 0.15} | style))


def null_band(axes: Axes, table: pd.DataFrame) -> None:
    """Colour the interval of the peak under random masks, over the table's index."""
    low, high = table["peak_null_low"], table["peak_null_high"]
    band(axes, table.index, low, high, NULL, alpha=0.25, label="random masks, 95 %")


def on_ratios(axes: Axes, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table sorted by `place`, a ratio's on the axis: ratios are spaced by factors."""
    ratios = sorted(table["ratio"].unique())
    names = ["none" if ratio == 0 else f"{ratio:.1%}" for ratio in ratios]
    axes.set_xticks(range(len(ratios)), names)
    axes.set_xlabel("value vectors masked")
    return table.assign(place=table["ratio"].map(ratios.index)).sort_values("place")


def named_rows(axes: Axes, places: Sequence[float] | np.ndarray, names: Sequence[str]) -> None:
    """Name each row of a panel, without ticks."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Name what one panel shows, below all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
