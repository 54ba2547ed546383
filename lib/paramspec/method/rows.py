"""How a forward pass is filled: questions as tokens, merged into forests, under masks, in batches.

    cells = fill_rows(requests, engine, row_tokens=160)
    batches = cell_batches(cells, batch_tokens=1024, branches=engine.branches)

Each needed token is computed once, see `Row`. A concept's questions are asked under many masks, all
in the same rows: a batch is one row under several masks, and becomes one row per mask within the
model, at the first layer where a mask sets a coefficient to zero.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

# Tokens of a packed row, about: longer rows share more prefixes, but waste more attention.
ROW_TOKENS = 160
# oneDNN compiles code for each number of rows that it multiplies. So that there are few, rows are
# padded to a multiple of the first, and the positions that are unembedded to one of the second.
ROW_MULTIPLE, READ_MULTIPLE = 4, 16
BATCH_COST = 20  # of any batch, in tokens


@dataclass(frozen=True)
class Item:
    """A question in tokens: the prompt, and the tokens of each option; `name` is for messages."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    name: str = field(default="a question", compare=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest path: an option's last token is predicted, never read."""
        return len(self.context) + max(map(len, self.options)) - 1


class Request(NamedTuple):
    """Score `item` under mask number `mask` of the masks given with the requests."""

    item: Item
    mask: int


@dataclass(frozen=True)
class Engine:
    """How rows are filled: `packed` forests, or one sequence per row (`plain`), and why.

    With `branches`, a row becomes one per mask within the model, see `mask_value_vectors`; without
    them, it is repeated for each mask.
    """

    name: Literal["packed", "plain"]
    reason: str
    branches: bool = False


