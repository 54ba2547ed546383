"""The one exception for input that a user can correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one line that names the value, the place and the remedy.

    >>> load_questions(concepts=0)
    Traceback (most recent call last):
    paramspec.errors.InputError: ...questions.jsonl: 0 concepts asked for; choose from 1 to 525

    The command line prints the message without a traceback, and exits with `exit_status`.
    """

    exit_status = 2


@contextmanager
def naming(name: str) -> Iterator[None]:
    """`with naming("smollm2-135m"): ...`: an InputError within begins with the name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def printable(text: object) -> str:
    """A message in one line; control characters and broken Unicode as `\\n`, `\\x1b`."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )
