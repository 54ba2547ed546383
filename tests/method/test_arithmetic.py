"""In bfloat16 on a CPU, numbers depend on what is in their key, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paramspec.errors import InputError
from paramspec.execution.limits import OutOfMemory
from paramspec.method import batches, kernels
from paramspec.method.hooks import value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.masks import record_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import choose_engine, encode, score_options
from paramspec.models.checkpoints import Checkpoint
from paramspec.studies import runner
from toy_study import loaded, toy_questions, toy_tokenizer
from toys import toy_model

FAMILIES = ("llama", "gpt2", "gemma2", "bloom")  # the last is scored in plain rows


@pytest.fixture(params=FAMILIES)
def view(request):
    return value_vector_view(toy_model(request.param, dtype=torch.bfloat16))


def requests(count, masks=1):
    tokenizer = toy_tokenizer()
    items = [encode(tokenizer, question) for question in toy_questions(count)]
    return [Request(item, mask) for mask in range(masks) for item in items]


def scores(view, asked, keeps=(None,), **given):
    return torch.cat(score_options(view, asked, keeps, **given))


def test_free_memory_and_threads_move_nothing(view, monkeypatch):
    asked, before = requests(30), torch.get_num_threads()
    expected = scores(view, asked)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(scores(view, asked), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(kernels, "available_memory", lambda: 0)
    assert torch.equal(scores(view, asked), expected)


def test_few_tokens_are_computed_as_many_are(view):
    """Alone, a question has less than `WORTH_PACKING` tokens; the same row beside others, more."""
    items = [request.item for request in requests(80)]
    # Under a mask of its own, a question fills a row; of so few tokens, a batch is a row.
    given = {"engine": choose_engine(view), "batch_tokens": 1}
    together = [Request(item, mask) for mask, item in enumerate(items * 3)]
    assert sum(request.item.longest for request in together) >= kernels.WORTH_PACKING
    whole = score_options(view, together, [None] * len(together), **given)
    for item, score in zip(items, whole, strict=False):
        (alone,) = score_options(view, [Request(item, 0)], [None], **given)
        assert torch.equal(alone, score)


@pytest.mark.parametrize("most", [500, 100, 20])
def test_a_batch_in_halves_gives_the_same_bits(view, most, monkeypatch):
    asked, draw = requests(30, masks=4), torch.Generator().manual_seed(0)
    keeps = [None, *(torch.rand(3, view.layers, view.width, generator=draw) > 0.05)]
    engines = choose_engine(view), Engine("plain", "")
    attempt, failures = batches._attempt, []

    def measure():
        recorded = record_concepts(view, toy_tokenizer(), toy_questions(30)).sums
        return [recorded, *(scores(view, asked, keeps, engine=engine) for engine in engines)]

    def scarce(forward, rows, length):
        if len(rows) > 1 and len(rows) * length > most:
            failures.append(rows)
            return None
        return attempt(forward, rows, length)

    expected = measure()
    monkeypatch.setattr(batches, "_attempt", scarce)
    assert all(torch.equal(*pair) for pair in zip(measure(), expected, strict=True))
    assert failures


def test_arithmetic_that_differs_has_another_key(monkeypatch):
    """In float32 and on GPUs there is one; in bfloat16 on a CPU one for each kind of processor."""
    found, model = set(), loaded(toy_model("llama", dtype=torch.bfloat16))
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert arithmetic(torch.float32, "cpu") == arithmetic(torch.bfloat16, "cuda") == "stock"
        found.add(runner.basis_of(model)["arithmetic"])
    assert len(found) == 2


def test_a_worker_of_another_kind_is_refused(monkeypatch):
    model = loaded(toy_model("llama", dtype=torch.bfloat16))
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: model)
    found = Checkpoint("toy", Path("toy"))
    planned = runner.Target(found, "cpu", runner.basis_of(model))
    assert runner._load(planned, found) is model
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    with pytest.raises(InputError, match=r"toy: arithmetic .*SVE256' on this machine"):
        runner._load(planned, found)


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_model(monkeypatch):
    """The choice of an engine would be free memory's."""
    view = value_vector_view(toy_model("llama"))
    monkeypatch.setattr(batches, "_attempt", lambda *_: None)
    with pytest.raises(OutOfMemory, match="out of memory with one row"):
        choose_engine(view)
