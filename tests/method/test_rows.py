"""Forests against sets of prefixes; batches: nothing lost, nothing twice, whatever fits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from test_scoring import PACKED, random_items

from paramspec.errors import InputError
from paramspec.execution.limits import is_out_of_memory
from paramspec.method.batches import in_batches
from paramspec.method.rows import (
    BATCH_COST,
    ROW_MULTIPLE,
    Item,
    Request,
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


def cells_of(items, row_tokens):
    return fill_rows([Request(item, 0) for item in items], PACKED, row_tokens)


def size(cell):
    return len(cell.row.tokens)


def test_rows_of_a_mask_are_about_as_large_as_their_budget():
    items = random_items(60)
    sizes = list(map(size, cells_of(items, 100)))
    assert len(sizes) > 3
    longest = max(len(prefixes([item])) for item in items)
    assert max(sizes) < 100 + longest
    assert max(sizes) - min(sizes) <= longest  # one question decides on which side of a cut it is


def test_masks_that_are_asked_the_same_share_their_rows_and_batches():
    items = random_items(30)
    requests = [Request(item, mask) for mask in range(5) for item in items]
    requests += [Request(item, 5) for item in items[:4]]
    cells = fill_rows(requests, PACKED, row_tokens=50)
    of = {mask: [cell.row for cell in cells if cell.mask == mask] for mask in range(6)}
    assert of[0] == of[1] == of[4] != of[5]
    batches = cell_batches([cell for cell in cells if cell.mask < 5], 300, branches=True)
    # Without padding.
    assert all(len({cell.row for cell in batch}) == 1 < len(batch) for batch in batches)


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 300, 5000])
def test_batches_hold_every_cell_once_and_keep_to_their_budget(branches, budget):
    items = random_items(30)
    requests = [Request(item, mask) for mask in range(5) for item in items]
    requests += [Request(item, 5 + number) for number, item in enumerate(items)]
    cells = fill_rows(requests, PACKED, row_tokens=50)
    batches = cell_batches(cells, budget, branches)
    assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, cells))
    sizes = [len(batch) * max(map(size, batch)) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert all(one <= budget or len(batch) == 1 for one, batch in zip(sizes, batches, strict=True))


def test_a_long_beginning_is_computed_once():
    """Few-shot examples before every question: no row per question, though each is a row's size."""
    beginning = tuple(range(100, 160))
    items = [Item(beginning + item.context, item.options) for item in random_items(12)]
    assert sum(map(size, cells_of(items, 50))) == len(prefixes(items))
    # Not without end: attention over a row is quadratic where it is not by blocks.
    items = [Item((*beginning, 7, n), ((n, 1), (n, 2))) for n in range(1000)]
    assert max(map(size, cells_of(items, 50))) <= 8 * 50 + 100


def test_rows_of_unlike_length_are_batched_at_the_least_cost():
    """Against every way to cut the sorted rows into batches."""
    budget, items = 160, random_items(40)
    asked = [items[4 * mask : 4 * mask + 1 + mask % 4] for mask in range(10)]
    requests = [Request(item, mask) for mask, own in enumerate(asked) for item in own]
    cells = fill_rows(requests, PACKED, row_tokens=50)
    lengths = sorted((round_up(size(cell), ROW_MULTIPLE) for cell in cells), reverse=True)

    def cost(batches):
        fits = all(len(batch) == 1 or len(batch) * max(batch) <= budget for batch in batches)
        computed = sum(len(batch) * max(batch) + BATCH_COST for batch in batches)
        return computed if fits else math.inf

    ways = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        ways.append([lengths[start:end] for start, end in itertools.pairwise(ends)])
    found = [
        [round_up(size(cell), ROW_MULTIPLE) for cell in batch]
        for batch in cell_batches(cells, budget, branches=False)
    ]
    assert cost(found) == min(map(cost, ways)) < cost([[length] for length in lengths])


# Out of memory halves a batch; `test_kernels` holds that no bit moves.


