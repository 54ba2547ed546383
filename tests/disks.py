"""A disk that is full: root writes anywhere, so a small file system is mounted where that can be.

Where it cannot, the test is skipped, and its neighbour that raises the same error by hand runs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str = "256k") -> Iterator[Path]:
    """`with small_disk(tmp_path / "disk") as disk:` a directory that holds `size` bytes."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
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
