"""The command `paramspec`."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from typer.core import TyperCommand
from typer.exceptions import TyperException

from paramspec.errors import InputError
from paramspec.markup import print_with_replacements, printable
from paramspec.plain import integer, number

if TYPE_CHECKING:
    from rich.console import Console

    from paramspec.specwiki import Question
    from paramspec.studies.plan import Plan
    from paramspec.studies.sweep import Study

app = typer.Typer(
    name="paramspec",
    help="Measure how language models store knowledge in MLP value vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Command(TyperCommand):
    """A command whose help names the option that `main` takes for all of them."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.epilog = "--traceback, or PARAMSPEC_TRACEBACK=1: show where an error came from."


class PairsCommand(Command):
    """A command whose option `-p NAME VALUE` takes two words, as papermill's does.

    Typer has no repeated option of two words, so the two are joined before it reads them.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        joined, rest = [], list(args)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            if word in ("-p", "--parameter") and rest:
                name = rest.pop(0)
                joined.append(f"{name}={rest.pop(0)}" if "=" not in name and rest else name)
        return super().parse_args(ctx, joined)


@app.command(cls=PairsCommand)
def run(
    chapter: Annotated[str, typer.Argument(help="3-masking, 3, or book/3-masking.md.")],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME VALUE",
            help="A parameter of the chapter, its value as YAML; may be repeated. "
            "The result goes to results/runs/, and the book's copy stays as it is.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="A profile of book/profiles, or a YAML file.")
    ] = "default",
    out: Annotated[Path | None, typer.Option(help="The notebook to write (.ipynb).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run even if nothing changed.")] = False,
) -> None:
    """Run one chapter. Exit status 2 for bad input, 3 when the chapter fails."""
    from paramspec_book import book

    given = book.parse_assignments(parameter or [])
    book.run_chapter(chapter, given, profile=profile, target=out, force=force)


@app.command(cls=Command)
def build(
    profile: Annotated[
        str, typer.Option(help="A profile of book/profiles, or a YAML file.")
    ] = "default",
    out: Annotated[
        Path | None,
        typer.Option(help="Put executed copies and _build/html here, not into the checkout."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run even if nothing changed.")] = False,
) -> None:
    """Run every chapter, then build the site.

    Exit status 2 for bad input, 3 when a chapter fails, 4 when the site does.
    """
    from paramspec_book import book

    book.build(profile=profile, out=out, force=force)


@app.command(cls=Command)
def models(
    chosen: Annotated[
        str | None,
        typer.Option(
            "--set", help="Only one set: twenty, scale, pretraining, causal, zoo, zoo-scale, ..."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every field.")] = False,
) -> None:
    """List the registry: what MODEL arguments may say, and which models are on this disk."""
    import json

    from paramspec.models.registry import is_on_disk, models_in

    specs = models_in(chosen)
    if as_json:
        rows = [spec.model_dump(mode="json") | {"on_disk": is_on_disk(spec)} for spec in specs]
        print(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    if any(spec.gated for spec in specs):
        table.caption = (
            "gated: ask for access at https://huggingface.co/SOURCE, then run `hf auth login`"
        )
    for title in ("id", "family", "generation", "released", "sets", "source"):
        table.add_column(title, no_wrap=title in ("id", "generation"))
    for title in ("parameters", "MMLU"):
        table.add_column(title, justify="right")
    for title in ("gated", "on disk"):
        table.add_column(title)
    for spec in specs:
        table.add_row(
            spec.id,
            spec.family,
            spec.generation,
            f"{spec.released:%Y-%m}" if spec.released else "",
            ", ".join(spec.sets),
            spec.source.label,
            _count(spec.parameters),
            f"{spec.mmlu.score:.1f}" if spec.mmlu else "",
            "yes" if spec.gated else "no",
            "yes" if is_on_disk(spec) else "no",
        )
    _console().print(table)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


@app.command(cls=Command)
def questions(
    validate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check a question file of your own, then stop."),
    ] = None,
    export_lm_eval: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a task that lm-evaluation-harness runs."),
    ] = None,
    show: Annotated[
        str | None, typer.Option(metavar="ID", help="Print one question, such as france/capital.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print the questions of one concept.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--questions", help="A question file; SpecWiki if not given.")
    ] = None,
) -> None:
    """Print, check or export questions; with no option, count SpecWiki by domain and tier."""
    from paramspec import specwiki

    if validate is not None:
        problems = specwiki.validate(validate)
        if len(problems) > 1:
            print("\n".join(problems))
            raise InputError(f"{validate}: {len(problems)} problems, listed above; mend them")
        if problems:
            raise InputError(problems[0])
        file = file or validate
    asked = specwiki.load_questions(file, concepts=concept)
    if export_lm_eval is not None:
        task = specwiki.export_lm_eval(export_lm_eval, asked)
        place = shlex.quote(str(task.parent))
        print(f"{task}: lm_eval --model hf --tasks specwiki --include_path {place} ...")
    elif show is not None:
        print(specwiki.describe(specwiki.find(asked, show)))
    elif concept is not None:
        print("\n\n".join(specwiki.describe(question) for question in asked))
    else:
        _print_counts(asked)


def _print_counts(asked: list[Question]) -> None:
    """A table of the number of concepts in each domain and tier."""
    from collections import Counter

    from rich import box
    from rich.table import Table

    from paramspec.specwiki import TIERS, questions_digest

    concepts = {(question.domain, question.tier, question.concept) for question in asked}
    domains = sorted({domain for domain, _, _ in concepts})
    table = Table(box=box.SIMPLE)
    for title in ("domain", *TIERS, "all"):
        table.add_column(title, justify="left" if title == "domain" else "right")
    for domain in (*domains, "all"):
        found = Counter(tier for d, tier, _ in concepts if domain in (d, "all"))
        table.add_row(domain, *(str(found[tier]) for tier in TIERS), str(found.total()))
    _console().print(table)
    print(f"{len(asked)} questions on {len(concepts)} concepts, SHA-256 {questions_digest(asked)}")


@app.command(cls=Command)
def pss(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Registry ids (see `paramspec models`), hub ids, local directories, GGUF files.",
        ),
    ],
    questions: Annotated[
        Path | None, typer.Option(help="Your own questions, JSON lines; SpecWiki if not given.")
    ] = None,
    concepts: Annotated[
        int | None,
        typer.Option(
            parser=integer, help="How many concepts, evenly over the tiers; all if not given."
        ),
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Mask ratios: shares of the value vectors, separated by commas.")
    ] = "0.01,0.02,0.05,0.1,0.2",
    position: Annotated[
        str, typer.Option(help="Coefficients of the prompt's tokens: mean over all, or last.")
    ] = "mean",
    scope: Annotated[
        str, typer.Option(help="Choose value vectors in each layer, or over the whole model.")
    ] = "layer",
    protocol: Annotated[
        str,
        typer.Option(
            help="paper: choose and score on the same questions; "
            "holdout: choose on fold 0, score on fold 1."
        ),
    ] = "paper",
    controls: Annotated[
        int,
        typer.Option(parser=integer, help="Draws of each control mask: random, magnitude, other."),
    ] = 1,
    general: Annotated[
        int,
        typer.Option(
            parser=integer, help="Unrelated questions that a concept's masks are scored on."
        ),
    ] = 10,
    seed: Annotated[
        int, typer.Option(parser=integer, help="Of concepts, general questions and controls.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[
        int,
        typer.Option(
            parser=integer, help="Processes side by side; 0 for one a GPU, or else one a core."
        ),
    ] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Dask scheduler, as tcp://host:8786, whose workers do the work; "
            "they share this directory.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where pss.parquet, details.parquet, masks and run.json go.")
    ] = Path("results/pss"),
    store: Annotated[
        Path, typer.Option(help="Where finished units are kept: a rerun continues from there.")
    ] = Path("results/store"),
) -> None:
    """Measure the parameter specialization score (PSS) of models, with nulls and intervals.

    Prints a table and writes pss.parquet, details.parquet, masks.safetensors and run.json.
    """
    from paramspec.execution.parallel import workers
    from paramspec.execution.store import Store, require_writable
    from paramspec.method.pss import parse_choices
    from paramspec.models.registry import expand_models, study_questions, taught
    from paramspec.specwiki import load_questions
    from paramspec.studies.sweep import measure_pss, write_study

    choices = parse_choices(
        ratios=ratios,
        position=position,
        scope=scope,
        protocol=protocol,
        controls=controls,
        general=general,
        seed=seed,
    )
    names = expand_models(model)
    micro = any(taught(name) is not None for name in names)
    if micro and questions is None:
        asked = study_questions(names, concepts, seed)
    else:
        asked = load_questions(questions, concepts=concepts, seed=seed)
    require_writable(out)
    require_writable(store)
    with workers(jobs, scheduler):
        study = measure_pss(names, asked, choices, store=Store(store), dtype=dtype, device=device)
    write_study(study, out)
    _print_study(study)
    if micro:
        count = len({question.concept for question in asked})
        print(
            f"Micro models among these: all models were asked about {count} concepts that these "
            "were taught, and scored on fold 1, whose clozes they never read."
        )
    print(f"Written to {out}/: pss.parquet, details.parquet, masks.safetensors, run.json")


@app.command(cls=Command)
def finetune(
    model: Annotated[
        str, typer.Argument(help="A registry id, a hub id, a local directory, or a GGUF file.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="FT-FV: all value vectors; FT-PV: those with the highest coefficients; "
            "FT-CV: all but those; FT-RV: as many as FT-PV, at random."
        ),
    ],
    concepts: Annotated[
        str,
        typer.Option(
            help="One concept; several separated by commas, as 'France,gold'; or @FILE of lines."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The model's directory: new, empty, or that of the same run.")
    ],
    questions: Annotated[
        Path | None, typer.Option(help="Your own questions, JSON lines; SpecWiki if not given.")
    ] = None,
    share: Annotated[
        float,
        typer.Option(parser=number, help="Share of a layer's value vectors that FT-PV trains."),
    ] = 0.125,
    rule: Annotated[
        str,
        typer.Option(
            help="How FT-PV chooses: coefficient (the paper's), score, gradient, magnitude, other."
        ),
    ] = "coefficient",
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, from 0, as 10-19 or 0,4-6; all if not.")
    ] = None,
    statements: Annotated[
        int,
        typer.Option(
            parser=integer, help="Statements of each fact that are trained on, the first ones."
        ),
    ] = 4,
    epochs: Annotated[
        int, typer.Option(parser=integer, help="Times that each statement is seen.")
    ] = 3,
    batch: Annotated[int, typer.Option(parser=integer, help="Statements of a step.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(parser=number, help="Of AdamW, after a warm-up.")
    ] = 1e-3,
    seed: Annotated[
        int, typer.Option(parser=integer, help="Of random vectors, and the statements' order.")
    ] = 0,
    save_every: Annotated[
        int,
        typer.Option(
            parser=integer, help="Steps between two states that a killed run continues from."
        ),
    ] = 50,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fine-tune chosen value vectors on statements about concepts; all else stays as it is.

    DIR becomes an ordinary transformers directory. A killed run continues when called again.
    """
    from tqdm import tqdm

    from paramspec.specwiki import load_questions
    from paramspec.studies.finetune import finetune as tune
    from paramspec.studies.finetune import parse_training

    asked = load_questions(questions)
    training = parse_training(
        method=method,
        concepts=_names(concepts, {question.concept for question in asked}),
        share=share,
        rule=rule,
        layers=None if layers is None else _numbers(layers),
        statements=statements,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
    )
    if save_every < 1:
        raise InputError(f"save_every {save_every}: expected at least 1 step")
    # No bar before there is a step: a refusal is one line.
    with tqdm(desc=f"{method} of {model}", unit="step", delay=0.01) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        record = tune(
            model,
            asked,
            training,
            out,
            dtype=dtype,
            device=device,
            save_every=save_every,
            progress=show,
        )
    losses = record["losses"]
    print(
        f"{out}/: {method} of {model} on {len(training.concepts)} concepts; "
        f"{record['vectors']:,} value vectors trained in {len(losses)} steps, "
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} nats a token; "
        f"optimizer state {_bytes(record['optimizer_bytes'])}"
    )
    print(f"Measure it: paramspec pss {shlex.quote(f'{out}/')}")


