"""Texts that others wrote, on a terminal and on a page: no character of them is markup.

    print(printable(message))            # one line, whatever stands in a path
    Markdown(f"{in_markdown(model)} answers")

In a table of the command line no text is markup (`report.show`); in a figure, and in a DataFrame
on a page, see `figures.use_book_style`.
"""

from __future__ import annotations

import io
import re
import sys

STRICT = ("strict", "surrogateescape")  # ways to meet what an encoding lacks that raise
# ASCII that Markdown, MyST's roles, tables and mathematics, or HTML give a meaning within a line.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~$&^@!%+:\"'-])")


def in_markdown(text: object) -> str:
    """`in_markdown("a_b|c")`: `a\\_b\\|c`, which Markdown shows as `a_b|c`, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def printable(text: object) -> str:
    """`printable(error)`: line ends, control characters and broken Unicode as `\\n`, `\\x1b`."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def print_with_replacements() -> None:
    """Print a question mark for what the terminal's encoding lacks, in place of ending in an error.

    Standard error does so from the start.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in STRICT:
            stream.reconfigure(errors="replace")
