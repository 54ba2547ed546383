"""Directories that cannot be written to: a full disk, a read-only one, a path below a file.

Root writes anywhere, so a small or read-only file system is mounted where that is possible;
where it is not, the test is skipped, and its neighbour that raises the same error by hand runs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


def small_disk(place: Path, size: str = "256k") -> AbstractContextManager[Path]:
    """`with small_disk(tmp_path / "disk") as disk:` a directory that holds `size` bytes."""
    return _mounted(place, f"size={size}")


def read_only(place: Path) -> AbstractContextManager[Path]:
    """`with read_only(tmp_path / "disk") as disk:` a directory that nobody may write to."""
    return _mounted(place, "size=64k,ro")


@contextmanager
def _mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
