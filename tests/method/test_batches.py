"""Out of memory halves the batch and goes on, and no number moves by more than 1e-3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


PROGRAM = """
import os, resource
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from paramspec.method import batches, kernels
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import encode, score_options
from toy_study import toy_questions, toy_tokenizer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=16, intermediate_size=65536, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)
view = value_vector_view(LlamaForCausalLM(config).eval().requires_grad_(False))
tokenizer, questions = toy_tokenizer(), toy_questions()
keeps = [None, *(torch.rand(3, 1, 65536) > 0.3)]
items = [encode(tokenizer, question) for question in questions]
under_masks = [Request(item, mask) for mask in range(4) for item in items]
alone = [Request(item, number % 4) for number, item in enumerate(items)]

kernels.packs = lambda: False  # free memory decides whether layers are packed
failed, attempt = [], batches._attempt
def watched(forward, rows, length):  # only looks on
    done = attempt(forward, rows, length)
    if done is None:
        failed.append(len(rows) * length)
    return done
batches._attempt = watched

def measure(batch_tokens, every=1):
    results, fails = [], []
    for name, requests in (("packed", under_masks), ("plain", alone), ("recorded", None)):
        failed.clear()
        if requests is None:
            found = record_concepts(
                view, tokenizer, questions[::every], batch_tokens=batch_tokens
            ).sums
        else:
            found = torch.cat(score_options(
                view, requests[::every], keeps, row_tokens=1, batch_tokens=batch_tokens,
                engine=Engine(name, ""),
            ))
        results.append(found)
        fails.append(list(failed))
    return results, fails

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return 1024 * int(line.split()[1])

expected, fails = measure(1)  # a row at a time
assert fails == [[], [], []], fails
used = memory("VmSize")
read, write = os.pipe()
if not os.fork():  # in another process, whose highest use of memory begins here
    measure(1, every=7)
    os.write(write, b"%d" % (memory("VmPeak") - used))
    os._exit(0)
room = 2 * int(os.read(read, 99))  # twice what a row takes
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
actual, fails = measure(10**6)  # all that there is at once
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for tokens in fails:  # it was a single tensor that did not fit, whatever else was there
    assert tokens and tokens[0] * 65536 * 4 > 2 * room, (fails, room)
print(max(float((one - other).abs().max()) for one, other in zip(expected, actual)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_a_process_that_really_runs_out_of_memory_ends_with_the_same_numbers():
    """Masked and unmasked, packed and plain, and the recording of coefficients.

    The limit is twice what a row by itself takes on this machine, and less than half of one tensor
    of the whole. What is freed goes back to the system at once: glibc, MKL and oneDNN keep nothing.
    """
    keep_nothing = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MKL_DISABLE_FAST_MM": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env=os.environ | keep_nothing,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3
