"""The command `paramspec`. Every failure is one line on standard error."""

from __future__ import annotations

import functools
import io
import json
import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand
from typer.exceptions import TyperException

import paramspec
from paramspec import options
from paramspec.errors import InputError, printable

DOWN_PROJECTION = "PARAMSPEC_DOWN_PROJECTION"  # `hooks.OWN`, which takes seconds to import


def name_down_projection(name: str | None) -> None:
    """Workers of this command see it, too."""
    if name is not None:
        os.environ[DOWN_PROJECTION] = name


class Command(TyperCommand):
    """A command whose `-p NAME VALUE` takes two words, which Typer's repeated options cannot.

    The two are joined before Typer reads them.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], list(args)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            if word in ("-p", "--parameter") and rest:
                name = rest.pop(0)
                joined.append(f"{name}={rest.pop(0)}" if "=" not in name and rest else name)
        return super().parse_args(ctx, joined)


app = typer.Typer(
    name="paramspec",
    help="Measure how language models store knowledge in MLP value vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
TRACEBACK = "--traceback, or PARAMSPEC_TRACEBACK=1: show where an error came from."
command = functools.partial(app.command, cls=Command, epilog=TRACEBACK)


@command()
def run(
    chapter: Annotated[str, Argument(help="3-masking, 3, or book/3-masking.md.")],
    parameter: options.Parameters = None,
    profile: options.Profile = "default",
    out: Annotated[Path | None, Option(help="The notebook to write (.ipynb).")] = None,
    force: options.Force = False,
) -> None:
    """Run one chapter. The exit status is 2 for bad input, 3 if the chapter fails.

    With -p, the result goes to results/runs/, and the book's copy stays.
    """
    from paramspec_book import book
    from paramspec_book.parameters import parse_assignments

    given = parse_assignments(parameter or [])
    book.run_chapter(chapter, given, profile=profile, target=out, force=force)


@command()
def build(
    profile: options.Profile = "default",
    out: Annotated[Path | None, Option(help="A directory for copies and _build/html.")] = None,
    force: options.Force = False,
) -> None:
    """Run every chapter, then build the site. Exit status: 3 if a chapter fails, 4 if the site."""
    from paramspec_book import book

    book.build(profile=profile, out=out, force=force)


@command()
def models(
    chosen: Annotated[str | None, Option("--set", help="twenty, scale, zoo, ...; or all.")] = None,
    as_json: options.AsJson = False,
    verify: Annotated[
        str | None, Option(metavar="MODEL", help="Load a model, check its value vectors, and stop.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    down_projection: options.DownProjection = None,
) -> None:
    """List the registry: the names of models, and whether they are on this disk; or check one."""
    from paramspec import report
    from paramspec.models.checkpoints import is_on_disk
    from paramspec.models.registry import models_in

    if verify is not None:
        name_down_projection(down_projection)
        report.print_verified(paramspec.load_model(verify, dtype=dtype, device=device))
        return
    specs = models_in(chosen)
    if as_json:
        rows = [spec.model_dump(mode="json") | {"on_disk": is_on_disk(spec)} for spec in specs]
        print(json.dumps(rows, indent=2))
    else:
        report.print_models(specs)


@command()
def questions(
    init: Annotated[Path | None, Option(help="Write an example with comments here.")] = None,
    validate: Annotated[str | None, Option(help="Check a file or data set, then stop.")] = None,
    export_lm_eval: Annotated[Path | None, Option(help="Write a task of lm-eval here.")] = None,
    show: Annotated[str | None, Option(help="Print one question: france/capital.")] = None,
    concept: Annotated[str | None, Option(help="Print a concept's questions.")] = None,
    questions: options.Questions = None,
    columns: options.Columns = "",
    skip_invalid: options.SkipInvalid = False,
    push_to_hub: options.PushToHub = None,
) -> None:
    """Print, check or export questions; without an option, count them by domain and tier."""
    from paramspec import report, specwiki
    from paramspec.publish import publish_questions
    from paramspec.specwiki.questions import choose, describe, read_questions

    if init is not None:
        specwiki.write_example(init)
        place = shlex.quote(str(init))
        print(f"{place}: edit it, then: paramspec questions --validate {place}")
        return
    if validate is not None:
        read = read_questions(validate, columns)
        if len(read.problems) > 1 or skip_invalid:
            print("".join(f"{problem}\n" for problem in read.problems), end="")
        if len(read.problems) > 1 and not skip_invalid:
            raise InputError(
                f"{validate}: {len(read.problems)} problems, listed above; mend them, or leave "
                "these rows out with --skip-invalid"
            )
        if read.assumed:
            print(f"{validate}: {read.assumed}")
    with warnings.catch_warnings():
        if validate is not None:
            warnings.simplefilter("ignore")  # of what is printed above
        source = {"columns": columns, "skip_invalid": skip_invalid}
        asked = paramspec.load_questions(questions or validate, concepts=concept, **source)
    if push_to_hub is not None:
        print(f"Published: {publish_questions(asked, push_to_hub)}")
    elif export_lm_eval is not None:
        task = specwiki.export_lm_eval(export_lm_eval, asked)
        place = shlex.quote(str(task.parent))
        print(f"{task}: lm_eval --model hf --tasks specwiki --include_path {place} ...")
    elif show is not None or concept is not None:
        shown = choose(asked, "id", show, "--show")
        print("\n\n".join(describe(question) for question in shown))
    else:
        report.print_counts(asked)


@command()
def pss(
    model: Annotated[list[str], Argument(metavar="MODEL...", help=options.MODEL)],
    questions: options.Questions = None,
    columns: options.Columns = "",
    skip_invalid: options.SkipInvalid = False,
    concepts: options.Concepts = None,
    prompt: options.Prompt = "cloze",
    shots: options.Shots = 0,
    chat_template: options.ChatTemplate = False,
    ratios: options.Ratios = "0.01,0.02,0.05,0.1,0.2",
    position: options.Position = "mean",
    scope: options.Scope = "layer",
    spared: options.Spared = 0.0,
    ablation: options.Ablation = "zero",
    protocol: options.Protocol = "paper",
    controls: options.Controls = 1,
    general: options.General = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    jobs: options.Jobs = 1,
    scheduler: options.Scheduler = None,
    out: options.Results = Path("results/pss"),
    store: options.Finished = Path("results/store"),
    down_projection: options.DownProjection = None,
    push_to_hub: options.PushToHub = None,
    plan: options.OnlyPlan = False,
) -> None:
    """Measure the parameter specialization score (PSS) of models, with nulls and intervals.

    Prints a table and writes pss.parquet, details.parquet, masks.safetensors, run.json and the
    questions; `paramspec report` makes a page of them.
    """
    from paramspec import report
    from paramspec.models.registry import expand_models
    from paramspec.publish import publish_run
    from paramspec.studies import asked

    name_down_projection(down_projection)
    names = expand_models(model)
    source = {"columns": columns, "skip_invalid": skip_invalid}
    form: dict[str, Any] = {"prompt": prompt, "shots": shots, "seed": seed}
    put, told = asked.questions_of(names, questions, concepts, source, **form)
    given = {"ratios": ratios, "position": position, "scope": scope, "protocol": protocol}
    sizes = {"spared": spared, "controls": controls, "general": general, "seed": seed}
    how: dict[str, Any] = {**given, **sizes, "ablation": ablation, "chat": chat_template}
    choices = asked.choices_of(names, put, **how)
    if plan:
        report.print_plan(asked.plan_of(names, put, choices, dtype=dtype, device=device), [])
        return
    with paramspec.workers(jobs, scheduler):
        where = {"dtype": dtype, "device": device}
        study = asked.measure(names, put, choices, out, paramspec.Store(store), told, **where)
    report.print_study(study)
    if push_to_hub is not None:
        print(f"Published: {publish_run(out, push_to_hub)}")
    print(f"Written to {out}/. To look at it: paramspec report {shlex.quote(str(out))}")


@command()
def report(
    folder: Annotated[Path, Argument(help="Of a run of pss or finetune.")] = Path("results/pss"),
    out: Annotated[
        Path | None, Option(help="The file to write; in the folder if not given.")
    ] = None,
) -> None:
    """Make one HTML file of a run: what was found, in words, figures and tables."""
    from paramspec_book import run_report

    page = out or folder / "report.html"
    run_report.use_report_style()
    run_report.write_report(folder, page)
    print(f"Written: {page}")


@command()
def compare(
    first: Annotated[Path, Argument(help="The folder of a run of pss.")],
    second: Annotated[Path, Argument(help="That of another, on the same questions.")],
    out: Annotated[Path | None, Option(help="An HTML file of the comparison.")] = None,
) -> None:
    """Compare two runs of pss, paired by question: the second minus the first, with intervals."""
    from paramspec import report
    from paramspec_book import run_report

    run_report.use_report_style()
    for names, table in run_report.write_comparison(first, second, out).items():
        sides = [f"{name} ({folder})" for name, folder in zip(names, (first, second), strict=True)]
        report.print_comparison(table, *sides)
    if out is not None:
        print(f"Written: {out}")


@command()
def finetune(
    model: Annotated[str, Argument(help=options.MODEL)],
    method: options.Method,
    out: options.Tuned,
    concept: options.TrainedConcepts = None,
    questions: options.Questions = None,
    columns: options.Columns = "",
    texts: options.Texts = None,
    window: options.Window = None,
    share: options.TrainedShare = 0.125,
    rule: options.Rule = "coefficient",
    layers: options.Layers = None,
    statements: options.Statements = 4,
    epochs: options.Epochs = 3,
    batch: options.Batch = None,
    learning_rate: options.Rate = 1e-3,
    seed: options.Seed = 0,
    save_every: options.SaveEvery = 50,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    down_projection: options.DownProjection = None,
) -> None:
    """Fine-tune chosen value vectors on statements or texts about concepts; other weights stay.

    The result is an ordinary transformers directory. A killed run continues when called again.
    """
    from paramspec import report
    from paramspec.studies import finetune as tuning
    from paramspec.studies.texts import read_texts, warn_of_wordings

    name_down_projection(down_projection)
    asked = paramspec.load_questions(questions, columns=columns)
    read = read_texts(texts) if texts is not None else None
    if read is not None:
        warn_of_wordings({name: read[name] for name in concept or read if name in read}, asked)
    vectors = {"method": method, "share": share, "rule": rule, "layers": layers, "seed": seed}
    batch = batch or (2 if read else 16)
    steps = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate}
    training = paramspec.Training.parse(
        concepts=concept or list(read or ()), statements=statements, **vectors, **steps
    )
    record = tuning.finetune(
        model,
        asked,
        training,
        out,
        dtype=dtype,
        device=device,
        save_every=save_every,
        texts=read,
        window=window,
    )
    losses = record["losses"]
    print(
        f"{out}/: {method} of {model} on {len(training.concepts)} concepts; "
        f"{record['vectors']:,} value vectors trained in {len(losses)} steps, "
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} nats per token; "
        f"optimizer state {report.bytes_of(record['optimizer_bytes'])}"
    )
    print(f"Measure it: paramspec pss {shlex.quote(f'{out}/')}")


@command()
def plan(
    chapter: Annotated[list[str] | None, Argument(help="Chapters, as run takes; or all.")] = None,
    profile: options.Profile = "default",
    parameter: options.Parameters = None,
    gpu: options.Gpu = "A100 80GB",
    utilisation: Annotated[
        float, options.real("Share of the GPU's peak that is reached, up to 1.")
    ] = 0.3,
    as_json: options.AsJson = False,
) -> None:
    """Estimate a profile's cost: weights, tokens, FLOPs, hours. Runs and downloads nothing."""
    from paramspec import report
    from paramspec.studies.chapters import CHAPTERS
    from paramspec.studies.cost import plan as make_plan
    from paramspec_book.parameters import parse_assignments, planned_values

    given = parse_assignments(parameter or [])
    values, others = planned_values(profile, chapter or (), given, CHAPTERS)
    asked = {name: CHAPTERS[name](own) for name, own in values.items()}
    planned = make_plan(asked, gpu=gpu, utilisation=utilisation)
    if as_json:
        print(json.dumps(planned.as_dict(), indent=2))
    else:
        report.print_plan(planned, others)


