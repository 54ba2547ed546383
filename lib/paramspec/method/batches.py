"""Batches that fit into memory: what does not is halved, and the work goes on.

for rows, logits in in_batches(batches, forward, tokens=lambda rows: len(rows) * longest):
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paramspec.execution.limits import OutOfMemory, is_out_of_memory
from paramspec.models.tokens import token_ids

# Tokens of a forward pass: enough for what a pass costs of itself to be little of it.
BATCH_TOKENS = 1024


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
                yield rows, cast("Result", result)
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


def pad_right(rows: Sequence[Sequence[int]], least: int = 0) -> tuple[Tensor, Tensor]:
    """`tokens, attention_mask = pad_right([[5, 6], [7]])`: int64 `[rows, longest, or least]`."""
    tokens = torch.zeros(len(rows), max(least, *map(len, rows)), dtype=torch.long)
    attention_mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    return tokens, attention_mask


def prompt_batches(
    prompts: list[tuple[list[int], int]], batch_tokens: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Prompts, sorted longest first, as many together as the budget of tokens takes."""
    start = 0
    while start < len(prompts):
        size = max(1, batch_tokens // len(prompts[start][0]))
        yield prompts[start : start + size]
        start += size


def sorted_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], int]]:
    """`sorted_prompts(tokenizer, clozes)`: tokens and index of each text, the longest first."""
    return sorted(
        ((row, index) for index, row in enumerate(token_ids(tokenizer, texts))),
        key=lambda pair: -len(pair[0]),
    )
