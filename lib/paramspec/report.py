"""What commands print: tables of studies, plans and questions, as they stand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from paramspec.tables import TIERS

if TYPE_CHECKING:
    from paramspec.models.registry import ModelSpec
    from paramspec.specwiki import Question
    from paramspec.studies.cost import Plan
    from paramspec.studies.sweep import Study


def print_models(specs: Sequence[ModelSpec]) -> None:
    """A table of entries of the registry."""
    from paramspec.models.checkpoints import is_on_disk

    show(
        {
            "id": spec.id,
            "family": spec.family,
            "generation": spec.generation,
            "released": f"{spec.released:%Y-%m}" if spec.released else "",
            "sets": ", ".join(spec.sets),
            "source": spec.source.label,
            "parameters": count_of(spec.parameters),
            "MMLU": f"{spec.mmlu.score:.1f}" if spec.mmlu else "",
            "gated": "yes" if spec.gated else "no",
            "on disk": "yes" if is_on_disk(spec) else "no",
        }
        for spec in specs
    )
    if any(spec.gated for spec in specs):
        print("gated: ask for access at https://huggingface.co/SOURCE, then run `hf auth login`")


def print_counts(asked: list[Question]) -> None:
    """A table of the number of concepts in each domain and tier."""
    from paramspec.specwiki import questions_digest

    concepts = {(question.domain, question.tier, question.concept) for question in asked}
    rows = []
    for domain in (*sorted({domain for domain, _, _ in concepts}), "all"):
        found = Counter(tier for d, tier, _ in concepts if domain in (d, "all"))
        rows.append({"domain": domain} | {tier: found[tier] for tier in TIERS})
        rows[-1]["all"] = found.total()
    show(rows)
    print(f"{len(asked)} questions on {len(concepts)} concepts, SHA-256 {questions_digest(asked)}")


def print_plan(planned: Plan, others: Sequence[str]) -> None:
    """Tables of models and chapters, the training of micro models, and the totals."""
    on_cpu = planned.gpu.name == "cpu"
    unit = "hours" if on_cpu else "GPU-hours"
    place = "this CPU" if on_cpu else f"one {planned.gpu.name}"
    on = f"on {place} at {planned.utilisation:.3%}".replace(".000%", " %")
    models = planned.models
    show(
        (
            {
                "model": row["model"],
                "parameters": count_of(row["parameters"]),
                "weights": bytes_of(row["weights"]),
                "on disk": "yes" if row["on_disk"] else "no",
                "GPUs": "" if on_cpu else row["gpus"],
                "tokens": f"{row['tokens']:,}",
                "FLOPs": f"{row['flops']:.2e}",
                unit: hours_of(row["gpu_hours"]),
                "tokens counted by": row["tokenizer"],
            }
            for row in models.to_dict("records")
        ),
        f"Models, {on}; what chapters share counts once",
    )
    show(
        (
            {
                "chapter": row["chapter"],
                "models": row["models"],
                "concepts": row["concepts"],
                "tokens": f"{row['tokens']:,}",
                "FLOPs": f"{row['flops']:.2e}",
                unit: hours_of(row["gpu_hours"]),
                "shared with one above": f"{row['shared']:.0%}",
            }
            for row in planned.chapters.to_dict("records")
        ),
        "Chapters, each by itself",
    )
    if len(planned.training):
        print(
            f"To train first: {len(planned.training)} micro models, "
            f"{planned.training['tokens'].sum():,} tokens, "
            f"{hours_of(planned.training['core_hours'].sum())} core-hours on this CPU"
        )
    print(
        "Results in the store are not looked up. Hours are FLOPs at that share of the peak; "
        "loading and downloading come on top, and micro models are bound by overhead."
    )
    if others:
        print(f"Not planned: {', '.join(others)}.")
    most = planned.chapters["concepts"].max()
    print(
        f"In all: {len(models)} models, {most} concepts: {hours_of(planned.gpu_hours)} {unit} {on}"
    )


def print_study(study: Study) -> None:
    """A table a model: accuracies and PSS with intervals at each mask and ratio, and the peaks."""
    from paramspec.stats.summary import peak_pss, summarize

    for model, part in summarize(study.pss).groupby("model", sort=False):
        rows = part.to_dict("records")
        show(
            (
                {
                    "mask": row["mask"],
                    "ratio": f"{row['ratio']:g}",
                    "C(k)": _interval(row, "concept_accuracy"),
                    "G(k)": _interval(row, "general_accuracy"),
                    "PSS pooled": _interval(row, "pss_pooled"),
                    "diff. in diff.": _interval(row, "did"),
                    "PSS per concept": _interval(row, "pss_per_concept"),
                    "floor pooled": f"{row['floor_pooled']:.3f}",
                    "floor per concept": f"{row['floor_per_concept']:.3f}",
                }
                for row in rows
            ),
            f"{model}: {rows[0]['concepts']} concepts, protocol {rows[0]['protocol']}",
            "in brackets: 95 % bootstrap intervals over concepts; floor: sampling alone",
        )
    for row in peak_pss(study.pss).to_dict("records"):
        print(
            f"{row['model']}, mask {row['mask']}: "
            f"peak PSS pooled {_interval(row, 'peak_pooled')} at ratio {row['ratio']:g}, "
            f"per concept {_interval(row, 'peak_per_concept')}"
        )


def _interval(row: Mapping[str, float], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def count_of(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def bytes_of(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def hours_of(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.1g}"


def show(
    rows: Iterable[Mapping[str, object]], title: str | None = None, caption: str | None = None
) -> None:
    """A table of rows that have the same columns; what holds a digit stands on the right.

    Texts are as they stand: in a name, `[bold]` and `:cat:` are no markup. In a pipe there is no
    width to fit into, and a cut cell helps nobody.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for place, name in enumerate(rows[0] if rows else ()):
        texts = [str(row[name]) for row in rows]
        numbers = place > 0 and all(text[:1].isdigit() for text in texts if text)
        table.add_column(name, justify="right" if numbers else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*map(str, row.values()))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