@dataclass
class Reads:
    """For each `i`, add the log-probability of `tokens[i]` after node `places[i]` to option
    `options[i]` of item `items[i]`. (Lists of numbers: the garbage collector skips them.)
    """

    places: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    options: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """A forest of tokens: `parents[i] < i`, or -1 at a root.

    Token sequences under one mask are merged: equal beginnings (a question's prompt before its four
    options, a template of two questions) are one path:

        The capital of France is -+- Par -(is)        row    The capital of France is Par Br Ly
                  |               +- Br -uss -(els)   depth   0    1     2    3    4   5  5  5 ...
                  |               +- Ly -(on)         sees   its ancestors and itself, nothing else
                  +- of Spain is ...

    The last token of an option (in brackets) is predicted, never read, so it is not in the row.
    The position of a token is its depth, and it attends to its ancestors, so that every path is
    computed as if it were alone.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    reads: Reads = field(default_factory=Reads)
    _children: dict[int, int] = field(default_factory=dict)

    def add(self, number: int, item: Item) -> None:
        end = [-1, *self._walk(-1, item.context)][-1]
        for option, tokens in enumerate(item.options):
            self.reads.places += [end, *self._walk(end, tokens[:-1])]
            self.reads.tokens += tokens
            self.reads.items += [number] * len(tokens)
            self.reads.options += [option] * len(tokens)

    def shared(self, item: Item) -> int:
        """The number of first tokens of an item's prompt that are in the row."""
        return len(self._known(-1, item.context))

    def _known(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The nodes of a path after `node`, as far as it is in the row."""
        nodes: list[int] = []
        for token in tokens:
            if (child := self._children.get(_edge(node, token))) is None:
                break
            nodes.append(node := child)
        return nodes

    def _walk(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The nodes of a path after `node`; what is missing of it is added."""
        nodes = self._known(node, tokens)
        if new := tokens[len(nodes) :]:
            node = nodes[-1] if nodes else node
            depth = 0 if node < 0 else self.depths[node] + 1
            places = range(len(self.tokens), len(self.tokens) + len(new))
            above = [node, *places[:-1]]
            self.tokens += new
            self.parents += above
            self.depths += range(depth, depth + len(new))
            self._children.update(zip(map(_edge, above, new), places, strict=True))
            nodes += places
        return nodes

    @cached_property
    def places(self) -> np.ndarray:
        """The nodes that something is read from, each once; see `which`."""
        return np.unique(self.reads.places)

    @cached_property
    def which(self) -> np.ndarray:
        """For each read, the index of its node in `places`."""
        return np.searchsorted(self.places, self.reads.places)

    def sees(self) -> np.ndarray:
        """Bool `[tokens, tokens]`: whether a token attends to another: itself and ancestors."""
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


def _edge(node: int, token: int) -> int:
    return node << 32 | token


class Cell(NamedTuple):
    """A row under a mask; item `i` of the row's reads is that of request `requests[i]`."""

    row: Row
    mask: int
    requests: tuple[int, ...]


def _packed_rows(items: Sequence[Item], row_tokens: int) -> list[Row]:
    """As few forests of about `row_tokens` tokens as hold the items, all of about one size."""
    tokens = _merged_tokens(items)
    enough = tokens / math.ceil(tokens / row_tokens)
    rows = [Row()]
    for number, item in sorted(enumerate(items), key=lambda pair: pair[1].context):
        # Questions after one long beginning, as of examples, stay together in longer rows.
        size = len(rows[-1].tokens)
        if size >= 8 * enough or (size >= enough and rows[-1].shared(item) <= row_tokens / 4):
            rows.append(Row())
        rows[-1].add(number, item)
    return rows


def _merged_tokens(items: Sequence[Item]) -> int:
    """The tokens of one row that holds all items."""
    paths = sorted((*item.context, *option[:-1]) for item in items for option in item.options)
    return sum(map(len, paths)) - sum(itertools.starmap(_shared, itertools.pairwise(paths)))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two paths share, by halving: a comparison of slices is quick."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _plain_rows(items: Sequence[Item]) -> list[Row]:
    """A row for each option."""
    rows = []
    for number, item in enumerate(items):
        for index, option in enumerate(item.options):
            row = Row()
            row.add(number, Item(item.context, (option,)))
            row.reads.options = [index] * len(option)
            rows.append(row)
    return rows


def fill_rows(requests: Sequence[Request], engine: Engine, row_tokens: int) -> list[Cell]:
    """`cells = fill_rows(requests, engine, 160)`: the rows that score the requests.

    Rows of a mask depend on its own requests alone; masks with the same questions share their rows.
    """
    asked: dict[int, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        asked[request.mask].append(number)
    alike: dict[tuple[Item, ...], list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for mask, numbers in asked.items():
        alike[tuple(requests[number].item for number in numbers)].append((mask, tuple(numbers)))
    cells = []
    for items, masks in alike.items():
        rows = _packed_rows(items, row_tokens) if engine.name == "packed" else _plain_rows(items)
        cells += [Cell(row, *mask) for row in rows for mask in masks]
    return cells


def cell_batches(cells: Sequence[Cell], batch_tokens: int, branches: bool) -> list[list[Cell]]:
    """Cells that go through the model together, the largest batch first.

    With `branches`, the masks of a row make a batch, or several of about the same size; rows that
    would leave a batch half empty are batched by length.
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
    return sorted(batches, key=lambda batch: -len(batch) * longest_row(batch))


def longest_row(batch: Sequence[Cell]) -> int:
    """The length that the rows of a batch are padded to."""
    return max(len(cell.row.tokens) for cell in batch)


def _fitting_batches(cells: Sequence[Cell], batch_tokens: int) -> list[list[Cell]]:
    """Batches of cells of like length: the fewest tokens, `BATCH_COST` per batch included."""
    cells = sorted(cells, key=lambda cell: -len(cell.row.tokens))
    lengths = [round_up(len(cell.row.tokens), ROW_MULTIPLE) for cell in cells]
    # For each number of first cells: their least cost, and where their last batch starts.
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
