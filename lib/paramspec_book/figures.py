"""One function per figure: a table in, a matplotlib figure out. Nothing is computed here.

figures.use_book_style()            # first, once a chapter
figures.accuracy_by(table)          # chapter 2
figures.curves(summary)             # chapter 3

A `summary` holds the rows of `pss.summarize` of one model and, but for `protocols`, one protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from paramspec_book import panels
from paramspec_book.panels import DASHED, FAMILIES, GENERAL, MASKS, METHODS, NULL, OTHER, OWN

CHANCE = 0.25
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "font.size": 11,
    "text.parse_math": False,  # `$` in a name is no mathematics
}


def use_book_style() -> None:
    """`use_book_style()`: the look of every figure and table; call it once a chapter."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(STYLE)
    pd.set_option("display.html.use_mathjax", False)


def family_title(family: str) -> str:
    """`family_title("llama")`: as its makers write it; a family that is not known here as it is."""
    return FAMILIES[family][0] if family in FAMILIES else family


# --- one model ----------------------------------------------------------------------------------


def promoted_share(table: pd.DataFrame) -> Figure:
    """How much of each MLP output the largest terms of its sum carry.

    Args:
        table: columns `vectors` (how many of the largest coefficients are kept), `layer`,
            `error` (norm of what is missing over the norm of the output).
    """
    figure, axes = plt.subplots(figsize=(7, 3.6))
    layers = sorted(table["layer"].unique())
    for colour, layer in zip(sns.color_palette("viridis", len(layers)), layers, strict=True):
        part = table[table["layer"] == layer]
        axes.plot(part["vectors"], part["error"], color=colour, linewidth=1.2)
    axes.set(xscale="log", xlabel="value vectors kept, those with the largest terms first")
    axes.set(ylim=(-0.03, None), ylabel="missing part of\nthe MLP's output")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    scale = plt.cm.ScalarMappable(Normalize(layers[0], layers[-1]), "viridis")
    figure.colorbar(scale, ax=axes, label="layer")
    return figure


def overlap(table: pd.DataFrame, domains: list[str], expected: float) -> Figure:
    """How far the value vectors of two concepts are the same: a heat map, concepts by domain.

    Args:
        table: square, shared fraction of each pair's masks; index and columns are concepts.
        domains: the domain of each concept, in the table's order.
        expected: the fraction that two random masks of this size share.
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


def accuracy_by(table: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % interval, a row per group.

    Args:
        table: columns `by` (what the group is of: a panel each), `group`, `accuracy`, `low`,
            `high`, `n`.
    """
    kinds = dict(list(table.groupby("by", sort=False)))
    heights = [max(2, len(part)) for part in kinds.values()]
    size = (7, 0.8 + 0.27 * sum(heights))
    options: dict[str, Any] = {
        "figsize": size,
        "height_ratios": heights,
        "sharex": True,
        "squeeze": False,
    }
    figure, grid = plt.subplots(len(kinds), **options)
    for axes, (kind, part) in zip(grid[:, 0], kinds.items(), strict=True):
        places = np.arange(len(part))[::-1]  # two groups may have one name
        axes.hlines(places, part["low"], part["high"], color=GENERAL)
        axes.plot(part["accuracy"], places, "o", color=GENERAL, markersize=5)
        axes.axvline(CHANCE, **DASHED)
        names = [f"{row.group}  (n = {row.n})" for row in part.itertuples()]
        panels.named_rows(axes, places, names)
        axes.set_title(f"by {kind}")
        axes.margins(y=0.6 / len(part))
        axes.tick_params(axis="y", labelsize=9)
    axes.set(xlim=(0, 1.02), xlabel="accuracy (acc_norm), 95 % interval; dashed: chance")
    return figure


