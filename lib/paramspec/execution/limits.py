"""The processors and the memory that this process may use: in a container, fewer than the host has.

`psutil` and `torch` know of no control group; `joblib` knows of a container's root, and of its
processors alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import joblib
import psutil

from paramspec.errors import InputError

PROC, CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Processors that this process may use at once, by affinity and control groups, rounded up."""
    shares = [joblib.cpu_count()]
    for group in _groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit():  # "150000 100000"; without a limit "max 100000"
            shares.append(math.ceil(int(quota) / int(period)))
    return min(shares)


def memory() -> int:
    """Bytes of this machine, or of the tightest control group."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Bytes that this process can still get: free ones, and files that can be read again."""
    free = [max(0, limit - used) for limit, used in _memory_limits()]
    return min([psutil.virtual_memory().available, *free])


def require_memory(needed: int) -> None:
    """Refuse weights of more bytes than this process may use."""
    if needed > memory():
        raise InputError(
            f"device 'cpu': the weights need {needed / 1e9:.0f} GB, this process may use "
            f"{memory() / 1e9:.0f} GB; use a GPU, bfloat16 or a smaller model"
        )


class OutOfMemory(InputError):
    """Memory does not suffice, and no smaller part of the work is left to try."""


def release_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory: of a GPU, of numpy, or of torch on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ["DefaultCPUAllocator", "not enough memory", "bad_alloc", "Cannot allocate memory"]
    # oneDNN raises one message for every failure, most often for lack of memory. Its message on a
    # primitive *descriptor* is another: it has no code for the operation, with any memory.
    words += ["could not create a memory object", "CUBLAS_STATUS_ALLOC_FAILED"]
    primitives = ("could not create a primitive", "could not execute a primitive")
    message = str(error)
    return isinstance(error, RuntimeError) and (
        message in primitives or any(word in message for word in words)
    )


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Of each control group with a limit: the limit and the memory in use, in bytes."""
    for group in _groups():
        # The last is version 1's. Above `high` a process is slowed down until it has given back.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _read(group / name)
            if limit.isdigit():
                used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
                facts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                files = facts.get("total_inactive_file") or facts.get("inactive_file") or 0
                yield int(limit), int(used or 0) - int(files)


def _groups() -> Iterator[Path]:
    """The directories of this process's control groups, from its own up; of version 1, of memory.

    In a container the path may be the host's: then the root is the container's own group.
    """
    for line in _read(PROC).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            own = PurePosixPath(path)
            for folder in (own, *own.parents):
                yield CGROUP / controllers / folder.relative_to("/")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:  # another system, or a group without this limit
        return ""
