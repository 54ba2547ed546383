"""How a forward pass is filled: questions in tokens, merged into forests, under masks, in batches.

    packed, plain = fill_rows(requests, engine, row_tokens=160)
    for batch in cell_batches(packed, batch_tokens=1024, branches=engine.branches):
        ...

Each needed token is computed once. The token sequences that share a mask are merged into a
*forest*: a node a token, a path from a root for each sequence, so that equal beginnings (a
question's prompt under its four options, a template under two questions) are one path. A forest is
one row:

    The capital of France is -+- Par -(is)        row    The capital of France is Par Br Ly
              |               +- Br -uss -(els)   depth   0    1     2    3    4   5  5  5 ...
              |               +- Ly -(on)         sees   its ancestors and itself, nothing else
              +- of Spain is ...

The last token of an option (in brackets) is predicted, never read, so it is not in the row. The
position of a token is its depth, and it attends to its ancestors, so that every path is computed
as if it stood alone.

A concept's questions are asked under many masks: its own at each ratio, and the controls. They
fill the same rows. A batch is one row under several masks, and becomes as many rows within the
model, where the first mask sets a coefficient to zero; what is below is computed once:

    row --- embeddings, attention, ... ---+--- mask 1: m_j = 0 for j in ... --- ... --- reads
                                          +--- mask 2                       --- ... --- reads
                                          +--- no mask                      --- ... --- reads
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

# Tokens of a packed row, about: longer ones share more prefixes, and waste more attention.
ROW_TOKENS = 160
# oneDNN compiles code for each number of rows that it multiplies: let there be few of them. So
# rows are padded to a multiple of the first, and places that are unembedded to one of the second.
ROW_MULTIPLE, READ_MULTIPLE = 4, 16
BATCH_COST = 20  # what every batch takes, whatever is in it, in tokens


@dataclass(frozen=True)
class Item:
    """A question in tokens: the prompt, and the tokens of each option after it.

    `name` is the question's, for messages.
    """

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    name: str = field(default="a question", compare=False)

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """What is read before each option's last token is predicted."""
        return [self.context + option[:-1] for option in self.options]

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return len(self.context) + max(map(len, self.options)) - 1


class Request(NamedTuple):
    """Score `item` under mask number `mask` of the masks given beside the requests."""

    item: Item
    mask: int


@dataclass(frozen=True)
class Engine:
    """How rows are filled: `packed` forests, or one sequence a row (`plain`), and why.

    Attributes:
        longest: tokens of the longest path that is packed, if there is a limit; others are plain.
        branches: masks over one row part where the first of them masks, see `mask_value_vectors`;
            otherwise the row is repeated for each.
        shares: questions share their beginnings. False is for measuring what that wins.
    """

    name: Literal["packed", "plain"]
    reason: str
    longest: int | None = None
    branches: bool = False
    shares: bool = True


class Read(NamedTuple):
    """Add the log-probability of `token` after node `place` to an option of an item."""

    place: int
    token: int
    item: int
    option: int


@dataclass(eq=False)
class Row:
    """A forest of tokens: `parents[i] < i`, or -1 at a root."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, number: int, item: Item) -> None:
        for option, tokens in enumerate(item.options):
            node = -1
            for place, token in enumerate((*item.context, *tokens)):
                if place >= len(item.context):
                    self.reads.append(Read(node, token, number, option))
                if place < len(item.context) + len(tokens) - 1:
                    node = self._step(node, token)

    def shared(self, item: Item) -> int:
        """How many of the first tokens of an item's prompt are there."""
        node, size = -1, 0
        while size < len(item.context) and (node, item.context[size]) in self._children:
            node = self._children[node, item.context[size]]
            size += 1
        return size

    def part(self) -> None:
        """What is added from now on shares nothing with what is there."""
        self._children.clear()

    def _step(self, node: int, token: int) -> int:
        child = self._children.get((node, token))
        if child is None:
            child = self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(0 if node < 0 else self.depths[node] + 1)
        return child

    @cached_property
    def places(self) -> np.ndarray:
        """The nodes that something is read off, each once; see `which`."""
        return np.unique([read.place for read in self.reads])

    @cached_property
    def which(self) -> np.ndarray:
        """For each read, the index of its node in `places`."""
        return np.searchsorted(self.places, [read.place for read in self.reads])

    def sees(self) -> np.ndarray:
        """Bool `[tokens, tokens]`: whether a token attends to another: itself and ancestors."""
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


class Cell(NamedTuple):
    """A row under a mask; `requests[i]` is the request that item `i` of the row's reads is."""

    row: Row
    mask: int
    requests: tuple[int, ...]


