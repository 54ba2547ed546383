"""One function per figure: a table in, a matplotlib figure out. Nothing is computed here.

A `summary` holds the rows of `stats.summary.summarize` of one model. A column with an interval has
its bounds in `_low` and `_high`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter
from matplotlib_inline.backend_inline import set_matplotlib_formats

from paramspec.tables import TIERS
from paramspec_book import panels
from paramspec_book.kept import keep_csv
from paramspec_book.panels import DASHED, FAMILIES, GENERAL, MASKS, METHODS, NULL, OTHER, OWN
from paramspec_book.tables import use_book_tables

MEASURES = {
    "accuracy": "accuracy (acc_norm)",
    "did": "diff. in diff., mean over ratios",
    "peak_pss": "peak PSS",
}
STYLE: Any = {
    "figure.facecolor": "none",  # pages have two grounds
    "axes.facecolor": "none",
    "svg.hashsalt": "paramspec",  # the same file each time
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "font.size": 11,
    "text.parse_math": False,  # `$` in a name is no mathematics
}


def use_book_style() -> None:
    """Set the look of every figure and table of a chapter."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(STYLE)
    set_matplotlib_formats("svg", facecolor="none", metadata={"Date": None})
    use_book_tables()


def drawn(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws a table, and keeps the table as the chapter's next `figure-N.csv`."""

    @functools.wraps(draw)
    def and_kept(table: pd.DataFrame, *arguments: Any, **options: Any) -> Figure:
        keep_csv("figure", table)
        return draw(table, *arguments, **options)

    return and_kept


def family_title(family: str) -> str:
    """`family_title("llama")`: as its makers write it; an unknown family as it is."""
    return FAMILIES[family][0] if family in FAMILIES else family


# --- one model ----------------------------------------------------------------------------------


@drawn
def promoted_share(table: pd.DataFrame) -> Figure:
    """The `error`, the norm of the missing part over that of an MLP's output, where the `vectors`
    largest terms of its sum are kept, by `layer`.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6))
    style: dict[str, Any] = {"palette": "viridis", "linewidth": 1.2, "errorbar": None}
    sns.lineplot(table, x="vectors", y="error", hue="layer", ax=axes, **style)
    axes.set(xscale="log", xlabel="value vectors kept, those with the largest terms first")
    axes.set(ylim=(-0.03, None), ylabel="missing part of\nthe MLP's output")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


@drawn
def overlap(table: pd.DataFrame, domains: list[str], expected: float) -> Figure:
    """The fraction of each pair's masks that is shared: a heat map of concepts, sorted by domain;
    `expected` is that of two random masks.
    """
    size = 2.6 + 0.22 * len(table)
    figure, axes = plt.subplots(figsize=(size + 1.2, size))
    sns.heatmap(
        table.mask(np.eye(len(table), dtype=bool)),
        cmap="mako_r",
        vmin=expected,
        square=True,
        xticklabels=True,
        yticklabels=True,
        cbar_kws={"label": f"vectors shared (at random: {expected:.0%})", "shrink": 0.8},
    )
    axes.tick_params(labelsize=8, length=0)
    axes.set(facecolor="0.9", xlabel="", ylabel="")
    for place in range(1, len(domains)):
        if domains[place] != domains[place - 1]:
            axes.axhline(place, color="white", linewidth=2.5)
            axes.axvline(place, color="white", linewidth=2.5)
    return figure


@drawn
def accuracy_by(table: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % interval: a panel per `by`, a row per `group`, with its `n`."""
    kinds = dict(list(table.groupby("by", sort=False)))
    heights = [max(2, len(part)) for part in kinds.values()]
    size = (5.6, 0.8 + 0.27 * sum(heights))
    figure, grid = panels.panels(len(kinds), 1, size, height_ratios=heights, sharex=True)
    for axes, (kind, part) in zip(grid[:, 0], kinds.items(), strict=True):
        names = [f"{row.group}  (n = {row.n})" for row in part.itertuples()]
        panels.rows(axes, part, "accuracy", names, GENERAL)
        axes.axvline(part["chance"].mean(), **DASHED)
        axes.set_title(f"by {kind}")
        axes.tick_params(axis="y", labelsize=9)
    axes.set(xlim=(0, 1.02), xlabel="accuracy (acc_norm), 95 % interval; dashed: chance")
    return figure


@drawn
def curves(summary: pd.DataFrame) -> Figure:
    """C(k) and G(k) over the mask ratio: a panel for each kind of mask."""
    masks = [mask for mask in MASKS if (summary["mask"] == mask).any()]
    rows, columns = (len(masks) + 1) // 2, min(2, len(masks))
    figure, grid = panels.panels(rows, columns, (7.2, 0.6 + 2.6 * rows), sharey=True)
    lines: panels.Names = {
        "general_accuracy": ("unrelated questions, G(k)", GENERAL, "s"),
        "concept_accuracy": ("the concept's questions, C(k)", OWN, "o"),
    }
    for axes, mask in zip(grid.flat, masks, strict=False):
        part = panels.on_ratios(axes, summary[summary["mask"].isin(["none", mask])])
        for value, (title, colour, marker) in lines.items():
            look = {"color": colour, "marker": marker, "label": title}
            panels.draw(axes, part, "place", value, shade=True, **look)
        axes.axhline(part["chance"].mean(), **DASHED)
        axes.set_title(MASKS[mask][0])
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy (acc_norm)")
    panels.legend_below(figure, 2)
    return figure


@drawn
def over_ratios(summary: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Columns of a summary over the mask ratio, a panel and a title each; a line per `mask`."""
    masked = summary[summary["mask"] != "none"]
    figure, grid = panels.panels(len(titles), 1, (6.8, 1.3 + 2.1 * len(titles)))
    for axes, (value, title) in zip(grid[:, 0], titles.items(), strict=True):
        table = panels.on_ratios(axes, masked)
        panels.groups(axes, table, "place", value, "mask", MASKS, apart=0.09)
        axes.axhline(0, **DASHED)
        axes.set_ylabel(title)
    panels.legend_below(figure, 2)
    return figure


@drawn
def depth(table: pd.DataFrame) -> Figure:
    """The `share` of a concept's masked vectors in each `layer`, when all compete; a line per
    `ratio`.
    """
    ratios = sorted(table["ratio"].unique())
    colours = sns.color_palette("flare", len(ratios))
    names: panels.Names = {
        ratio: (f"{ratio:.1%} masked", colour, "")
        for ratio, colour in zip(ratios, colours, strict=True)
    }
    figure, axes = plt.subplots(figsize=(7, 3.2))
    panels.groups(axes, table, "layer", "share", "ratio", names, shade=True)
    axes.axhline(1 / table["layer"].nunique(), label="even", **DASHED)
    axes.set(xlabel="layer", ylim=(0, None), ylabel="share of the\nmasked vectors")
    axes.legend()
    return figure


@drawn
def coverage(table: pd.DataFrame) -> Figure:
    """The share `covered` by the intervals of each kind of `estimate`, a mark for each `world`."""
    kinds, worlds = (list(table[name].unique()) for name in ("estimate", "world"))
    figure, axes = plt.subplots(figsize=(5.6, 1.2 + 0.3 * len(kinds)))
    axes.axvspan(0.92, 0.98, color="0.9", linewidth=0)
    axes.axvline(0.95, **DASHED)
    for world, marker in zip(worlds, "osD^v", strict=False):
        part = table[table["world"] == world]
        places = part["estimate"].map(kinds.index)
        axes.scatter(part["covered"], places, marker=marker, s=30, label=world)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlim=(0, 1.02), ylim=(len(kinds), -1), xlabel="share that cover the truth")
    panels.legend_below(figure, len(worlds))
    return figure


def claims_forest(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure of all claims: of each a `title`, `value`, `low`, `high` and `paper`."""
    table = pd.DataFrame(rows)
    with sns.axes_style("ticks"), plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 1.2 + 0.3 * len(table)))
        axes.axvline(0, **DASHED)
        label = "this book, 95 % interval"
        places = panels.rows(axes, table, "value", table["title"], GENERAL, label=label)
        published: Any = {"color": OWN, "marker": "|", "s": 170, "linewidth": 2.5, "zorder": 4}
        axes.scatter(table["paper"], places, label="the paper", **published)
        axes.set_xlim(-1.05, 1.05)
        panels.legend_below(figure, 2)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


