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