def _packed_rows(items: Sequence[tuple[int, Item]], row_tokens: int, shares: bool) -> list[Row]:
    """As few forests of about `row_tokens` tokens as hold the items, of about the same size.

    What is asked after one long beginning, as of examples, stays together in longer ones.
    """
    items = sorted(items, key=lambda pair: pair[1].context)
    (whole,) = _forests(items, shares, enough=math.inf, little=0)
    total = len(whole.tokens)
    return _forests(
        items,
        shares,
        enough=total / math.ceil(total / row_tokens),
        little=row_tokens / 4 if shares else math.inf,
    )


def _forests(
    items: Sequence[tuple[int, Item]], shares: bool, enough: float, little: float
) -> list[Row]:
    """Forests that take no further item once they have `enough` tokens.

    That is, if a new one repeats but a `little` of what is there; and 8 times as many at most.
    """
    rows = [Row()]
    for number, item in items:
        size = len(rows[-1].tokens)
        if size >= enough and (size >= 8 * enough or rows[-1].shared(item) <= little):
            rows.append(Row())
        if not shares:
            rows[-1].part()
        rows[-1].add(number, item)
    return rows


def _plain_rows(items: Sequence[tuple[int, Item]]) -> list[Row]:
    """A row for each option."""
    rows = []
    for number, item in items:
        for index, option in enumerate(item.options):
            row = Row()
            row.add(number, Item(item.context, (option,)))
            row.reads = [read._replace(option=index) for read in row.reads]
            rows.append(row)
    return rows


def fill_rows(
    requests: Sequence[Request], engine: Engine, row_tokens: int
) -> tuple[list[Cell], list[Cell]]:
    """`packed, plain = fill_rows(requests, engine, 160)`: the rows that score the requests.

    A mask's requests fill rows of their own, whatever stands beside them; masks that are asked the
    same have the same rows.
    """
    asked: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        asked.setdefault(request.mask, []).append(number)
    alike: dict[tuple[Item, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for mask, numbers in asked.items():
        items = tuple(requests[number].item for number in numbers)
        alike.setdefault(items, []).append((mask, tuple(numbers)))
    packed, plain = [], []
    for items, masks in alike.items():
        fits: list[tuple[int, Item]] = []
        other: list[tuple[int, Item]] = []
        for pair in enumerate(items):
            short = engine.longest is None or pair[1].longest <= engine.longest
            (fits if engine.name == "packed" and short else other).append(pair)
        if fits:
            rows = _packed_rows(fits, row_tokens, engine.shares)
            packed += [Cell(row, *mask) for row in rows for mask in masks]
        plain += [Cell(row, *mask) for row in _plain_rows(other) for mask in masks]
    return packed, plain


def cell_batches(cells: Sequence[Cell], batch_tokens: int, branches: bool) -> list[list[Cell]]:
    """Cells that go through the model together, the largest batch first.

    With `branches`, the masks of a row make a batch, or several of about the same size, without
    any padding. Where that would leave a batch half empty, rows go with those of like length.
    """
    batches, single = [], []
    for _, group in itertools.groupby(cells, key=lambda cell: id(cell.row)):
        same = list(group)
        most = max(1, batch_tokens // len(same[0].row.tokens))
        if not branches or len(same) < most / 2 or len(same) == 1:
            single += same
            continue
        size = math.ceil(len(same) / math.ceil(len(same) / most))
        batches += [same[start : start + size] for start in range(0, len(same), size)]
    batches += _fitting_batches(single, batch_tokens)
    # So that memory runs out at once or never.
    return sorted(batches, key=lambda batch: -computed_tokens(batch))


def _fitting_batches(cells: Sequence[Cell], batch_tokens: int) -> list[list[Cell]]:
    """Batches of cells of like length that compute the fewest tokens, a batch counting as some."""
    cells = sorted(cells, key=lambda cell: -len(cell.row.tokens))
    lengths = [round_up(len(cell.row.tokens), ROW_MULTIPLE) for cell in cells]
    # For the first so many cells: what they cost at least, and where their last batch starts.
    costs, starts = [0], [0]
    for end in range(1, len(cells) + 1):
        first = end - 1
        ways = [(costs[first] + lengths[first], first)]
        while first > 0 and (end - first + 1) * lengths[first - 1] <= batch_tokens:
            first -= 1
            ways.append((costs[first] + (end - first) * lengths[first], first))
        cost, start = min(ways)
        costs.append(cost + BATCH_COST)
        starts.append(start)
    batches, end = [], len(cells)
    while end:
        batches.append(cells[starts[end] : end])
        end = starts[end]
    return batches


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def branches_within(batch: Sequence[Cell], engine: Engine) -> bool:
    """Whether a batch is one row under several masks, which part within the model."""
    return engine.branches and len(batch) > 1 and len({id(cell.row) for cell in batch}) == 1


def computed_tokens(batch: Sequence[Cell]) -> int:
    return len(batch) * max(len(cell.row.tokens) for cell in batch)