# --- many models --------------------------------------------------------------------------------


@drawn
def against_accuracy(table: pd.DataFrame) -> Figure:
    """The difference in differences and peak PSS over accuracy, a point per model of
    `trends.model_table`, with the name that is `shown`; in grey, random masks.
    """
    values = ("did", "peak_pss")
    figure, grid = panels.panels(1, 2, (7.8, 4.4))
    table = table.fillna({"family": "other"}).assign(run=lambda rows: rows["family"])
    points: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    near: dict[str, Any] = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
    for axes, value in zip(grid[0], values, strict=True):
        axes.axvline(table["chance"].mean(), **DASHED)
        axes.axhline(0, color="0.8", linewidth=0.8)
        if f"null_{value}" in table:
            grey = points | {"color": NULL, "marker": "D", "markersize": 3.5}
            panels.draw(axes, table, "accuracy", f"null_{value}", label="random masks", **grey)
        panels.groups(axes, table, "accuracy", value, "run", panels.run_names(table), **points)
        for row in table[table["shown"] != ""].to_dict("records"):
            axes.annotate(row["shown"], (row["accuracy"], row[value]), **near)
        axes.set(xlabel="accuracy (acc_norm); dashed: chance", title=MEASURES[value])
    panels.legend_below(figure, 4)
    return figure