def _names(text: str, known: set[str]) -> list[str]:
    """Concepts of an option: one of that whole name; or the lines of a file, after an @; or several
    separated by commas, of which none is part of a concept's name.

    Raises:
        InputError: for a file that cannot be read, and where commas may stand within a name.
    """
    if text in known:
        return [text]
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(
                f"concepts {text}: cannot be read ({error}); name a text file"
            ) from error
        lines = [line.removesuffix("\r") for line in lines]
        return [line if line in known else line.strip() for line in lines if line.strip()]
    parts = text.split(",")
    names = [part.strip() for part in parts if part.strip()]
    file = "give names with commas in a file, a line each, as @FILE"
    for name in sorted(concept for concept in known if "," in concept):
        size = name.count(",") + 1
        for first in range(len(parts) - size + 1):
            if ",".join(parts[first : first + size]).strip() == name:
                raise InputError(f"concepts {text!r}: {name!r} is one concept; {file}")
    for name in names if len(names) > 1 else ():
        if name not in known:
            raise InputError(
                f"concept {name!r}: no question on it; correct the name in {text!r}, or {file}"
            )
    return names


def _numbers(text: str) -> list[int]:
    """`_numbers("0,4-6")`: 0, 4, 5, 6."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = part.isascii() and first.isdecimal() and (last.isdecimal() or not dash)
        if not numbers or int(last or first) < int(first):
            raise InputError(f"layers {text!r}: expected numbers from 0 and ranges, as 0,4-6")
        found += range(int(first), int(last or first) + 1)
    return found


@app.command(cls=PairsCommand)
def plan(
    chapter: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CHAPTER]...", help="Only these, as 4-twenty-models; or all."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="A profile of book/profiles, or a YAML file.")
    ] = "default",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME VALUE",
            help="A parameter, its value as YAML, in each chapter that has it; may be repeated.",
        ),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="A100 80GB, H100, H200, L40S, L4, RTX 4090, RTX 3090, or cpu.")
    ] = "A100 80GB",
    utilisation: Annotated[
        float, typer.Option(parser=number, help="Share of the GPU's peak that is reached, up to 1.")
    ] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every field.")] = False,
) -> None:
    """What a profile costs: weights, memory, tokens, FLOPs, hours. Runs and downloads nothing."""
    import json

    from paramspec.studies.plan import plan as make_plan
    from paramspec_book import book

    given = book.parse_assignments(parameter or [])
    planned = make_plan(profile, chapter or (), given, gpu=gpu, utilisation=utilisation)
    if as_json:
        print(json.dumps(planned.as_dict(), indent=2))
    else:
        _print_plan(planned)


def _print_plan(planned: Plan) -> None:
    """A table of models, one of chapters, the training of micro models, and the totals."""
    from rich import box
    from rich.table import Table

    console, on = _console(), f"on {_article(planned.gpu)} at {100 * planned.utilisation:.3g} %"
    unit = "hours" if planned.gpu == "cpu" else "GPU-hours"
    table = Table(title=f"Models, in {planned.dtype}, {on}", box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    titles = ("parameters", "weights", "peak memory", "GPUs", "tokens", "FLOPs", unit)
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("tokenizer")
    table.add_column("on disk")
    for model in planned.models:
        table.add_row(
            model.model,
            _count(model.parameters),
            _bytes(model.disk),
            _bytes(model.memory),
            "" if planned.gpu == "cpu" else str(model.gpus),
            f"{model.tokens:,}",
            f"{model.flops:.2e}",
            _hours(model.gpu_hours),
            "its own" if model.exact else model.tokenizer,
            "yes" if model.on_disk else "no",
        )
    console.print(table)
    table = Table(title="Chapters, each by itself", box=box.SIMPLE)
    table.add_column("chapter", no_wrap=True)
    for title in ("models", "concepts", "tokens", "FLOPs", unit, "shared with one above"):
        table.add_column(title, justify="right")
    for row in planned.chapters:
        shared = f"{row.shared_flops / row.flops:.0%}"
        cells = (row.models, row.concepts, f"{row.tokens:,}", f"{row.flops:.2e}")
        table.add_row(row.chapter, *map(str, cells), _hours(row.gpu_hours), shared)
    console.print(table)
    if planned.training:
        tokens = sum(model.tokens for model in planned.training)
        spent = sum(model.flops for model in planned.training)
        hours = sum(model.core_hours for model in planned.training)
        print(
            f"To train first: {len(planned.training)} micro models, {tokens:,} tokens, "
            f"{spent:.2e} FLOPs: {_hours(hours)} core-hours on this CPU at "
            f"{100 * planned.utilisation:.3g} %"
        )
    print("\n".join(planned.notes))
    if len(planned.chapters) > 1:
        row = max(planned.chapters, key=lambda row: row.models)
        print(f"{row.chapter}: {_line_of(row.models, row.concepts, row.gpu_hours, planned)}")
    most = max(row.concepts for row in planned.chapters)
    print(f"In all: {_line_of(len(planned.models), most, planned.gpu_hours, planned)}")


def _line_of(models: int, concepts: int, hours: float, planned: Plan) -> str:
    unit = "hours" if planned.gpu == "cpu" else "GPU-hours"
    on = f"on {_article(planned.gpu)} at {100 * planned.utilisation:.3g} %"
    return f"{models} model{'s' * (models != 1)}, {concepts} concepts: {_hours(hours)} {unit} {on}"


def _article(gpu: str) -> str:
    if gpu == "cpu":
        return "this CPU"
    return f"an {gpu}" if gpu[0] in "AHLR" else f"a {gpu}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.1g}"


def _print_study(study: Study) -> None:
    """A table a model: accuracies and PSS with intervals at each mask and ratio, and the peaks."""
    from rich.table import Table

    from paramspec.stats.summary import peak_pss, summarize

    console = _console()
    columns = ["concept_accuracy", "general_accuracy", "pss_pooled", "did", "pss_per_concept"]
    titles = ["C(k)", "G(k)", "PSS pooled", "diff. in diff.", "PSS per concept"]
    for model, part in summarize(study.pss).groupby("model", sort=False):
        protocol, concepts = part["protocol"].iloc[0], part["concepts"].iloc[0]
        table = Table(
            title=f"{model}: {concepts} concepts, protocol {protocol}",
            caption="in brackets: 95 % bootstrap intervals over concepts; floor: sampling alone",
        )
        table.add_column("mask")
        for title in ("ratio", *titles, "floor pooled", "floor per concept"):
            table.add_column(title, justify="right")
        for row in part.to_dict("records"):
            cells = [_interval(row, column) for column in columns]
            floors = [f"{row['floor_pooled']:.3f}", f"{row['floor_per_concept']:.3f}"]
            table.add_row(row["mask"], f"{row['ratio']:g}", *cells, *floors)
        console.print(table)
    for row in peak_pss(study.pss).to_dict("records"):
        console.print(
            f"{row['model']}, mask {row['mask']}: "
            f"peak PSS pooled {_interval(row, 'peak_pooled')} at ratio {row['ratio']:g}, "
            f"per concept {_interval(row, 'peak_per_concept')}"
        )


def _interval(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _console() -> Console:
    """Texts as they stand: in a name, `[bold]` and `:cat:` are no markup.

    In a pipe there is no width to fit into, and a cut cell helps nobody.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(width=width, markup=False, emoji=False, highlight=False)


