"""Results that survive a crash, and are never served for another question.

    store = Store("results/store")
    path = store.get(key)                     # a directory, verified, or None
    path = store.put(key, write)              # write(directory) fills it; all or nothing

A key is a mapping of everything that a result depends on (digests of the model and of the
questions, every choice, the scoring version); its SHA-256 names the directory. A result is written
beside its place and renamed into it, so that a reader sees all of it or nothing. What is read is
held against checksums; a damaged result is set aside, with a warning, and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from paramspec.errors import InputError

STORE_VERSION = 1


class Store:
    """Results below one directory, each under the digest of its key."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)

    def get(self, key: Mapping[str, object]) -> Path | None:
        """`path = store.get(key)`: the result's directory if it is there and whole."""
        path = self._path(key)
        if not path.is_dir():
            return None
        problem = _damage(path)
        if problem is None:
            return path
        aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):  # another worker was first
            path.rename(aside)
        warnings.warn(
            f"{path}: {problem}; set aside as {aside.name} and computed again", stacklevel=2
        )
        return None

    def put(self, key: Mapping[str, object], write: Callable[[Path], None]) -> Path:
        """`path = store.put(key, write)`: let `write` fill a new directory, then publish it.

        Raises:
            InputError: if the disk is full or the store cannot be written; what is in the store
                stays as it was.
        """
        path = self._path(key)
        with writing_to(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
            try:
                write(scratch)
                (scratch / "key.json").write_text(_canonical(key))
                sums = {file.name: _digest(file) for file in sorted(scratch.iterdir())}
                (scratch / "checksums.json").write_text(json.dumps(sums, indent=1))
                self._publish(scratch, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return path

    def _publish(self, scratch: Path, path: Path) -> None:
        try:
            scratch.rename(path)
        except OSError:
            # Another worker was first: its result has the same key, so it is as good.
            if _damage(path) is not None:
                raise

    def _path(self, key: Mapping[str, object]) -> Path:
        name = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.root / f"v{STORE_VERSION}" / name[:2] / name


@contextlib.contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """`with writing_to(out): ...`: turn a failed write into one line that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        place = getattr(error, "filename", None) or directory
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{place}: cannot write ({reason}); "
            "free some space, or choose a directory that you may write to"
        ) from None


def require_writable(directory: Path) -> None:
    """`require_writable(out)`: make the directory now, and fail before any work if it can't be."""
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a stored result, or None."""
    try:
        sums = json.loads((path / "checksums.json").read_text())
        if not isinstance(sums, dict) or "key.json" not in sums:
            return "checksums.json is damaged"
        for name, expected in sums.items():
            if _digest(path / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"not a whole result ({error})"
    return None