@command()
def verdicts(
    folder: Annotated[Path, Argument(help="Executed copies of chapters.")] = Path("book/_executed"),
) -> None:
    """Compute every verdict once more, from the answers that executed chapters keep, and compare.

    Nothing is run, no model is needed. The status is 1 if a verdict is another than its chapter's.
    """
    from paramspec import report
    from paramspec.stats.recheck import recheck

    found = recheck(folder)
    report.show(found)
    differ = found[found["agrees"] == "no"]
    if len(differ):
        line = f"paramspec: {', '.join(differ['claim'])}: another verdict than the chapter's"
        print(line, file=sys.stderr)
        raise typer.Exit(1)


def _format_warning(
    message: object, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package in one line, as errors are; of a library, as Python shows it."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"paramspec: warning: {printable(message)}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def main() -> None:
    """Run the command line; a failure is one line on standard error and the exit status.

    The status is 2 for bad input, and 1, with a traceback, for a bug of this package. `--traceback`
    anywhere, or PARAMSPEC_TRACEBACK=1, shows the traceback of any failure, with its causes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a question mark for what the terminal lacks
    words = [word for word in sys.argv[1:] if word != "--traceback"]
    shown = len(words) < len(sys.argv) - 1 or os.environ.get("PARAMSPEC_TRACEBACK", "0") != "0"
    before, warnings.formatwarning = warnings.formatwarning, _format_warning
    named = os.environ.get(DOWN_PROJECTION)
    try:
        status = app(words or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("paramspec: interrupted; finished work is kept", file=sys.stderr)
        status = 130
    except Exception as error:
        status, line = _status_and_line(error)
        if shown or status == 1:
            traceback.print_exception(error)
        print(f"paramspec: {printable(line)}", file=sys.stderr)
    finally:
        warnings.formatwarning = before
        os.environ.pop(DOWN_PROJECTION, None)
        os.environ |= {DOWN_PROJECTION: named} if named else {}
    sys.exit(status)


def _status_and_line(error: Exception) -> tuple[int, str]:
    """The exit status of a failure, and the line that reports it."""
    if isinstance(error, TyperException):
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return 2, f"error: {message.replace('Value error, ', '')} (see --help)"
    if hasattr(error, "exit_status"):
        return error.exit_status, f"error: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name and "paramspec" not in error.name:
        place = "in the book's checkout: pip install '.[book]'"
        return 2, f"error: this command needs {error.name}, which is not installed; {place}"
    name = type(error).__name__
    return 1, f"internal error ({name}): please report the traceback; finished work is kept"
