"""Forests against sets of prefixes; batches: nothing lost, nothing twice, next to no padding."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from test_scoring import PACKED, random_items

from paramspec.method.rows import (
    BATCH_COST,
    ROW_MULTIPLE,
    Engine,
    Item,
    Request,
    branches_within,
    cell_batches,
    fill_rows,
    round_up,
)


def prefixes(items):
    """All that must be read to predict every option's tokens: the oracle of a forest."""
    return {
        (item.context + option)[:size]
        for item in items
        for option in item.options
        for size in range(1, len(item.context) + len(option))
    }


def test_a_row_holds_each_needed_token_once():
    items = random_items(15)
    cells, plain = fill_rows([Request(item, 0) for item in items], PACKED, row_tokens=10_000)
    assert (len(cells), plain) == (1, [])
    assert len(cells[0].row.tokens) == len(prefixes(items))


def test_rows_keep_to_their_budget_and_lose_no_request():
    items = random_items(40)
    requests = [Request(item, index % 2) for index, item in enumerate(items)]
    cells, _ = fill_rows(requests, PACKED, row_tokens=40)
    assert len(cells) > 2
    longest = max(len(prefixes([item])) for item in items)
    assert max(len(cell.row.tokens) for cell in cells) < 40 + longest
    asked = [(cell.requests[read.item], cell.mask) for cell in cells for read in cell.row.reads]
    assert {number for number, _ in asked} == set(range(40))
    assert all(requests[number].mask == mask for number, mask in asked)


def test_questions_that_share_nothing_have_their_own_prefixes_each():
    items = random_items(15)
    apart = Engine("packed", "asked for", shares=False)
    cells, _ = fill_rows([Request(item, 0) for item in items], apart, row_tokens=10_000)
    assert len(cells[0].row.tokens) == sum(len(prefixes([item])) for item in items)


def test_a_token_sees_its_own_prefix():
    cells, _ = fill_rows([Request(item, 0) for item in random_items(6)], PACKED, 10_000)
    row = cells[0].row
    sees = row.sees()
    for node, depth in enumerate(row.depths):
        seen = [row.tokens[other] for other in np.flatnonzero(sees[node])]
        assert len(seen) == depth + 1
        assert seen[-1] == row.tokens[node]
    paths = {tuple(row.tokens[other] for other in np.flatnonzero(line)) for line in sees}
    assert paths == prefixes(random_items(6))


def test_what_is_read_off_a_row_is_each_option_after_its_prefix():
    items = random_items(6)
    cells, _ = fill_rows([Request(item, 0) for item in items], PACKED, 10_000)
    row, found = cells[0].row, {}
    sees = row.sees()
    for read, which in zip(row.reads, row.which, strict=True):
        assert row.places[which] == read.place
        prefix = tuple(row.tokens[other] for other in np.flatnonzero(sees[read.place]))
        found.setdefault((read.item, read.option), []).append((prefix, read.token))
    for (item, option), reads in found.items():
        path = items[item].context + items[item].options[option]
        start = len(items[item].context)
        expected = [(path[:place], path[place]) for place in range(start, len(path))]
        assert reads == expected
    assert len(found) == 24


def test_rows_of_a_mask_are_of_about_the_same_size():
    requests = [Request(item, 0) for item in random_items(60)]
    sizes = [len(cell.row.tokens) for cell in fill_rows(requests, PACKED, row_tokens=100)[0]]
    assert len(sizes) > 3
    longest = max(len(prefixes([request.item])) for request in requests)
    assert max(sizes) - min(sizes) <= longest  # one question decides on which side of a cut it is


def test_masks_that_are_asked_the_same_share_their_rows():
    items = random_items(12)
    requests = [Request(item, mask) for mask in range(3) for item in items]
    requests += [Request(item, 3) for item in items[:4]]
    cells, _ = fill_rows(requests, PACKED, row_tokens=40)
    of = {mask: [cell.row for cell in cells if cell.mask == mask] for mask in range(4)}
    assert of[0] == of[1] == of[2] != of[3]


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 300, 5000])
def test_batches_hold_every_cell_once_and_keep_to_their_budget(branches, budget):
    items = random_items(30)
    requests = [Request(item, mask) for mask in range(5) for item in items]
    requests += [Request(item, 5 + number) for number, item in enumerate(items)]
    cells, _ = fill_rows(requests, PACKED, row_tokens=50)
    batches = cell_batches(cells, budget, branches)
    assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, cells))
    sizes = [len(batch) * max(len(cell.row.tokens) for cell in batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= budget or len(batch) == 1


def test_a_long_beginning_is_computed_once():
    """Few-shot examples before every question: no row per question, though each is a row's size."""
    beginning = tuple(range(100, 160))
    items = [Item(beginning + item.context, item.options) for item in random_items(12)]
    requests = [Request(item, 0) for item in items]
    cells, _ = fill_rows(requests, PACKED, row_tokens=50)
    assert sum(len(cell.row.tokens) for cell in cells) == len(prefixes(items))
    apart, _ = fill_rows(requests, replace(PACKED, shares=False), row_tokens=50)
    assert len(apart) == 12
    # Not without end: attention over a row is quadratic where it is not by blocks.
    items = [Item((*beginning, 7, n), ((n, 1), (n, 2))) for n in range(1000)]
    cells, _ = fill_rows([Request(item, 0) for item in items], PACKED, row_tokens=50)
    assert max(len(cell.row.tokens) for cell in cells) <= 8 * 50 + 100


def test_rows_of_unlike_length_are_batched_at_the_least_cost():
    """Against every way to cut the sorted rows into batches."""
    budget, items = 160, random_items(40)
    asked = [items[4 * mask : 4 * mask + 1 + mask % 4] for mask in range(10)]
    requests = [Request(item, mask) for mask, own in enumerate(asked) for item in own]
    cells, _ = fill_rows(requests, PACKED, row_tokens=50)
    lengths = sorted((round_up(len(cell.row.tokens), ROW_MULTIPLE) for cell in cells), reverse=True)

    def cost(batches):
        sizes = [len(batch) * max(batch) for batch in batches]
        fits = all(len(batch) == 1 or len(batch) * max(batch) <= budget for batch in batches)
        return sum(sizes) + BATCH_COST * len(batches) if fits else math.inf

    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    ends = [[i + 1 for i, cut in enumerate(way) if cut] for way in cuts]
    ways = [
        [lengths[start:end] for start, end in itertools.pairwise([0, *way, len(lengths)])]
        for way in ends
    ]
    found = [
        [round_up(len(cell.row.tokens), ROW_MULTIPLE) for cell in batch]
        for batch in cell_batches(cells, budget, branches=False)
    ]
    assert cost(found) == min(map(cost, ways)) < cost([[length] for length in lengths])


def test_several_masks_of_a_row_are_a_batch_without_padding():
    items = random_items(30)
    requests = [Request(item, mask) for mask in range(5) for item in items]
    cells, _ = fill_rows(requests, PACKED, row_tokens=50)
    engine = Engine("packed", "asked for", branches=True)
    batches = cell_batches(cells, 300, branches=True)
    assert all(branches_within(batch, engine) for batch in batches)
    assert not any(branches_within(batch, PACKED) for batch in batches)
