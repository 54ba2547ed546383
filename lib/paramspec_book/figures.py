"""One function per figure: a table in, a matplotlib figure out. Nothing is computed here.

figures.use_book_style()
figures.accuracy_by(table)          # chapter 2
figures.curves(summary, base)       # chapter 3
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

CHANCE = 0.25
_COLOURS = sns.color_palette("colorblind")
# A mask keeps its colour through the book.
MASK_COLOURS = {
    "concept": _COLOURS[3],
    "other": _COLOURS[1],
    "magnitude": _COLOURS[2],
    "random": _COLOURS[7],
}
MASK_TITLES = {
    "concept": "the concept's own vectors",
    "other": "another concept's vectors",
    "magnitude": "equally active vectors",
    "random": "random vectors",
}
OWN, GENERAL = _COLOURS[3], _COLOURS[0]


def use_book_style() -> None:
    """`use_book_style()`: the look of every figure of the book; call it once a chapter."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.dpi": 150,
            "figure.dpi": 110,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "font.size": 11,
        }
    )
    pd.set_option("display.html.use_mathjax", False)  # a table's texts, too, are as they stand


def as_written(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """`@as_written`: each text of the figure as it stands, for `$` in a name is no mathematics."""

    @functools.wraps(draw)
    def drawn(*tables: object, **options: object) -> Figure:
        # One setting, not `plt.rc_context`: that puts back all of them, and with them that a kernel
        # shows figures, which it is told as late as the first one is drawn.
        before = plt.rcParams["text.parse_math"]
        plt.rcParams["text.parse_math"] = False
        try:
            figure = draw(*tables, **options)
        finally:
            plt.rcParams["text.parse_math"] = before
        # Some labels of ticks are made as late as the figure is shown.
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        return figure

    return drawn


def _label(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out labels that begin with an underscore."""
    return f"\u200a{name}" if name.startswith("_") else name  # a hair space


def _with_interval(axes: Axes, x: object, table: pd.DataFrame, value: str, **style: object) -> None:
    """A line with its interval as a band, columns `value`, `value_low`, `value_high`."""
    axes.plot(x, table[value], marker="o", **style)
    axes.fill_between(
        x,
        table[f"{value}_low"],
        table[f"{value}_high"],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )


def _ratio_axis(axes: Axes, ratios: list[float]) -> np.ndarray:
    """Ratios at even places, for they are spaced by factors; returns the places."""
    places = np.arange(len(ratios))
    axes.set_xticks(places, ["none" if ratio == 0 else f"{ratio:.1%}" for ratio in ratios])
    axes.set_xlabel("value vectors masked")
    return places


@as_written
def promoted_share(table: pd.DataFrame) -> Figure:
    """How much of each MLP output the largest terms of its sum carry.

    Args:
        table: columns `vectors` (how many of the largest coefficients are kept), `layer`,
            `error` (norm of what is missing over the norm of the output).
    """
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    layers = sorted(table["layer"].unique())
    palette = sns.color_palette("viridis", len(layers))
    for colour, layer in zip(palette, layers, strict=True):
        part = table[table["layer"] == layer]
        axes.plot(part["vectors"], part["error"], color=colour, linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.03, None)
    axes.set_xlabel("value vectors kept, those with the largest terms first")
    axes.set_ylabel("missing part of\nthe MLP's output")
    scale = plt.cm.ScalarMappable(plt.Normalize(layers[0], layers[-1]), "viridis")
    figure.colorbar(scale, ax=axes, label="layer")
    return figure


@as_written
def overlap(table: pd.DataFrame, domains: list[str], expected: float) -> Figure:
    """How far the value vectors of two concepts are the same: a heat map, concepts by domain.

    Args:
        table: square, shared fraction of each pair's masks; index and columns are concepts.
        domains: the domain of each concept, in the table's order.
        expected: the fraction that two random masks of this size share.
    """
    size = 2.6 + 0.22 * len(table)
    figure, axes = plt.subplots(figsize=(size + 1.2, size), layout="constrained")
    values = table.to_numpy(copy=True)
    np.fill_diagonal(values, np.nan)
    shared = pd.DataFrame(values, index=table.index, columns=table.columns)
    sns.heatmap(
        shared,
        ax=axes,
        cmap="mako_r",
        vmin=expected,
        square=True,
        xticklabels=True,
        yticklabels=True,
        cbar_kws={"label": f"vectors shared (at random: {expected:.0%})", "shrink": 0.8},
    )
    axes.set_facecolor("0.9")
    axes.tick_params(labelsize=8, length=0)
    axes.set(xlabel="", ylabel="")
    for place in range(1, len(domains)):
        if domains[place] != domains[place - 1]:
            axes.axhline(place, color="white", linewidth=2.5)
            axes.axvline(place, color="white", linewidth=2.5)
    return figure


@as_written
def accuracy_by(table: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % interval, a row per group.

    Args:
        table: columns `by` (what the group is of: a panel each), `group`, `accuracy`, `low`,
            `high`, `n`.
    """
    kinds = list(dict.fromkeys(table["by"]))
    heights = [max(2, (table["by"] == kind).sum()) for kind in kinds]
    figure, panels = plt.subplots(
        len(kinds),
        1,
        figsize=(7, 0.8 + 0.27 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        part = table[table["by"] == kind].iloc[::-1]
        names = [f"{row.group}  (n = {row.n})" for row in part.itertuples()]
        places = np.arange(len(part))  # two groups may have one name
        axes.errorbar(
            part["accuracy"],
            places,
            xerr=[part["accuracy"] - part["low"], part["high"] - part["accuracy"]],
            fmt="o",
            color=GENERAL,
            capsize=0,
            markersize=5,
        )
        axes.axvline(CHANCE, color="0.5", linestyle="--", linewidth=1)
        axes.set_yticks(places, names)
        axes.set_title(f"by {kind}")
        axes.margins(y=0.6 / len(part))
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("accuracy (acc_norm), 95 % interval; dashed: chance")
    return figure


@as_written
def curves(summary: pd.DataFrame) -> Figure:
    """C(k) and G(k) over the mask ratio: a panel for each kind of mask.

    Args:
        summary: rows of `pss.summarize` of one model and protocol.
    """
    base = summary[summary["mask"] == "none"]
    masks = [mask for mask in MASK_COLOURS if (summary["mask"] == mask).any()]
    figure, panels = plt.subplots(
        (len(masks) + 1) // 2,
        min(2, len(masks)),
        figsize=(7.2, 0.6 + 2.5 * ((len(masks) + 1) // 2)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, mask in zip(panels.flat, masks, strict=False):
        part = pd.concat([base, summary[summary["mask"] == mask].sort_values("ratio")])
        places = _ratio_axis(axes, list(part["ratio"]))
        general = {"color": GENERAL, "label": "unrelated questions, G(k)"}
        own = {"color": OWN, "label": "the concept's questions, C(k)"}
        _with_interval(axes, places, part, "general_accuracy", **general)
        _with_interval(axes, places, part, "concept_accuracy", **own)
        axes.axhline(CHANCE, color="0.5", linestyle="--", linewidth=1)
        axes.set_title(MASK_TITLES[mask])
    for axes in panels[:-1].flat:
        axes.set_xlabel("")
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy (acc_norm)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@as_written
def pss_over_ratio(summary: pd.DataFrame) -> Figure:
    """PSS pooled, PSS per concept and the difference in differences, each mask a line.

    Args:
        summary: rows of `pss.summarize` of one model and protocol.
    """
    columns = {
        "pss_pooled": ("PSS, pooled", "floor_pooled"),
        "pss_per_concept": ("PSS, per concept", "floor_per_concept"),
        "did": ("difference in differences", None),
    }
    ratios = sorted(summary.loc[summary["mask"] != "none", "ratio"].unique())
    figure, panels = plt.subplots(2, 2, figsize=(7.2, 5.6), layout="constrained")
    for axes, (column, (title, floor)) in zip(panels.flat, columns.items(), strict=False):
        places = _ratio_axis(axes, ratios)
        for shift, (mask, colour) in enumerate(MASK_COLOURS.items()):
            part = summary[summary["mask"] == mask].sort_values("ratio")
            if part.empty:
                continue
            axes.errorbar(
                places + 0.09 * (shift - 1.5),
                part[column],
                yerr=[part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]],
                color=colour,
                marker="o",
                markersize=5,
                linewidth=1.8 if mask == "concept" else 1.2,
                label=MASK_TITLES[mask],
            )
        if floor:
            own = summary[summary["mask"] == "concept"].sort_values("ratio")
            axes.plot(places, own[floor], color="0.35", linestyle=":", label="sampling alone")
            axes.set_ylim(0, None)
        else:
            axes.axhline(0, color="0.5", linestyle="--", linewidth=1)
        axes.set_title(title)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    panels[1, 1].set_axis_off()
    panels[1, 1].legend(handles, labels, loc="center", title="masked:")
    return figure


@as_written
def protocols(summary: pd.DataFrame) -> Figure:
    """The gap G(k) - C(k) that masking opens, over G(0), for each protocol.

    Args:
        summary: rows of `pss.summarize` of one model, for the mask `concept`.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    ratios = sorted(summary["ratio"].unique())
    places = _ratio_axis(axes, ratios)
    titles = {"paper": "paper: same questions", "holdout": "held out: other questions"}
    for colour, (protocol, title) in zip((OWN, _COLOURS[4]), titles.items(), strict=True):
        part = summary[summary["protocol"] == protocol].sort_values("ratio")
        if not part.empty:
            _with_interval(axes, places, part, "did", color=colour, label=title)
    axes.axhline(0, color="0.5", linestyle="--", linewidth=1)
    axes.set_ylabel("difference in\ndifferences")
    axes.legend(title="vectors chosen and scored on")
    return figure


@as_written
def depth(table: pd.DataFrame) -> Figure:
    """Where in depth a concept's vectors lie, when all layers compete.

    Args:
        table: columns `layer`, `ratio`, `share` (mean share of the masked vectors that lie in the
            layer), `low`, `high` (quartiles over concepts).
    """
    ratios = sorted(table["ratio"].unique())
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    palette = sns.color_palette("flare", len(ratios))
    for colour, ratio in zip(palette, ratios, strict=True):
        part = table[table["ratio"] == ratio].sort_values("layer")
        axes.plot(part["layer"], part["share"], color=colour, label=f"{ratio:.1%} masked")
        axes.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
    layers = table["layer"].nunique()
    axes.axhline(1 / layers, color="0.5", linestyle="--", linewidth=1)
    axes.annotate("even", (0, 1 / layers), xytext=(0, 3), textcoords="offset points", color="0.4")
    axes.set_ylim(0, None)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the\nmasked vectors")
    axes.legend()
    return figure


@as_written
def general_change(table: pd.DataFrame) -> Figure:
    """C7: what masking does to unrelated questions, in accuracy, a bar for each mask and ratio.

    Args:
        table: rows of `pss.summarize`: `mask`, `ratio`, `general_change` and its interval.
    """
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    ratios = sorted(table["ratio"].unique())
    places = _ratio_axis(axes, ratios)
    for shift, (mask, colour) in enumerate(MASK_COLOURS.items()):
        part = table[table["mask"] == mask].sort_values("ratio")
        if part.empty:
            continue
        axes.errorbar(
            places + 0.12 * (shift - 1.5),
            part["general_change"],
            yerr=[
                part["general_change"] - part["general_change_low"],
                part["general_change_high"] - part["general_change"],
            ],
            fmt="o",
            color=colour,
            label=MASK_TITLES[mask],
        )
    axes.axhline(0, color="0.3", linewidth=1)
    axes.margins(x=0.15)
    axes.set_ylabel("change of accuracy on\nunrelated questions")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- many models --------------------------------------------------------------------------------

FAMILY_COLOURS = {
    "llama": _COLOURS[0],
    "qwen": _COLOURS[1],
    "mistral": _COLOURS[2],
    "gemma": _COLOURS[4],
    "olmo": _COLOURS[5],
}
FAMILY_TITLES = {
    "llama": "Llama",
    "qwen": "Qwen",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "olmo": "OLMo",
}
OTHER, NULL = "0.2", "0.55"


def _family_colour(family: object) -> object:
    return FAMILY_COLOURS.get(family, OTHER)


def family_title(family: str) -> str:
    """`family_title("llama")`: as its makers write it; a family that is not known here as it is."""
    return FAMILY_TITLES.get(family, family)


def _bars(axes: Axes, x: pd.Series, table: pd.DataFrame, value: str, **style: object) -> None:
    """Points with upright 95 % intervals, columns `value`, `value_low`, `value_high`.

    The interval of a maximum of absolute values may lie beyond the value: it is drawn where it is.
    """
    marker = {"fmt": "none"} if "marker" not in style else {"linestyle": "none"}
    axes.vlines(
        x, table[f"{value}_low"], table[f"{value}_high"], color=style["color"], lw=1.1, alpha=0.6
    )
    axes.plot(x, table[value], **(style | marker))


@as_written
def against_accuracy(table: pd.DataFrame, y: str = "peak_pss", label: str = "peak PSS") -> Figure:
    """Peak PSS over accuracy, a point a model with both intervals; in grey, random masks.

    Args:
        table: of `trends.model_table`, with `family` and, for names beside points, `shown`.
    """
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axes.axvline(CHANCE, color="0.5", linestyle="--", linewidth=1)
    if "peak_null" in table:
        style = {"color": NULL, "marker": "D", "markersize": 3.5, "zorder": 1}
        _bars(axes, table["accuracy"], table, "peak_null", label="random masks", **style)
    for family, part in table.groupby(table["family"].fillna("other"), sort=False):
        colour = _family_colour(family)
        style = {"color": colour, "marker": "o", "markersize": 7, "zorder": 3}
        _bars(
            axes,
            part["accuracy"],
            part,
            y,
            label=_label(family_title(family)),
            **style,
        )
        axes.hlines(
            part[y], part["accuracy_low"], part["accuracy_high"], color=colour, lw=0.8, alpha=0.35
        )
    for row in table[table["shown"] != ""].itertuples():
        axes.annotate(
            row.shown,
            (row.accuracy, getattr(row, y)),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xlabel("accuracy without a mask (acc_norm); dashed: chance")
    axes.set_ylabel(label)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    figure.legend(loc="outside lower center", ncols=6, columnspacing=1)
    return figure


@as_written
def forest(table: pd.DataFrame, published: float | None = None) -> Figure:
    """Correlation coefficients with two intervals each, a row a reading of the claim.

    Args:
        table: columns `reading`, `r`, `low`, `high` (over concepts), `family_low`, `family_high`.
        published: the paper's coefficient, drawn as a line.
    """
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.38 * len(table)), layout="constrained")
    places = np.arange(len(table))[::-1]
    if published is not None:
        axes.axvline(published, color=OWN, linewidth=1.2, linestyle=":", label="the paper")
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--")
    axes.hlines(
        places, table["family_low"], table["family_high"], color="0.8", lw=6, label="over families"
    )
    axes.hlines(places, table["low"], table["high"], color=GENERAL, lw=1.8, label="over concepts")
    axes.plot(table["r"], places, "o", color=GENERAL)
    axes.set_yticks(places, table["reading"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(np.nanmin([-0.55, *table["low"]]) - 0.05, 1.03)
    axes.set_xlabel("Pearson correlation with accuracy, and its 95 % intervals")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _null_band(axes: Axes, table: pd.DataFrame) -> None:
    """The interval of the peak under random masks, over the table's index."""
    low, high = table["peak_null_low"], table["peak_null_high"]
    style = {"color": NULL, "alpha": 0.25, "lw": 0, "label": "random masks, 95 %"}
    axes.fill_between(table.index, low, high, **style)


@as_written
def generations(table: pd.DataFrame) -> Figure:
    """Peak PSS over the generations of each family, with the band of random masks.

    Args:
        table: of `trends.model_table`, with `family`, `order` (the generation's place in its
            family), `micro` and `generation`; and, if there is one, `held_out` with its interval.
            Models without a place in the order are left out.
    """
    table = table.dropna(subset=["family", "order"])
    families = list(dict.fromkeys(zip(table["family"], table["micro"], strict=True)))
    figure, panels = plt.subplots(
        1, max(1, len(families)), figsize=(7.4, 3.4), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, (family, micro) in zip(panels[0], families, strict=False):
        part = table[(table["family"] == family) & (table["micro"] == micro)].sort_values("order")
        if "peak_null" in part:
            _null_band(axes, part.set_index("order"))
        if "held_out" in part:
            axes.plot(part["order"], part["held_out"], ":", color="0.2", label="held out")
        colour = _family_colour(family)
        axes.plot(part["order"], part["peak_pss"], color=colour, lw=1.5)
        style = {"color": colour, "marker": "o", "markersize": 6}
        _bars(axes, part["order"], part, "peak_pss", **style)
        axes.set_title(family_title(family))
        names = part["generation"].str.removeprefix("zoo ")
        wide = names.str.len().max() > 3
        axes.set_xticks(
            part["order"], names, rotation=60 if wide else 0, ha="right" if wide else "center"
        )
        axes.margins(x=0.12)
    panels[0, 0].set_ylabel("peak PSS")
    for axes in panels[0]:
        axes.set_xlabel("generation")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@as_written
def along(table: pd.DataFrame, x: str, label: str, *, log: bool = False) -> Figure:
    """Accuracy and peak PSS over something that models differ in, a line a run or family.

    Args:
        table: of `trends.model_table`, with columns `x` and `run`; `peak_null` is drawn as a band.
        x: the column of the abscissa; `label` names it, with its unit.
        log: a logarithmic abscissa.
    """
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.5), sharex=True, layout="constrained")
    runs = list(dict.fromkeys(table["run"]))
    for run in runs:
        part = table[table["run"] == run].sort_values(x)
        colour = _family_colour(part["family"].iloc[0])
        title = _label(family_title(run))
        for axes, value in zip(panels, ("accuracy", "peak_pss"), strict=True):
            axes.plot(part[x], part[value], color=colour, lw=1.3, label=title)
            _bars(axes, part[x], part, value, color=colour, marker="o", markersize=5)
    if "peak_null" in table:
        _null_band(panels[1], table.groupby(x)[["peak_null_low", "peak_null_high"]].mean())
    panels[0].axhline(CHANCE, color="0.5", linestyle="--", linewidth=1)
    panels[0].set_ylabel("accuracy (acc_norm)")
    panels[1].set_ylabel("peak PSS")
    for axes in panels:
        axes.set_xlabel(label)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            if table[x].max() < 100 * table[x].min():  # too narrow for powers of ten alone
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


@as_written
def tiers(table: pd.DataFrame) -> Figure:
    """Accuracy, PSS and difference in differences by frequency tier, a line a group of models.

    Args:
        table: columns `group`, `tier`, and `accuracy`, `peak_pss`, `peak_did` with `_low`, `_high`.
    """
    titles = {
        "accuracy": "accuracy (acc_norm)",
        "peak_pss": "peak PSS",
        "peak_did": "peak diff. in diff.",
    }
    order = ["high", "medium", "low"]
    figure, panels = plt.subplots(1, 3, figsize=(7.6, 3.5), layout="constrained")
    groups = list(dict.fromkeys(table["group"]))
    for axes, (value, title) in zip(panels, titles.items(), strict=True):
        for shift, group in enumerate(groups):
            part = table[table["group"] == group].set_index("tier").loc[order]
            x = np.arange(3) + 0.08 * (shift - (len(groups) - 1) / 2)
            colour = _COLOURS[shift]
            axes.plot(x, part[value], color=colour, lw=1.2, label=_label(group))
            _bars(axes, x, part, value, color=colour, marker="o", markersize=5)
        axes.set_xticks(range(3), order)
        axes.set_title(title)
        axes.set_xlabel("frequency tier")
        axes.margins(x=0.12)
    panels[0].axhline(CHANCE, color="0.5", linestyle="--", linewidth=1)
    panels[2].axhline(0, color="0.5", linestyle="--", linewidth=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


# A method keeps its colour through the book.
METHOD_COLOURS = {
    "original": "0.35",
    "FT-FV": _COLOURS[0],
    "FT-PV": _COLOURS[3],
    "FT-CV": _COLOURS[2],
    "FT-RV": _COLOURS[7],
}
METHOD_TITLES = {
    "original": "original",
    "FT-FV": "FT-FV, all vectors",
    "FT-PV": "FT-PV, the concept's own",
    "FT-CV": "FT-CV, all but those",
    "FT-RV": "FT-RV, random",
}


@as_written
def by_method(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Each measure of each model, a row a way of training, with 95 % intervals.

    Args:
        table: columns `model`, `method` (in order), `measure`, `value`, `low`, `high`; a method
            that has no colour of its own has FT-PV's. The first method is drawn as a line as well.
        labels: title of each measure, in order.
    """
    models, methods = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["method"]))
    figure, panels = plt.subplots(
        len(models),
        len(labels),
        figsize=(
            max(4.8, 2.05 * len(labels) + 1.2),
            0.7 + (0.55 + 0.27 * len(methods)) * len(models),
        ),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    places = dict(zip(methods, range(len(methods))[::-1], strict=True))
    for row, model in zip(panels, models, strict=True):
        for axes, (measure, title) in zip(row, labels.items(), strict=True):
            part = table[(table["model"] == model) & (table["measure"] == measure)]
            if part["value"].isna().all():
                axes.text(
                    0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=NULL
                )
                axes.set_xticks([])
            else:
                axes.axvline(part["value"].iloc[0], color="0.7", linewidth=1, zorder=0)
            for one in part.itertuples():
                colour = METHOD_COLOURS.get(one.method, METHOD_COLOURS["FT-PV"])
                axes.hlines(places[one.method], one.low, one.high, color=colour, lw=1.6, alpha=0.6)
                axes.plot(one.value, places[one.method], "o", color=colour, markersize=6)
            if model == models[0]:
                axes.set_title(title)
            axes.margins(y=0.15)
        row[0].set_yticks(list(places.values()), list(places))
        row[-1].annotate(
            model,
            (1.03, 0.5),
            xycoords="axes fraction",
            rotation=270,
            va="center",
            fontsize="small",
        )
    return figure


@as_written
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
    models = list(dict.fromkeys(table["model"]))
    figure, panels = plt.subplots(
        len(values),
        len(models),
        figsize=(max(4.8, 2.5 * len(models) + 0.6), 0.8 + 2.2 * len(values)),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for column, model in enumerate(models):
        for row, (value, title) in enumerate(values.items()):
            axes = panels[row, column]
            for method, part in table[table["model"] == model].groupby("method", sort=False):
                part = part.dropna(subset=[value]).sort_values(x)
                style = {"color": METHOD_COLOURS[method], "label": METHOD_TITLES[method]}
                if f"{value}_low" in part:
                    _with_interval(axes, part[x], part, value, markersize=4, lw=1.4, **style)
                else:
                    marker = "o" if len(part) < 20 else ""
                    axes.plot(part[x], part[value], marker=marker, markersize=4, lw=1.4, **style)
            if original is not None and value in original:
                before = original.loc[original["model"] == model, value]
                axes.axhline(before.iloc[0], color="0.35", linestyle="--", lw=1, label="original")
            if ticks is not None:
                axes.set_xscale("log")
                axes.set_xticks(list(ticks), list(ticks.values()))
                axes.xaxis.set_minor_locator(plt.NullLocator())
            if row == 0:
                axes.set_title(model)
            if column == 0:
                axes.set_ylabel(title)
    panels[-1, (len(models) - 1) // 2].set_xlabel(label)  # once: side by side, long ones meet
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


@as_written
def made_up(table: pd.DataFrame) -> Figure:
    """Semantic entropy and local dimension over accuracy: a colour a method, a marker a model.

    Args:
        table: columns `model`, `method`, and `accuracy`, `entropy`, `dimension`, each with `_low`
            and `_high`.
    """
    titles = {"entropy": "semantic entropy", "dimension": "local dimension"}
    models = list(dict.fromkeys(table["model"]))
    figure, panels = plt.subplots(
        2,
        len(models),
        figsize=(max(4.8, 2.5 * len(models) + 0.6), 5.2),
        squeeze=False,
        sharex="col",
        sharey="row",
        layout="constrained",
    )
    for column, model in enumerate(models):
        for axes, (value, title) in zip(panels[:, column], titles.items(), strict=True):
            for method, part in table[table["model"] == model].groupby("method", sort=False):
                style = {"color": METHOD_COLOURS[method], "label": METHOD_TITLES[method]}
                _bars(axes, part["accuracy"], part, value, marker="o", markersize=7, **style)
                axes.hlines(
                    part[value],
                    part["accuracy_low"],
                    part["accuracy_high"],
                    color=style["color"],
                    lw=0.8,
                    alpha=0.35,
                )
            if column == 0:
                axes.set_ylabel(title)
        panels[0, column].set_title(model)
        panels[1, column].set_xlabel("accuracy (acc_norm)")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


# --- speed --------------------------------------------------------------------------------------

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


@as_written
def times_as_long(table: pd.DataFrame) -> Figure:
    """How many times as long as the engine each contender takes, a panel a work and precision.

    Args:
        table: columns `work`, `dtype`, `contender`, `variant`, `ratio`, without the engine's own
            row at 1.
    """
    works = list(dict.fromkeys(zip(table["work"], table["dtype"], strict=True)))
    heights = [int(((table["work"] == w) & (table["dtype"] == d)).sum()) for w, d in works]
    figure, panels = plt.subplots(
        len(works), 1, figsize=(7.4, 0.9 + 0.42 * sum(heights) + 0.35 * len(works)),
        sharex=True, squeeze=False, layout="constrained", height_ratios=heights,
    )  # fmt: skip
    for axes, (work, dtype) in zip(panels[:, 0], works, strict=True):
        part = table[(table["work"] == work) & (table["dtype"] == dtype)]
        places = np.arange(len(part))[::-1]
        colours = [GENERAL if name == "paramspec" else OWN for name in part["contender"]]
        axes.barh(places, part["ratio"], color=colours, height=0.6)
        for place, ratio in zip(places, part["ratio"], strict=True):
            axes.annotate(
                f"{ratio:.1f}", (ratio, place), (4, 0), textcoords="offset points", va="center"
            )
        names = [
            f"{CONTENDER_TITLES[row.contender]}, {row.variant}"
            if row.contender == "paramspec"
            else CONTENDER_TITLES[row.contender]
            for row in part.itertuples()
        ]
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        axes.axvline(1, color="0.5", linewidth=1, linestyle="--")
        axes.set_title(f"{work}, {dtype}")
    panels[-1, 0].set_xlim(0, 1.12 * float(table["ratio"].max()))
    panels[-1, 0].set_xlabel("times as long as this book's engine")
    return figure


@as_written
def growth(table: pd.DataFrame) -> Figure:
    """Seconds along each axis, a panel an axis, beside what the needed operations would take.

    Args:
        table: columns `axis`, `x`, `seconds`, `low`, `high`, `flops`.
    """
    axes_names = list(dict.fromkeys(table["axis"]))
    rows = -(-len(axes_names) // 3)
    figure, panels = plt.subplots(
        rows, 3, figsize=(7.6, 2.5 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels.flat, axes_names, strict=False):
        part = table[table["axis"] == name].sort_values("x")
        first = part.iloc[0]
        expected = first["seconds"] * part["flops"] / first["flops"]
        axes.plot(
            part["x"], expected, color="0.5", lw=1, ls="--", label="as the needed operations grow"
        )
        axes.fill_between(part["x"], part["low"], part["high"], color=GENERAL, alpha=0.15, lw=0)
        axes.plot(part["x"], part["seconds"], "o-", color=GENERAL, label="measured")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(GROWTH_TITLES[name])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels[:, 0]:
        axes.set_ylabel("seconds")
    for axes in panels.flat[len(axes_names) :]:
        axes.axis("off")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