def _format_warning(message, category, filename, lineno, line=None) -> str:
    """Ours in one line, as errors are; a library's as Python shows it."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"paramspec: warning: {printable(message)}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def main() -> None:
    """Run the command line; a failure is one line on standard error and the exit status.

    Bad input is status 2, a bug of this package 1 with a traceback. `--traceback` anywhere among
    the words, or PARAMSPEC_TRACEBACK=1, shows the traceback of every failure, causes included.
    """
    print_with_replacements()
    words = [word for word in sys.argv[1:] if word != "--traceback"]
    shown = len(words) < len(sys.argv) - 1 or os.environ.get("PARAMSPEC_TRACEBACK", "0") != "0"
    before, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        status = app(words or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("paramspec: interrupted; finished work is kept", file=sys.stderr)
        status = 130
    except Exception as error:
        status, line = _told(error)
        if shown or status == 1:
            traceback.print_exception(error)
        print(f"paramspec: {printable(line)}", file=sys.stderr)
    finally:
        warnings.formatwarning = before
    sys.exit(status)


def _told(error: Exception) -> tuple[int, str]:
    """The exit status of a failure, and the line that tells it."""
    if isinstance(error, TyperException):
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if isinstance(error.__cause__, ValidationError):  # its message leaves the value out
            message = message.replace("Value error, ", "")
            message += f": {error.__cause__.errors()[0]['input']!r}"
        return 2, f"error: {message} (see --help)"
    if hasattr(error, "exit_status"):
        return error.exit_status, f"error: {error}"
    name = type(error).__name__
    return 1, f"internal error ({name}): please report the traceback; finished work is kept"


if __name__ == "__main__":
    main()