def run(batches, room, error=MemoryError):
    """What `in_batches` runs where `room` tokens fit: results, and the sizes attempted."""
    attempts = []

    def forward(rows, length):
        attempts.append(len(rows) * length)
        if attempts[-1] > room:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return [10 * row for row in rows]

    return list(in_batches(batches, forward, max)), attempts


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
def test_every_row_is_run_once_and_in_order_whatever_fits(room, error):
    done, attempts = run([[1] * 9, [1] * 6, [1] * 4, [1]], room, error)
    if room == 9:  # what fits is run as it comes
        assert attempts == [9, 6, 4, 1]
    assert [row for rows, _ in done for row in rows] == [1] * 20
    assert all(result == [10 * row for row in rows] for rows, result in done)
    assert all(sum(rows) <= room for rows, _ in done)
    failed = [size for size in attempts if size > room]
    assert len(failed) <= 4  # 9, 5, 3, 2: learnt once, not again with each batch
    assert len(failed) == len(set(failed))


def test_halves_keep_the_length_of_their_batch_and_a_row_that_does_not_fit_is_told():
    done, attempts = run([[7, 1]], 7)
    assert ([rows for rows, _ in done], attempts) == ([[7], [1]], [14, 7, 7])
    with pytest.raises(InputError, match="out of memory with one row of 7 tokens"):
        run([[7, 1]], 6)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail(rows, length):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches([[1, 1]], fail, max))


def test_torch_on_this_cpu_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    # oneDNN's, where there is no room for the code that it compiles or for what it works in.
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    unknown = "could not create a primitive descriptor for a matmul forward propagation primitive"
    assert not is_out_of_memory(RuntimeError(unknown))


def test_what_a_failed_attempt_held_is_free_before_its_halves_are_run():
    held = []

    def forward(rows, length):
        assert all(tensor() is None for tensor in held)
        tensor = torch.ones(len(rows), length)
        held.append(weakref.ref(tensor))
        return torch.empty(2**60, dtype=torch.uint8) if len(rows) > 1 else len(rows)

    assert [result for _, result in in_batches([[1] * 4], forward, max)] == [1] * 4
    assert len(held) == 6  # 4 and 2 fail


PROGRAM = """
import os, resource
import torch
from transformers import LlamaConfig
from paramspec.method import batches, kernels
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import encode, score_options
from toy_study import toy_questions, toy_tokenizer
from toys import FAMILIES, random_model

torch.manual_seed(0)
wide = {"num_hidden_layers": 1, "intermediate_size": 131072}
view = value_vector_view(random_model(LlamaConfig(**FAMILIES["llama"][1] | wide)))
tokenizer, questions = toy_tokenizer(), toy_questions()
keeps = [None, *(torch.rand(3, 1, 131072) > 0.3)]
some = [encode(tokenizer, asked) for asked in questions[::2]]
requests = [Request(item, mask) for item in some for mask in range(4)]
kernels.packs = lambda: False  # free memory decides whether layers are packed
failed, attempt = [], batches._attempt

def watched(forward, rows, length):  # only looks on
    done = attempt(forward, rows, length)
    if done is None:
        failed.append(len(rows) * length)
    return done

def measure(budget, every=1):
    for name in ("packed", "plain"):
        options = {"engine": Engine(name, ""), "row_tokens": 1, "batch_tokens": budget}
        yield torch.cat(score_options(view, requests[::every], keeps, **options))
    yield record_concepts(view, tokenizer, questions[::every], batch_tokens=budget).sums

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return 1024 * int(line.split()[1])

batches._attempt = watched
expected = list(measure(1))  # a row at a time
assert not failed, failed
used = memory("VmSize")
read, write = os.pipe()
if not os.fork():  # in another process, whose highest use of memory begins here
    list(measure(1, every=7))
    os.write(write, b"%d" % (memory("VmPeak") - used))
    os._exit(0)
room = 2 * int(os.read(read, 99))  # twice what a row takes
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
found = []
for other in measure(10**6):  # all that there is at once
    # It was a single tensor that did not fit, whatever else was there.
    assert failed and failed[0] * 131072 * 4 > 2 * room, (failed, room)
    failed.clear()
    found.append(other)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for one, other in zip(expected, found, strict=True):
    torch.testing.assert_close(other, one, rtol=0, atol=1e-3)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_a_process_that_really_runs_out_of_memory_ends_with_the_same_numbers():
    """Masked and unmasked, packed and plain, and the recording of coefficients.

    The limit is twice what a row by itself takes on this machine, and less than half of one tensor
    of the whole. What is freed goes back to the system at once: glibc, MKL and oneDNN keep nothing.
    """
    nothing_kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    nothing_kept |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "OMP_NUM_THREADS": "1"}
    place = {"cwd": Path(__file__).parents[1], "env": os.environ | nothing_kept}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, **place)
    assert done.returncode == 0, done.stderr