def curves(summary: pd.DataFrame) -> Figure:
    """C(k) and G(k) over the mask ratio: a panel for each kind of mask."""
    masks = [mask for mask in MASKS if (summary["mask"] == mask).any()]
    rows, columns = (len(masks) + 1) // 2, min(2, len(masks))
    options: dict[str, Any] = {"figsize": (7.2, 0.6 + 2.5 * rows), "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(rows, columns, **options)
    general = {"color": GENERAL, "label": "unrelated questions, G(k)"}
    own = {"color": OWN, "label": "the concept's questions, C(k)"}
    for axes, mask in zip(grid.flat, masks, strict=False):
        part = panels.on_ratios(axes, summary[summary["mask"].isin(["none", mask])])
        panels.line(axes, part["place"], part, "general_accuracy", **general)
        panels.line(axes, part["place"], part, "concept_accuracy", **own)
        axes.axhline(CHANCE, **DASHED)
        axes.set_title(MASKS[mask][0])
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy (acc_norm)")
    panels.legend_below(figure, grid[0, 0], 2)
    return figure


def pss_over_ratio(summary: pd.DataFrame) -> Figure:
    """PSS pooled, PSS per concept and the difference in differences, each mask a line."""
    titles = {"pss_pooled": "PSS, pooled", "pss_per_concept": "PSS, per concept"}
    titles |= {"did": "difference in differences"}
    figure, grid = plt.subplots(2, 2, figsize=(7.2, 5.6))
    for axes, (value, title) in zip(grid.flat, titles.items(), strict=False):
        masked = panels.on_ratios(axes, summary[summary["mask"] != "none"])
        _by_mask(axes, masked, value, apart=0.09, join=1.5, markersize=5)
        axes.set_title(title)
    own = masked[masked["mask"] == "concept"]
    for axes, floor in zip(grid[0], ("floor_pooled", "floor_per_concept"), strict=True):
        axes.plot(own["place"], own[floor], color="0.35", linestyle=":", label="sampling alone")
        axes.set_ylim(0, None)
    grid[1, 0].axhline(0, **DASHED)
    grid[1, 1].set_axis_off()
    names = grid[0, 0].get_legend_handles_labels()
    grid[1, 1].legend(*names, loc="center", title="masked:")
    return figure


def general_change(summary: pd.DataFrame) -> Figure:
    """C7: what masking does to unrelated questions, in accuracy, a bar for each mask and ratio."""
    figure, axes = plt.subplots(figsize=(7, 3.8))
    _by_mask(axes, panels.on_ratios(axes, summary), "general_change", apart=0.12)
    axes.axhline(0, color="0.3", linewidth=1)
    axes.margins(x=0.15)
    axes.set_ylabel("change of accuracy on\nunrelated questions")
    panels.legend_below(figure, axes, 2)
    return figure


def _by_mask(axes: Axes, table: pd.DataFrame, value: str, apart: float, **look: Any) -> None:
    """The kinds of masks side by side, at the places of `on_ratios`."""
    for number, (part, style) in enumerate(panels.each_group(table, "mask", MASKS)):
        x = part["place"] + apart * (number - 1.5)
        panels.points(axes, x, part, value, bar=1.5, alpha=1, **look, **style)


def protocols(summary: pd.DataFrame) -> Figure:
    """The gap G(k) - C(k) that a concept's own mask opens, over G(0), for each protocol."""
    names = {"paper": ("paper: same questions", OWN)}
    names |= {"holdout": ("held out: other questions", panels.COLOURS[4])}
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for part, style in panels.each_group(panels.on_ratios(axes, summary), "protocol", names):
        panels.line(axes, part["place"], part, "did", **style)
    axes.axhline(0, **DASHED)
    axes.set_ylabel("difference in\ndifferences")
    axes.legend(title="vectors chosen and scored on")
    return figure


def depth(table: pd.DataFrame) -> Figure:
    """Where in depth a concept's vectors lie, when all layers compete.

    Args:
        table: columns `layer`, `ratio`, `share` (mean share of the masked vectors that lie in the
            layer), `low`, `high` (quartiles over concepts).
    """
    ratios = sorted(table["ratio"].unique())
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for colour, ratio in zip(sns.color_palette("flare", len(ratios)), ratios, strict=True):
        part = table[table["ratio"] == ratio].sort_values("layer")
        axes.plot(part["layer"], part["share"], color=colour, label=f"{ratio:.1%} masked")
        panels.band(axes, part["layer"], part["low"], part["high"], colour, alpha=0.2)
    even = 1 / table["layer"].nunique()
    axes.axhline(even, **DASHED)
    axes.annotate("even", (0, even), xytext=(0, 3), textcoords="offset points", color="0.4")
    axes.set(xlabel="layer", ylim=(0, None), ylabel="share of the\nmasked vectors")
    axes.legend()
    return figure


# --- many models --------------------------------------------------------------------------------


def against_accuracy(table: pd.DataFrame) -> Figure:
    """Peak PSS over accuracy, a point a model with both intervals; in grey, random masks.

    Args:
        table: of `trends.model_table`, with `family` and, for names beside points, `shown`.
    """
    figure, axes = plt.subplots(figsize=(7, 4.6))
    axes.axvline(CHANCE, **DASHED)
    if "peak_null" in table:
        style: dict[str, Any] = {"color": NULL, "marker": "D", "markersize": 3.5, "zorder": 1}
        panels.points(axes, table["accuracy"], table, "peak_null", label="random masks", **style)
    table = table.fillna({"family": "other"})
    names = panels.family_names(table["family"], table["family"])
    for part, style in panels.each_group(table, "family", names):
        panels.points(axes, part["accuracy"], part, "peak_pss", markersize=7, zorder=3, **style)
        panels.accuracy_bars(axes, part, "peak_pss", style["color"])
    for row in table[table["shown"] != ""].itertuples():
        beside: dict[str, Any] = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(row.shown, (row.accuracy, row.peak_pss), **beside)
    axes.set(xlabel="accuracy without a mask (acc_norm); dashed: chance", ylabel="peak PSS")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    figure.legend(loc="outside lower center", ncols=6, columnspacing=1)
    return figure


def forest(table: pd.DataFrame, published: float | None = None) -> Figure:
    """Correlation coefficients with two intervals each, a row a reading of the claim.

    Args:
        table: columns `reading`, `r`, `low`, `high` (over concepts), `family_low`, `family_high`.
        published: the paper's coefficient, drawn as a line.
    """
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.38 * len(table)))
    places = np.arange(len(table))[::-1]
    if published is not None:
        axes.axvline(published, color=OWN, linewidth=1.2, linestyle=":", label="the paper")
    axes.axvline(0, **DASHED)
    families = table["family_low"], table["family_high"]
    axes.hlines(places, *families, color="0.8", lw=6, label="over families")
    axes.hlines(places, table["low"], table["high"], color=GENERAL, lw=1.8, label="over concepts")
    axes.plot(table["r"], places, "o", color=GENERAL)
    panels.named_rows(axes, places, table["reading"])
    axes.set_xlim(np.nanmin([-0.55, *table["low"]]) - 0.05, 1.03)
    axes.set_xlabel("Pearson correlation with accuracy, and its 95 % intervals")
    panels.legend_below(figure, axes)
    return figure