@drawn
def forest(table: pd.DataFrame, published: float | None = None) -> Figure:
    """A row per `reading` of the claim: the correlation `r`, free of noise, with its interval, and
    `pearson`, as measured; `published` is the paper's.
    """
    figure, axes = plt.subplots(figsize=(5.6, 1.2 + 0.38 * len(table)))
    if published is not None:
        axes.axvline(published, color=OWN, linewidth=1.2, linestyle=":", label="the paper")
    axes.axvline(0, **DASHED)
    table = table.assign(low=table["r_low"], high=table["r_high"])
    label = "free of noise, 95 % interval"
    places = panels.rows(axes, table, "r", table["reading"], GENERAL, label=label)
    hollow: Any = {"facecolors": "white", "edgecolors": "0.35", "marker": "D", "zorder": 4}
    axes.scatter(table["pearson"], places, s=26, label="as measured", **hollow)
    axes.set(xlim=(-1.05, 1.05), xlabel="correlation with accuracy")
    panels.legend_below(figure)
    return figure


@drawn
def generations(table: pd.DataFrame) -> Figure:
    """The difference in differences of each family of `trends.model_table` over its generations, in
    their `order`, with `held_out` if it is there.
    """
    families = list(table.dropna(subset=["order"]).groupby(["family", "micro"], sort=False))
    figure, grid = panels.panels(1, max(1, len(families)), (7.4, 3.4), sharey=True)
    for axes, ((family, _), part) in zip(grid[0], families, strict=False):
        part = part.sort_values("order")
        panels.null_band(axes, part, "order", "did")
        if "held_out" in part:
            axes.plot(part["order"], part["held_out"], ":", color="0.2", label="held out")
        title, colour, marker = FAMILIES.get(family, (family, OTHER, "x"))
        panels.draw(axes, part, "order", "did", color=colour, marker=marker)
        names = part["generation"].str.removeprefix("zoo ")
        tilt = {"rotation": 60, "ha": "right"} if names.str.len().max() > 3 else {}
        axes.set_xticks(part["order"], names, **tilt)
        axes.set(title=title, xlabel="generation")
        axes.margins(x=0.12)
    grid[0, 0].set_ylabel(MEASURES["did"])
    panels.legend_below(figure)
    return figure


@drawn
def along(
    table: pd.DataFrame,
    x: str,
    label: str,
    measures: Sequence[str] = ("accuracy", "did"),
    *,
    log: bool = False,
    marked: pd.DataFrame | None = None,
) -> Figure:
    """Some of `MEASURES` over `x`, numbers or frequency tiers: a line per `run` of the models of
    `trends.model_table`, in the colour of its `family`, if the table has families. Points of the
    lines are `marked`: of a `run` and a `measure`, at `x` and `value`.
    """
    figure, grid = panels.panels(1, len(measures), (7.6, 3.5))
    tiers, names = table[x].isin(TIERS).all(), panels.run_names(table)
    if tiers:
        table = table.assign(**{x: table[x].map(TIERS.index)})
    for axes, value in zip(grid[0], measures, strict=True):
        panels.groups(axes, table, x, value, "run", names, apart=0.08 if tiers else 0)
        axes.set(xlabel=label, ylabel=MEASURES[value])
        axes.axhline(table["chance"].mean() if value == "accuracy" else 0, **DASHED)
        panels.null_band(axes, table, x, value)
        for row in () if marked is None else marked[marked["measure"] == value].itertuples():
            look = {"color": names[row.run][1], "edgecolor": "0.2", "zorder": 5}
            axes.scatter(row.x, row.value, marker="*", s=130, **look)
        if tiers:
            axes.set_xticks(range(3), TIERS)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            if table[x].max() < 100 * table[x].min():  # too narrow for powers of ten alone
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels.legend_below(figure)
    return figure


