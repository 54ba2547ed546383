"""Files that are written whole or not at all, and one line where that is not possible.

with atomic(path) as scratch:
    table.to_parquet(scratch)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from paramspec.errors import InputError
from paramspec.plain import require_unicode

PARTIAL = ".partial-"  # how the name of an unfinished file or folder begins
OLD = 24 * 3600  # seconds after which it is certain to be a dead process's


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """`with atomic(path) as scratch: ...`: fill a new file, which replaces `path` when it is whole.

    A failed write is an InputError, and the old file stays.
    """
    scratch = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with writing_to(path.parent):
        try:
            yield scratch
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = f"{PARTIAL}*") -> None:
    """Remove unfinished files and folders that are certainly of a dead process."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            if left.stat().st_mtime < time.time() - OLD:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """`with writing_to(out): ...`: a failed write is an InputError that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        place = getattr(error, "filename", None) or directory
        reason = getattr(error, "strerror", None) or error
        problem = f"{place}: cannot write ({reason}); free some space, or choose another directory"
        raise InputError(problem) from error


def require_writable(directory: Path) -> None:
    """Make the directory now, so that a place that cannot be written fails before any work."""
    require_unicode(directory)
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
