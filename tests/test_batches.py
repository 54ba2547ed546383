"""Out of memory halves the batch and goes on, and no number moves by more than 1e-3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paramspec.batches import in_batches, is_out_of_memory
from paramspec.errors import InputError


def run(batches, room, error=MemoryError):
    """What `in_batches` runs where `room` tokens fit: results, and the sizes attempted."""
    attempts = []

    def forward(rows):
        attempts.append(sum(rows))
        if sum(rows) > room:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return [10 * row for row in rows]

    done = list(in_batches(batches, forward, tokens=sum))
    return done, attempts


def test_batches_that_fit_are_run_as_they_come():
    batches = [[4, 3, 3], [2, 2], [1]]
    done, attempts = run(batches, 10)
    assert [rows for rows, _ in done] == batches
    assert attempts == [10, 4, 1]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
def test_every_row_is_run_once_and_in_order_whatever_fits(room, error):
    batches = [[1] * 9, [1] * 6, [1] * 4, [1]]
    done, attempts = run(batches, room, error)
    assert [row for rows, _ in done for row in rows] == [1] * 20
    assert all(result == [10 * row for row in rows] for rows, result in done)
    assert all(sum(rows) <= room for rows, _ in done)
    failed = [size for size in attempts if size > room]
    assert len(failed) <= 4  # 9, 5, 3, 2: learnt once, not again with each batch
    assert len(failed) == len(set(failed))


def test_a_row_that_does_not_fit_is_told_in_one_line():
    with pytest.raises(InputError, match="out of memory with one row of 7 tokens; use") as caught:
        run([[7, 1]], 6)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches([[1, 1]], fail, tokens=sum))


def test_torch_on_this_cpu_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


PROGRAM = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from paramspec import batches
from paramspec.hooks import value_vector_view
from paramspec.masks import record_concepts
from paramspec.rows import Engine, Request
from paramspec.scoring import encode, score_options
from toy_study import toy_questions, toy_tokenizer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=16384, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
)
view = value_vector_view(LlamaForCausalLM(config).eval().requires_grad_(False))
tokenizer, questions = toy_tokenizer(), toy_questions(40)
keep = torch.rand(2, 16384) > 0.3
requests = [Request(encode(tokenizer, q), number % 2) for number, q in enumerate(questions)]

attempts, attempt, halved = [], batches._attempt, []

def measure(batch_tokens):
    results = []
    for name in ("packed", "plain"):
        results.append(torch.cat(score_options(
            view, requests, [None, keep], engine=Engine(name, ""), row_tokens=40,
            batch_tokens=batch_tokens,
        )))
        halved.append(attempts.count(False))
    results.append(record_concepts(view, tokenizer, questions, batch_tokens=batch_tokens).sums)
    return [*results, halved.append(attempts.count(False))][:3]

expected = measure(40)  # which leaves little to be used again
halved.clear()
def watched(forward, rows):  # only looks on
    done = attempt(forward, rows)
    attempts.append(done[0])
    return done
batches._attempt = watched
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
room = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
actual = measure(4000)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
worst = max(float((one - other).abs().max()) for one, other in zip(expected, actual))
print(*halved, worst)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_a_process_that_really_runs_out_of_memory_ends_with_the_same_numbers():
    """Masked and unmasked, packed and plain, and the recording of coefficients."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "20"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    packed, plain, recorded, worst = map(float, done.stdout.split())
    assert 0 < packed < plain < recorded  # each of the three met the limit
    assert worst < 1e-3