@drawn
def sizes(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Peak PSS over the `parameters` of models of `trends.model_table`, by `run`, and of the paper,
    by `family`.
    """
    figure, axes = plt.subplots(figsize=(6.8, 3.6))
    panels.groups(axes, table, "parameters", "peak_pss", "run", panels.run_names(table))
    panels.null_band(axes, table, "parameters", "peak_pss")
    for (family, part), marker in zip(published.groupby("family"), panels.MARKERS, strict=False):
        look: dict[str, Any] = {"color": OWN, "linestyle": ":", "marker": marker}
        axes.plot(part["parameters"], part["PSS"], label=f"the paper: {family}", **look)
    axes.set(xscale="log", xlabel="parameters", ylabel=MEASURES["peak_pss"], ylim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels.legend_below(figure)
    return figure


# --- ways of training ---------------------------------------------------------------------------


@drawn
def by_method(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """The `value` of each `measure` and `model`, a row per `method`, with 95 % intervals; `labels`
    has the titles of measures. The first method is drawn as a line as well.
    """
    models, methods = dict(list(table.groupby("model", sort=False))), table["method"].unique()
    colours = [METHODS[method][1] if method in METHODS else OWN for method in methods]
    size = (max(4.8, 2.05 * len(labels) + 1.2), (0.7 + 0.27 * len(methods)) * len(models) + 0.6)
    figure, grid = panels.panels(len(models), len(labels), size, sharey=True)
    for row, (model, part) in zip(grid, models.items(), strict=True):
        row[0].set_ylabel(model, fontsize="small")
        for axes, measure in zip(row, labels, strict=True):
            one = part[part["measure"] == measure].set_index("method").reindex(methods)
            panels.rows(axes, one, "value", methods, colours)
            axes.axvline(one["value"].iloc[0], color="0.7", linewidth=1, zorder=0)
            if one["value"].isna().all():
                middle = {"ha": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, "not measured", color=NULL, **middle)
                axes.set_xticks([])
    for axes, title in zip(grid[0], labels.values(), strict=True):
        axes.set_title(title)
    return figure


@drawn
def over_training(
    table: pd.DataFrame,
    x: str,
    label: str,
    titles: Mapping[str, str],
    *,
    ticks: Mapping[float, str] | None = None,
    original: pd.DataFrame | None = None,
    **style: Any,
) -> Figure:
    """A line per `method` over `x`, a choice or the course of training: a column of panels per
    `model` and a row per measure, by its title. The abscissa is logarithmic if it has `ticks`,
    names by place. The dashed line is of the `original`, the untrained models.
    """
    models = dict(list(table.groupby("model", sort=False)))
    size = (max(4.8, 2.5 * len(models) + 0.6), 0.8 + 2.2 * len(titles))
    figure, grid = panels.panels(len(titles), len(models), size, sharex="col")
    lines = {"marker": ""} if table[x].nunique() >= 20 else {}
    style = lines | {"shade": True} | style
    for column, (model, rows) in zip(grid.T, models.items(), strict=True):
        column[0].set_title(model)
        for axes, (value, title) in zip(column, titles.items(), strict=True):
            panels.groups(axes, rows, x, value, "method", METHODS, **style)
            axes.set_ylabel(title if axes in grid[:, 0] else "")
            if original is not None:
                before = original.set_index("model").loc[model, value]
                axes.axhline(before, color="0.35", linestyle="--", linewidth=1, label="original")
            if ticks is not None:
                here = [place for place in ticks if place in set(rows[x])]
                axes.set_xscale("log")
                axes.set_xticks(here, [ticks[place] for place in here])
                axes.xaxis.set_minor_locator(NullLocator())
    grid[-1, (len(models) - 1) // 2].set_xlabel(label)  # once: side by side, long ones meet
    panels.legend_below(figure)
    return figure
