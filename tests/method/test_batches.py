"""Out of memory halves the batch and goes on; `test_kernels` holds that no bit moves."""

from __future__ import annotations

import weakref

import pytest
import torch

from paramspec.errors import InputError
from paramspec.execution.limits import is_out_of_memory
from paramspec.method.batches import in_batches


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
