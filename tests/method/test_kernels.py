"""Packed linear layers against torch's own, and what a number on a CPU depends on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError
from paramspec.execution.limits import OutOfMemory
from paramspec.method import batches, kernels
from paramspec.method.hooks import value_vector_view
from paramspec.method.kernels import arithmetic, packed_layers
from paramspec.method.masks import record_concepts
from paramspec.method.rows import Engine, Request
from paramspec.method.scoring import choose_engine, encode, score_options
from paramspec.models.checkpoints import Checkpoint
from paramspec.studies import runner
from toy_study import loaded, toy_questions, toy_tokenizer
from toys import FAMILIES, toy_model

ENOUGH = 10**6


def packed(model):
    return {module for module in model.modules() if "forward" in vars(module)}


def logits(model):
    tokens = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture
def packing():
    if not kernels.packs():
        pytest.skip("torch has no packed linear layers here")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_give_the_same_logits_and_are_gone_afterwards(family, packing):
    model = toy_model(family)
    expected = logits(model)
    linear = {module for module in model.modules() if type(module) in (nn.Linear, Conv1D)}
    with suppress(KeyError), packed_layers(model, tokens=ENOUGH):
        assert packed(model) == linear - {model.get_output_embeddings()}
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
        raise KeyError
    assert not packed(model)
    assert torch.equal(logits(model), expected)


def test_few_tokens_bfloat16_or_no_room_pack_nothing(packing, monkeypatch):
    for dtype, tokens, room in (
        (torch.float32, 10, 10**9),
        (torch.bfloat16, ENOUGH, 10**9),
        (torch.float32, ENOUGH, 9),
    ):
        model = toy_model("llama", dtype=dtype)
        monkeypatch.setattr(kernels, "available_memory", lambda room=room: room)
        with packed_layers(model, tokens=tokens):
            assert not packed(model)


def test_what_accelerate_has_placed_is_left_alone(packing):
    model = toy_model("llama")
    placed = model.model.layers[0].mlp.up_proj
    own = placed.forward
    kept = placed.forward = lambda states: own(states)
    with packed_layers(model, tokens=ENOUGH):
        assert placed.forward is kept
    assert placed.forward is kept


def test_running_out_of_memory_while_packing_leaves_the_rest_as_it_is(packing, monkeypatch):
    model, pack, calls = toy_model("gpt2"), kernels._pack, []

    def scarce(weight):
        calls.append(weight)
        if len(calls) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pack(weight)

    monkeypatch.setattr(kernels, "_pack", scarce)
    expected = logits(model)
    with packed_layers(model, tokens=ENOUGH):
        assert len(packed(model)) == 3
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [1, 1.001])
def test_operators_that_give_other_numbers_are_done_without(factor, monkeypatch):
    def linear(weight, bias, states):
        return factor * functional.linear(states, weight)

    monkeypatch.setattr(kernels, "_pack", lambda weight: weight)
    monkeypatch.setattr(kernels, "_run_packed", linear)
    assert kernels.packs.__wrapped__() == (factor == 1)


def test_missing_operators_are_done_without(monkeypatch):
    monkeypatch.setattr(kernels, "_pack", lambda weight: weight.no_such_operator)
    assert not kernels.packs.__wrapped__()


def test_a_lack_of_memory_is_not_remembered_as_a_lack_of_operators(packing, monkeypatch):
    def scarce(weight):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = toy_model("llama")
    kernels.packs.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_pack", scarce)
        with packed_layers(model, tokens=ENOUGH):
            assert not packed(model)
    with packed_layers(model, tokens=ENOUGH):
        assert packed(model)


# In bfloat16, numbers depend on what is in their key, and on nothing else.


@pytest.fixture(params=["llama", "gpt2", "gemma2", "bloom"])  # the last is scored in plain rows
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
    assert runner.loaded_target(planned) is model
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    with pytest.raises(InputError, match=r"toy: arithmetic '[^']*SVE256[^']*' on this machine"):
        runner.loaded_target(planned)


def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_model(monkeypatch):
    """The choice of an engine would be free memory's."""
    view = value_vector_view(toy_model("llama"))
    monkeypatch.setattr(batches, "_attempt", lambda *_: None)
    with pytest.raises(OutOfMemory, match="out of memory with one row"):
        choose_engine(view)