def generations(table: pd.DataFrame) -> Figure:
    """Peak PSS over the generations of each family, with the band of random masks.

    Args:
        table: of `trends.model_table`, with `family`, `order` (the generation's place in its
            family), `micro` and `generation`; and, if there is one, `held_out`. Models without a
            place in the order are left out.
    """
    families = list(table.dropna(subset=["order"]).groupby(["family", "micro"], sort=False))
    options: dict[str, Any] = {"figsize": (7.4, 3.4), "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(1, max(1, len(families)), **options)
    for axes, ((family, _), part) in zip(grid[0], families, strict=False):
        part = part.sort_values("order")
        if "peak_null" in part:
            panels.null_band(axes, part.set_index("order"))
        if "held_out" in part:
            axes.plot(part["order"], part["held_out"], ":", color="0.2", label="held out")
        title, colour = FAMILIES.get(family, (family, OTHER))
        style: dict[str, Any] = {"color": colour, "join": 1.5, "markersize": 6}
        panels.points(axes, part["order"], part, "peak_pss", **style)
        names = part["generation"].str.removeprefix("zoo ")
        tilt = {"rotation": 60, "ha": "right"} if names.str.len().max() > 3 else {}
        axes.set_xticks(part["order"], names, **tilt)
        axes.set(title=title, xlabel="generation")
        axes.margins(x=0.12)
    grid[0, 0].set_ylabel("peak PSS")
    panels.legend_below(figure, grid[0, 0])
    return figure


def along(table: pd.DataFrame, x: str, label: str, *, log: bool = False) -> Figure:
    """Accuracy and peak PSS over something that models differ in, a line a run or family.

    Args:
        table: of `trends.model_table`, with columns `x` and `run`; `peak_null` is drawn as a band.
        x: the column of the abscissa; `label` names it, with its unit.
        log: a logarithmic abscissa.
    """
    figure, grid = plt.subplots(1, 2, figsize=(7.4, 3.5), sharex=True)
    titles = {"accuracy": "accuracy (acc_norm)", "peak_pss": "peak PSS"}
    names = panels.family_names(table["run"], table["family"])
    for axes, (value, title) in zip(grid, titles.items(), strict=True):
        for part, style in panels.each_group(table.sort_values(x), "run", names):
            panels.points(axes, part[x], part, value, join=1.3, markersize=5, **style)
        axes.set(xlabel=label, ylabel=title)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            if table[x].max() < 100 * table[x].min():  # too narrow for powers of ten alone
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "peak_null" in table:
        null = table.groupby(x)[["peak_null_low", "peak_null_high"]].mean()
        panels.null_band(grid[1], null)
    grid[0].axhline(CHANCE, **DASHED)
    panels.legend_below(figure, grid[1], 5)
    return figure


def tiers(table: pd.DataFrame) -> Figure:
    """Accuracy, PSS and difference in differences by frequency tier, a line a group of models.

    Args:
        table: columns `group`, `tier`, and `accuracy`, `peak_pss`, `peak_did` with `_low`, `_high`.
    """
    titles = {"accuracy": "accuracy (acc_norm)", "peak_pss": "peak PSS"}
    titles |= {"peak_did": "peak diff. in diff."}
    order = ["high", "medium", "low"]
    groups = list(dict.fromkeys(table["group"]))
    names = {group: (group, colour) for group, colour in zip(groups, panels.COLOURS, strict=False)}
    figure, grid = plt.subplots(1, 3, figsize=(7.6, 3.5))
    for axes, (value, title) in zip(grid, titles.items(), strict=True):
        for number, (part, style) in enumerate(panels.each_group(table, "group", names)):
            x = np.arange(3) + 0.08 * (number - (len(groups) - 1) / 2)
            by_tier = part.set_index("tier").loc[order]
            panels.points(axes, x, by_tier, value, join=1.2, markersize=5, **style)
        axes.set_xticks(range(3), order)
        axes.set(title=title, xlabel="frequency tier")
        axes.margins(x=0.12)
    grid[0].axhline(CHANCE, **DASHED)
    grid[2].axhline(0, **DASHED)
    panels.legend_below(figure, grid[0], 2)
    return figure


# --- ways of training ---------------------------------------------------------------------------


def by_method(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Each measure of each model, a row a way of training, with 95 % intervals.

    Args:
        table: columns `model`, `method` (in order), `measure`, `value`, `low`, `high`; a method
            that has no colour of its own has FT-PV's. The first method is drawn as a line as well.
        labels: title of each measure, in order.
    """
    models, methods = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["method"]))
    height = 0.7 + (0.55 + 0.27 * len(methods)) * len(models)
    size = (max(4.8, 2.05 * len(labels) + 1.2), height)
    options: dict[str, Any] = {"figsize": size, "sharey": True, "squeeze": False}
    figure, grid = plt.subplots(len(models), len(labels), **options)
    places = dict(zip(methods, range(len(methods))[::-1], strict=True))
    beside: dict[str, Any] = {
        "xycoords": "axes fraction",
        "rotation": 270,
        "va": "center",
        "fontsize": "small",
    }
    for row, model in zip(grid, models, strict=True):
        row[0].set_yticks(list(places.values()), list(places))
        row[-1].annotate(model, (1.03, 0.5), **beside)
        for axes, measure in zip(row, labels, strict=True):
            part = table[(table["model"] == model) & (table["measure"] == measure)]
            for one in part.itertuples():
                place, (_, colour) = places[one.method], METHODS.get(one.method, ("", OWN))
                axes.hlines(place, one.low, one.high, color=colour, lw=1.6, alpha=0.6)
                axes.plot(one.value, place, "o", color=colour, markersize=6)
            axes.margins(y=0.15)
            if part["value"].isna().all():
                middle = {"ha": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, "not measured", color=NULL, **middle)
                axes.set_xticks([])
            else:
                axes.axvline(part["value"].iloc[0], color="0.7", linewidth=1, zorder=0)
    for axes, title in zip(grid[0], labels.values(), strict=True):
        axes.set_title(title)
    return figure


def over_training(
    table: pd.DataFrame,
    x: str,
    label: str,
    values: Mapping[str, str],
    *,
    ticks: Mapping[float, str] | None = None,
    original: pd.DataFrame | None = None,
) -> Figure:
    """Lines by method over a choice or the course of training, a column a model.

    Args:
        table: columns `model`, `method`, `x`, and each value, with `_low` and `_high` where known.
        x: the column of the abscissa; `label` names it.
        values: title of each value, a row of panels each.
        ticks: places and names on a logarithmic abscissa; a linear one without.
        original: `model` and each value of the untrained model, a dashed line.
    """

    def draw(axes: Axes, part: pd.DataFrame, value: str, **style: Any) -> None:
        part = part.dropna(subset=[value]).sort_values(x)
        style["marker"] = "" if f"{value}_low" not in part and len(part) >= 20 else "o"
        panels.line(axes, part[x], part, value, markersize=4, lw=1.4, **style)

    figure, grid = _models_by_measure(table, values, 0.8 + 2.2 * len(values), draw)
    models = list(dict.fromkeys(table["model"]))
    for row, value in zip(grid, values, strict=True):
        for axes, model in zip(row, models, strict=True):
            if original is not None and value in original:
                before = original.set_index("model").loc[model, value]
                axes.axhline(before, color="0.35", linestyle="--", lw=1, label="original")
            if ticks is not None:
                axes.set_xscale("log")
                axes.set_xticks(list(ticks), list(ticks.values()))
                axes.xaxis.set_minor_locator(NullLocator())
    grid[-1, (len(models) - 1) // 2].set_xlabel(label)  # once: side by side, long ones meet
    panels.legend_below(figure, grid[0, 0])
    return figure


def made_up(table: pd.DataFrame) -> Figure:
    """Semantic entropy and local dimension over accuracy: a colour a method, a column a model.

    Args:
        table: columns `model`, `method`, and `accuracy`, `entropy`, `dimension`, each with `_low`
            and `_high`.
    """

    def draw(axes: Axes, part: pd.DataFrame, value: str, **style: Any) -> None:
        panels.points(axes, part["accuracy"], part, value, markersize=7, **style)
        panels.accuracy_bars(axes, part, value, style["color"])

    titles = {"entropy": "semantic entropy", "dimension": "local dimension"}
    figure, grid = _models_by_measure(table, titles, 5.2, draw, sharey="row")
    for axes in grid[-1]:
        axes.set_xlabel("accuracy (acc_norm)")
    panels.legend_below(figure, grid[0, 0])
    return figure


def _models_by_measure(
    table: pd.DataFrame,
    titles: Mapping[str, str],
    height: float,
    draw: Callable[..., None],
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """Panels `[measure, model]`; `draw(axes, rows, measure, **style)` draws a method in one."""
    models = dict(list(table.groupby("model", sort=False)))
    size = (max(4.8, 2.5 * len(models) + 0.6), height)
    options |= {"figsize": size, "sharex": "col", "squeeze": False}
    figure, grid = plt.subplots(len(titles), len(models), **options)
    for column, (model, rows) in zip(grid.T, models.items(), strict=True):
        column[0].set_title(model)
        for axes, value in zip(column, titles, strict=True):
            for part, style in panels.each_group(rows, "method", METHODS):
                draw(axes, part, value, **style)
    for axes, title in zip(grid[:, 0], titles.values(), strict=True):
        axes.set_ylabel(title)
    return figure, grid
