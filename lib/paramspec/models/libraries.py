"""transformers without its bars and reports, and errors of libraries in one line.

with quiet_transformers(), told_in_one_line(path):
    AutoTokenizer.from_pretrained(path)
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from paramspec.errors import InputError


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """`with quiet_transformers(): ...`: no progress bars and warnings of transformers."""
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
    """`with told_in_one_line(path): ...`: an InputError for what a library raises on bad files.

    Libraries raise errors of any class there, tokenizers a bare Exception. What is raised elsewhere
    is a fault of this package, and is shown as it is.
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
            "is a complete, supported causal language model, and that there is memory for it"
        ) from error


def line_of(error: object) -> str:
    """`line_of(error)`: a message in one line, shortened to fit into ours."""
    line = " ".join(str(error).split()) or "no message"
    return line if len(line) <= 240 else f"{line[:237]}..."
