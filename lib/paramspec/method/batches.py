"""Batches that fit into memory: what does not is halved, and the work goes on.

for rows, logits in in_batches(batches, forward, tokens=lambda rows: len(rows) * longest):
    ...
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from paramspec.errors import InputError

# Tokens of a forward pass: enough for what a pass costs of itself to be little of it.
BATCH_TOKENS = 1024


class OutOfMemory(InputError):
    """Memory does not suffice, and no smaller part of the work is left to try."""


Row = TypeVar("Row")
Result = TypeVar("Result")


def in_batches(
    batches: Iterable[Sequence[Row]],
    forward: Callable[[Sequence[Row]], Result],
    tokens: Callable[[Sequence[Row]], int],
) -> Iterator[tuple[Sequence[Row], Result]]:
    """`for rows, result in in_batches(batches, forward, tokens)`: each batch, or its halves.

    While memory suffices, batches are run as they come. A batch that does not fit is run again in
    two halves, and no later one is larger than a half that was needed: composition moves a
    log-likelihood by rounding alone.

    Args:
        batches: rows that go through the model together.
        forward: run on a batch, or on a part of it; has no effect if it runs out of memory.
        tokens: the size of a batch, padding included.

    Raises:
        OutOfMemory: if a single row does not fit.
    """
    most = None  # tokens that a batch may have, once memory ran out
    for batch in batches:
        waiting = [batch]
        while waiting:
            rows = waiting.pop(0)
            fits = most is None or len(rows) == 1 or tokens(rows) <= most
            done, result = _attempt(forward, rows) if fits else (False, None)
            if done:
                yield rows, result
                continue
            if fits and len(rows) == 1:
                raise OutOfMemory(
                    f"out of memory with one row of {tokens(rows)} tokens; use a machine with more "
                    "memory, --dtype bfloat16, or fewer --jobs side by side"
                )
            if fits:
                most = tokens(rows) // 2
            middle = (len(rows) + 1) // 2
            waiting[:0] = [rows[:middle], rows[middle:]]


def _attempt(
    forward: Callable[[Sequence[Row]], Result], rows: Sequence[Row]
) -> tuple[bool, Result | None]:
    """Whether a forward pass fits, and its result; when this returns, what it held is free."""
    try:
        return True, forward(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False, None


def release_memory() -> None:
    """`release_memory()`: what was freed goes back to the system, where glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """`is_out_of_memory(error)`: a GPU's, numpy's, or torch's own words for it on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("DefaultCPUAllocator", "not enough memory", "bad_alloc", "Cannot allocate memory")
    # oneDNN has but one word for all that it could not do, most often for want of memory. That
    # of a primitive *descriptor* is another: no code for what was asked for, with any memory.
    words += ("could not create a memory object", "CUBLAS_STATUS_ALLOC_FAILED")
    primitives = ("could not create a primitive", "could not execute a primitive")
    told = str(error)
    return isinstance(error, RuntimeError) and (
        told in primitives or any(word in told for word in words)
    )
