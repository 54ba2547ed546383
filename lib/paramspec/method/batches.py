"""Batches that fit into memory: a batch that does not is halved, and the work goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from paramspec.execution.limits import OutOfMemory, is_out_of_memory

# Tokens of a forward pass: large enough that the cost of a call is small.
BATCH_TOKENS = 1024

Row = TypeVar("Row")
Result = TypeVar("Result")


def in_batches(
    batches: Iterable[Sequence[Row]],
    forward: Callable[[Sequence[Row], int], Result],
    length: Callable[[Sequence[Row]], int],
) -> Iterator[tuple[Sequence[Row], Result]]:
    """`for rows, result in in_batches(batches, forward, length)`: each batch, or its halves.

    A batch that does not fit into memory is run again in two halves, and no later batch is larger
    than a half that was needed. `forward` is given rows, and the `length` of their whole batch to
    pad them to: in bfloat16, other padding would move a number. OutOfMemory is raised if a single
    row does not fit.
    """
    most = math.inf  # tokens that a batch may have, once memory ran out
    for batch in batches:
        padded, waiting = length(batch), [batch]
        while waiting:
            rows = waiting.pop(0)
            tokens = len(rows) * padded
            if tokens <= most or len(rows) == 1:
                result = _attempt(forward, rows, padded)
                if result is not None:
                    yield rows, result
                    continue
                if len(rows) == 1:
                    raise OutOfMemory(
                        f"out of memory with one row of {tokens} tokens; use a machine with more "
                        "memory, --dtype bfloat16, or fewer --jobs side by side"
                    )
                most = tokens // 2
            middle = (len(rows) + 1) // 2
            waiting[:0] = [rows[:middle], rows[middle:]]


def _attempt(
    forward: Callable[[Sequence[Row], int], Result], rows: Sequence[Row], length: int
) -> Result | None:
    """The result of a forward pass, or None if it does not fit; then its memory is free."""
    try:
        return forward(rows, length)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def pad_right(rows: Sequence[Sequence[int]], least: int = 0) -> tuple[Tensor, Tensor]:
    """`tokens, attention_mask = pad_right([[5, 6], [7]])`: int64 `[rows, longest, or least]`."""
    lengths = torch.tensor([len(row) for row in rows])
    size = max(least, int(lengths.max()))
    tokens = torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])
    return tokens, (torch.arange(size) < lengths[:, None]).long()


def prompt_batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of the rows of each batch, as many as the budget takes; the longest first."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches: list[list[int]] = []
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches
