"""The tables that commands print: of models, questions, plans and studies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd

from paramspec.stats.estimates import with_interval
from paramspec.tables import ONE, TIERS

if TYPE_CHECKING:
    from paramspec.models.load import LoadedModel
    from paramspec.models.registry import ModelSpec
    from paramspec.specwiki import Question
    from paramspec.studies.cost import Plan
    from paramspec.studies.sweep import Study


def bytes_of(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def hours_of(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.1g}"


# How the values of a column are shown; values of other columns by `str`.
FORMATS = {
    "parameters": lambda n: f"{n / 1e9:.2f} B" if n >= 1e8 else f"{n / 1e6:.2f} M",
    "weights": bytes_of,
    "tokens": "{:,}".format,
    "flops": "{:.2e}".format,
    "gpu_hours": hours_of,
    "cpu_hours": hours_of,
    "memory": bytes_of,
    "disk": bytes_of,
    "shared": "{:.0%}".format,
    "ratio": "{:g}".format,
    "gated": lambda value: "yes" if value else "no",
    "on_disk": lambda value: "yes" if value else "no",
}


def show(frame: pd.DataFrame, title: str | None = None, caption: str | None = None) -> None:
    """Print a table, its columns by `FORMATS`, numbers on the right.

    In a name, `[bold]` and `:cat:` are no markup. In a pipe, no width is to be kept to.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for place, (name, values) in enumerate(frame.items()):
        justify: Literal["left", "right"] = "right" if values.dtype.kind in "iuf" else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=place == 0)
    shown = {name: values.map(FORMATS.get(name, str)) for name, values in frame.items()}
    for row in pd.DataFrame(shown).itertuples(index=False):
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_models(specs: Sequence[ModelSpec]) -> None:
    from paramspec.models.checkpoints import is_on_disk

    rows = [
        {
            "id": spec.id,
            "family": spec.family,
            "generation": spec.generation,
            "released": f"{spec.released:%Y-%m}" if spec.released else "",
            "sets": ", ".join(spec.sets),
            "source": spec.source.label,
            "parameters": spec.parameters,
            "MMLU": f"{spec.mmlu.score:.1f}" if spec.mmlu else "",
            "gated": spec.gated,
            "on_disk": is_on_disk(spec),
        }
        for spec in specs
    ]
    show(pd.DataFrame(rows))
    if any(spec.gated for spec in specs):
        print("gated: ask for access at https://huggingface.co/SOURCE, then run `hf auth login`")


def print_verified(loaded: LoadedModel) -> None:
    """What holds of a model, once its view is found and compared with a forward pass."""
    from paramspec.method.hooks import value_vector_view
    from paramspec.method.scoring import choose_engine
    from paramspec.models.tokens import tokenizer_facts

    view = value_vector_view(loaded.model)
    engine, facts = choose_engine(view), tokenizer_facts(loaded.tokenizer)
    added = ", ".join(token["token"] for token in facts["kept"]) or "nothing"
    sums = "its output is the sum of coefficients times value vectors"
    if not view.readable:
        sums = "its value vectors cannot be read"
    print(f"{loaded.name}: {type(loaded.model).__name__}, {loaded.dtype} on {loaded.device}")
    print(f"  down projections: {view.names[0]} to {view.names[-1]}")
    print(f"  value vectors: {view.layers} layers of {view.width}, each of {view.hidden} numbers")
    print(f"  checked by a forward pass: each down projection runs once, {sums}")
    if loaded.quantized:
        print(f"  quantized by {loaded.quantized}: its value vectors are masked, and not trained")
    print(f"  rows: {engine.name} ({engine.reason})")
    chat = "a chat template" if loaded.tokenizer.chat_template else "no chat template"
    print(f"  tokenizer: {facts['class']}, puts {added} in front of a text, {chat}")


def print_counts(asked: list[Question]) -> None:
    from paramspec.specwiki import questions_digest

    concepts = pd.DataFrame(
        {(question.domain, question.tier, question.concept) for question in asked},
        columns=["domain", "tier", "concept"],
    )
    counts = pd.crosstab(concepts["domain"], concepts["tier"], margins=True, margins_name="total")
    columns = [tier for tier in (*TIERS, ONE, "total") if tier in counts]
    show(counts[columns].reset_index())
    print(f"{len(asked)} questions on {len(concepts)} concepts, SHA-256 {questions_digest(asked)}")


def print_plan(planned: Plan, others: Sequence[str]) -> None:
    on = f"one {planned.gpu.name} at {100 * planned.utilisation:g} %"
    models, chapters = planned.models, planned.chapters
    show(models.drop(columns="micro"), f"Models, on {on}; work that chapters share, once")
    show(chapters, "Chapters, each by itself; shared: with a chapter above")
    if untrained := int((models["micro"] & ~models["on_disk"]).sum()):
        print(f"To train first: {untrained} micro models, some minutes on a few cores.")
    print(
        "Results in the store are not looked up. GPU hours are FLOPs at that share of the peak; "
        "loading and downloading come on top, and micro models are bound by overhead. CPU hours "
        "are of one core, beside forward passes; memory is beside the weights; disk is of results."
    )
    if others:
        print(f"Not planned: {', '.join(others)}.")
    asked = f"{len(models)} models, {chapters['concepts'].max()} concepts"
    totals = planned.totals
    print(
        f"In all: {asked}: {hours_of(totals['gpu_hours'])} hours of {on}, "
        f"{hours_of(totals['cpu_hours'])} of a CPU core, {bytes_of(totals['memory'])} of memory a "
        f"process, {bytes_of(totals['disk'])} of disk"
    )


def print_study(study: Study) -> None:
    """A table per model, of accuracies and PSS with intervals, and the peaks."""
    from paramspec.stats.summary import peak_pss, summarize

    titles = {
        "concept_accuracy": "C(k)",
        "general_accuracy": "G(k)",
        "pss_pooled": "PSS pooled",
        "did": "diff. in diff.",
        "pss_per_concept": "PSS per concept",
    }
    for model, rows in summarize(study.details).groupby("model", sort=False):
        shown = {title: _intervals(rows, name) for name, title in titles.items()}
        first = rows.iloc[0]
        show(
            rows[["mask", "ratio"]].assign(**shown),
            f"{model}: {first['concepts']} concepts, protocol {first['protocol']}",
            "in brackets: 95 % intervals over concepts",
        )
    peaks = peak_pss(study.details)
    did, pooled = (_intervals(peaks, name) for name in ("did", "peak_pooled"))
    for row in peaks.itertuples():
        print(
            f"{row.model}, mask {row.mask}: difference in differences, mean over ratios "
            f"{did[row.Index]}; peak PSS {pooled[row.Index]} at ratio {row.ratio:g}"
        )


def print_comparison(table: pd.DataFrame, first: str, second: str) -> None:
    """The rows of `stats.compare.compare`."""
    shown = {side: _intervals(table, side) for side in ("first", "second", "difference")}
    asked, concepts = table.iloc[0][["questions", "concepts"]]
    print(f"{first}, then {second}: {asked} questions on {concepts} concepts, paired")
    caption = "in brackets: 95 % intervals over concepts"
    show(table[["measure"]].assign(**shown), caption=caption)


def _intervals(rows: pd.DataFrame, name: str) -> list[str]:
    texts = [with_interval(row, name, ".3f") for row in rows.to_dict("records")]
    return [text.replace("\u00a0", " ") for text in texts]
