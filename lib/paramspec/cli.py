"""The command `paramspec`."""

from __future__ import annotations

import sys

import typer

from paramspec.errors import InputError

app = typer.Typer(
    name="paramspec",
    help="Measure how language models store knowledge in MLP value vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit status 2."""
    try:
        app()
    except InputError as error:
        print(f"paramspec: error: {error}", file=sys.stderr)
        sys.exit(2)
