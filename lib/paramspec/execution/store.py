"""Results that survive a crash, and are never served for another question.

A key holds everything that a result depends on (digests of the model and of the questions, every
choice, the scoring version); the store adds the versions of the libraries that can change a number.
Its SHA-256 names the directory. Results are compared with checksums as they are read. Any number of
processes, also of several machines, may use one store at once.
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
from typing import Any

from filelock import FileLock, Timeout

from paramspec.errors import InputError
from paramspec.execution.files import PARTIAL, remove_leftovers, writing_to
from paramspec.execution.provenance import COMPUTED, computed, note_use, number_versions

STORE_VERSION = 1

Json = Mapping[str, Any]
# What fills the directory of a result, and what its record says of the unit.
Computed = tuple[Callable[[Path], object], Json]


class Store:
    """Results below one directory, each under the digest of its key.

    >>> store = Store("results/store")
    >>> study = measure_pss(["my-checkpoint/"], questions, Choices(ratios=()), store=store)
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).absolute()  # a worker may have another working directory
        self.versions = number_versions()  # goes to workers, which must have the same

    def get(self, key: Json) -> Path | None:
        """The result's directory if it is whole. A damaged one is set aside, with a warning."""
        path = self._path(key)
        if not path.is_dir():
            return None
        problem = _damage(path)
        if problem is None:
            note_use(path)
            return path
        aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):  # another worker was first
            path.rename(aside)
        warnings.warn(
            f"{path}: {problem}; set aside as {aside.name} and computed again", stacklevel=2
        )
        return None

    def put(self, key: Json, write: Callable[[Path], object], record: Json | None = None) -> Path:
        """`path = store.put(key, write)`: let `write` fill a new directory, then publish it.

        `computed.json` holds the `record` of the unit, see `provenance`. It is an InputError if the
        disk is full or cannot be written, or if this process has other versions than the one that
        opened the store.
        """
        path = self._path(key)
        for name, here in number_versions().items():
            if (there := self.versions.get(name)) != here:
                raise InputError(
                    f"{name} {here}: the run began with {there}; install one version everywhere"
                )
        with writing_to(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
            try:
                write(scratch)
                (scratch / "key.json").write_text(self._whole(key), encoding="utf-8")
                _write_json(scratch / COMPUTED, computed(**(record or {})))
                sums = {file.name: _digest(file) for file in sorted(scratch.iterdir())}
                _write_json(scratch / "checksums.json", sums)
                scratch.rename(path)
            except OSError:
                # Another worker may have been first: its result has the same key, so it is as good.
                if _damage(path) is not None:
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        note_use(path)
        return path

    def find(self, key: Json, compute: Callable[[], Computed]) -> Path:
        """The stored result, or else the one that `compute()` gives, put there."""
        with self.turn(key):
            return self.get(key) or self.put(key, *compute())

    @contextlib.contextmanager
    def turn(self, key: Json, *, wait: bool = True) -> Iterator[bool]:
        """`with store.turn(key): ...`: one process at a time computes a result, which saves work.

        Look for the result again within, since another process may have put it meanwhile. The lock
        ends with its process. Without `wait`, False is yielded while another process has it.
        """
        place = self._path(key).with_suffix(".lock")
        lock, mine = FileLock(place, fallback_to_soft=False), True
        # A disk that knows no locks, or has no room for one, does not keep anyone from work.
        with contextlib.suppress(OSError, NotImplementedError):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=wait)
            except Timeout:  # an OSError as well
                mine = False
        try:
            yield mine
        finally:
            if lock.is_locked:
                place.unlink(missing_ok=True)  # so that a store is not full of empty files
                lock.release()

    def remove_leftovers(self) -> None:
        for pattern in (f"{PARTIAL}*", "*.lock"):
            remove_leftovers(self.root, f"v{STORE_VERSION}/*/{pattern}")

    def _whole(self, key: Json) -> str:
        """The key with the versions, as the text whose digest names the directory."""
        whole = {**key, "versions": self.versions}
        return json.dumps(whole, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def _path(self, key: Json) -> Path:
        name = hashlib.sha256(self._whole(key).encode()).hexdigest()
        return self.root / f"v{STORE_VERSION}" / name[:2] / name


def _write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    try:
        sums = dict(json.loads((path / "checksums.json").read_text(encoding="utf-8")))
        for name in ("key.json", *sums):
            if _digest(path / name) != sums[name]:
                return f"{name} is damaged"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"not a whole result ({error})"
    return None
