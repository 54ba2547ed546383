"""The command `paramspec`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from paramspec.errors import InputError

app = typer.Typer(
    name="paramspec",
    help="Measure how language models store knowledge in MLP value vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class PairsCommand(TyperCommand):
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
    from paramspec import book

    try:
        given = book.parse_assignments(parameter or [])
        book.run_chapter(chapter, given, profile=profile, target=out, force=force)
    except book.ChapterFailed as error:
        _fail(error, 3)


@app.command()
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
    from paramspec import book

    try:
        book.build(profile=profile, out=out, force=force)
    except book.ChapterFailed as error:
        _fail(error, 3)
    except book.SiteFailed as error:
        _fail(error, 4)


@app.command()
def models(
    chosen: Annotated[
        str | None,
        typer.Option("--set", help="Only one set: twenty, scale, pretraining or causal."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every field.")] = False,
) -> None:
    """List the registry: what MODEL arguments may say, and which models are on this disk."""
    import json

    from paramspec.models import is_on_disk, models_in

    specs = models_in(chosen)
    if as_json:
        rows = [spec.model_dump(mode="json") | {"on_disk": is_on_disk(spec)} for spec in specs]
        print(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for title in ("id", "family", "generation", "released", "sets", "source"):
        table.add_column(title, no_wrap=title == "id")
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
            f"{spec.parameters / 1e9:.2f} B",
            f"{spec.mmlu.score:.1f}" if spec.mmlu else "",
            "yes" if spec.gated else "no",
            "yes" if is_on_disk(spec) else "no",
        )
    # In a pipe there is no width to fit into, and a cut cell helps nobody.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _fail(error: Exception, status: int) -> None:
    print(f"paramspec: error: {error}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit status 2."""
    try:
        app()
    except InputError as error:
        print(f"paramspec: error: {error}", file=sys.stderr)
        sys.exit(2)
