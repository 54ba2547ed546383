"""In bfloat16 on a CPU, numbers depend on what is in their key, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
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
from paramspec.models.load import LoadedModel
from paramspec.studies import runner
from toy_study import toy_questions, toy_tokenizer
from toys import toy_model

FAMILIES = ("llama", "gpt2", "gemma2", "bloom")  # the last is scored in plain rows
ENGINES = {"packed": Engine("packed", "", branches=True), "plain": Engine("plain", "")}


@pytest.fixture(params=FAMILIES)
def view(request):
    return value_vector_view(toy_model(request.param, dtype=torch.bfloat16))


def requests(count, masks=1):
    tokenizer = toy_tokenizer()
    items = [encode(tokenizer, question) for question in toy_questions(count)]
    return [Request(item, mask) for mask in range(masks) for item in items]


def scores(view, asked, keeps=(None,), **given):
    return torch.cat(score_options(view, asked, keeps, **given))


def engines(view):
    """The engine of the model, and the plain one."""
    return {choose_engine(view).name: choose_engine(view), "plain": ENGINES["plain"]}


def test_free_memory_moves_nothing(view, monkeypatch):
    asked = requests(30)
    expected = scores(view, asked)
    monkeypatch.setattr(kernels, "available_memory", lambda: 0)
    assert torch.equal(scores(view, asked), expected)


def test_few_tokens_are_computed_as_many_are(view):
    """Alone, a question has less than `WORTH_PACKING` tokens; the same row beside others, more."""
    asked = requests(80)
    given = {
        "engine": replace(choose_engine(view), shares=False),
        "row_tokens": 1,  # a question fills a row, whichever questions begin alike
        "batch_tokens": 1,  # a batch is a row: padding is its own
    }
    together = asked * 3
    assert sum(request.item.longest for request in together) >= kernels.WORTH_PACKING
    whole = score_options(view, together, [None], **given)
    for number, request in enumerate(asked):
        (alone,) = score_options(view, [request], [None], **given)
        assert torch.equal(alone, whole[number])


@pytest.mark.parametrize("most", [500, 100, 20])
def test_a_batch_in_halves_gives_the_same_bits(view, most, monkeypatch):
    asked = requests(30, masks=4)
    draw = torch.Generator().manual_seed(0)
    keeps = [None, *(torch.rand(3, view.layers, view.width, generator=draw) > 0.05)]
    expected = {name: scores(view, asked, keeps, engine=e) for name, e in engines(view).items()}
    recorded = record_concepts(view, toy_tokenizer(), toy_questions(30)).sums
    attempt, failures = batches._attempt, []

    def scarce(forward, rows):
        sizes = [len(row.row.tokens) if hasattr(row, "row") else len(row[0]) for row in rows]
        if len(rows) > 1 and sum(sizes) > most:
            failures.append(rows)
            return False, None
        return attempt(forward, rows)

    monkeypatch.setattr(batches, "_attempt", scarce)
    for name, engine in engines(view).items():
        assert torch.equal(scores(view, asked, keeps, engine=engine), expected[name])
    assert torch.equal(record_concepts(view, toy_tokenizer(), toy_questions(30)).sums, recorded)
    assert failures


def test_as_many_threads_as_one_likes(view):
    asked, before = requests(30), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(scores(view, asked))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# --- keys ---------------------------------------------------------------------------------------


def test_arithmetic_that_differs_has_another_key(monkeypatch):
    """In float32 and on GPUs there is one; in bfloat16 on a CPU one for each kind of processor."""
    found = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert arithmetic(torch.float32, "cpu") == arithmetic(torch.bfloat16, "cuda") == "stock"
        way = arithmetic(torch.bfloat16, "cpu")
        target = runner.Target(None, "toy", "digest", torch.bfloat16, "cpu", way)
        found.add(str(runner.result_basis(target, toy_questions(2))))
    assert len(found) == 2


def test_a_worker_of_another_kind_is_refused(monkeypatch):
    model = toy_model("llama", dtype=torch.bfloat16)
    loaded = LoadedModel(
        model=model,
        tokenizer=toy_tokenizer(),
        name="toy",
        digest="digest",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: loaded)
    found = Checkpoint("toy", Path("toy"))
    planned = replace(runner.target_of(loaded), model=found)
    assert runner._load(planned, found) is loaded
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    with pytest.raises(InputError, match=r"this machine computes .*SVE256.* use float32"):
        runner._load(planned, found)


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_model(monkeypatch):
    """The choice of an engine would be free memory's."""
    view = value_vector_view(toy_model("llama"))

    def scarce(forward, rows):
        return False, None

    monkeypatch.setattr(batches, "_attempt", scarce)
    with pytest.raises(OutOfMemory, match="out of memory with one row"):
        choose_engine(view)
