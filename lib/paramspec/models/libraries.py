"""transformers without its bars and reports, and errors of libraries in one line."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from paramspec.errors import InputError


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """`with quiet_transformers(): ...`: no progress bars, and no warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """`with told_in_one_line(path): ...`: an error of a library on bad files is an InputError.

    Libraries raise errors of any class, tokenizers a bare Exception; an error that this package
    raises is its own fault, and is shown as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        file = Path(frame.f_code.co_filename)
        ours = "site-packages" not in file.parts or Path(__file__).parents[1] in file.parents
        known = OSError | ValueError | KeyError | RuntimeError | ImportError | MemoryError
        if ours and not isinstance(error, known):
            raise
        raise InputError(
            f"{path}: cannot be loaded ({type(error).__name__}: {line_of(error)}); check that it "
            "is a complete model of a supported kind, and that there is memory for it"
        ) from error


def line_of(error: object) -> str:
    """An error's message in one line, shortened to fit into ours."""
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= 240 else f"{line[:237]}..."
