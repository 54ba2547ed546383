"""Faster operators against torch's own; and the model is as it was when the block ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from paramspec import kernels
from paramspec.kernels import faster_layers, grouped_attention, linear_of
from toys import FAMILIES, toy_model

ENOUGH = 10**6
GATED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo",
    "olmo2",
    "granite",
}
GATED |= {"cohere", "stablelm"}


@pytest.fixture
def packing(monkeypatch):
    """Layers are packed, whether that pays on this machine or not."""
    if not kernels._packing_works(torch.float32):
        pytest.skip("torch has no packed linear layers here")
    monkeypatch.setattr(kernels, "packing_pays", lambda dtype: True)


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_give_the_same_logits_and_are_gone_afterwards(family, packing):
    model = toy_model(family)
    tokens = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = logits(model, tokens)
    with faster_layers(model, tokens=ENOUGH) as packed:
        assert packed
        swapped = {module for module in model.modules() if "forward" in vars(module)}
        fused = {module for module in swapped if type(module) not in (nn.Linear, Conv1D)}
        covered = {part for mlp in fused for part in (mlp.gate_proj, mlp.up_proj)}
        known = {module for module in model.modules() if type(module) in (nn.Linear, Conv1D)}
        assert (swapped - fused) | covered == known - {model.get_output_embeddings()}
        assert len(fused) == (3 if family in GATED else 0)
        torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-3)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits(model, tokens), expected)


def test_a_failure_leaves_no_layer_behind(packing):
    model = toy_model("llama")
    with pytest.raises(KeyError), faster_layers(model, tokens=ENOUGH):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_few_tokens_no_wish_or_no_room_pack_nothing(packing, monkeypatch):
    model = toy_model("llama")
    for wish in ({"tokens": 10}, {"tokens": ENOUGH, "prepacked": False}):
        with faster_layers(model, **wish) as packed:
            assert not packed
    monkeypatch.setattr(kernels.psutil, "virtual_memory", lambda: type("", (), {"available": 9}))
    with faster_layers(model, tokens=ENOUGH) as packed:
        assert not packed


def test_what_accelerate_has_placed_is_left_alone(packing):
    model = toy_model("llama")
    placed = model.model.layers[0].mlp.up_proj
    own = placed.forward
    placed.forward = lambda states: own(states)
    kept = placed.forward
    with faster_layers(model, tokens=ENOUGH):
        assert placed.forward is kept
    assert placed.forward is kept


def test_running_out_of_memory_while_packing_leaves_the_rest_as_it_is(packing, monkeypatch):
    model, pack, calls = toy_model("llama"), kernels._pack, []

    def scarce(weight):
        calls.append(weight)
        if len(calls) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pack(weight)

    monkeypatch.setattr(kernels, "_pack", scarce)
    tokens = torch.arange(3, 14)[None]
    expected = logits(model, tokens)
    with faster_layers(model, tokens=ENOUGH) as packed:
        assert not packed  # and so the unembedding is not packed either
        assert sum("forward" in vars(module) for module in model.modules()) == 3
        torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-3)


def test_a_linear_layer_with_a_bias(packing):
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*s, generator=draw) for s in ((5, 7), (11, 7), (11,)))
    expected = states @ weight.T + bias
    for prepacked in (True, False):
        actual = linear_of(weight, bias, prepacked=prepacked)(states)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_missing_operators_are_done_without(monkeypatch):
    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(kernels, "_pack", missing)
    assert not kernels._packing_works(torch.float32)


def test_operators_that_give_other_numbers_are_done_without(monkeypatch):
    run = functional.linear
    monkeypatch.setattr(kernels, "_pack", lambda weight: weight)
    monkeypatch.setattr(kernels, "_run_packed", lambda states, packed, bias: run(states, packed))
    assert kernels._packing_works(torch.float32)
    monkeypatch.setattr(
        kernels, "_run_packed", lambda states, packed, bias: 1.001 * run(states, packed)
    )
    assert not kernels._packing_works(torch.float32)


@pytest.mark.parametrize("shared", [1, 3, 9])
def test_grouped_attention_is_attention(shared):
    """Against a loop over heads, in double precision."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 9, 7, 4, generator=draw)
    key, value = (torch.randn(2, shared, 7, 4, generator=draw) for _ in range(2))
    hidden = torch.rand(2, 1, 7, 7, generator=draw) > 0.6
    hidden[:, :, range(7), range(7)] = False
    for batch in (1, 2):  # one mask for all rows, or one each
        bias = torch.zeros(batch, 1, 7, 7).masked_fill(hidden[:batch], torch.finfo().min)
        actual, _ = grouped_attention(None, query, key, value, bias, scaling=0.3)
        for row in range(2):
            for head in range(9):
                own = head // (9 // shared)
                scores = 0.3 * query[row, head].double() @ key[row, own].double().T
                scores += bias[row % batch, 0]
                expected = scores.softmax(-1) @ value[row, own].double()
                found = actual[row, :, head].double()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bfloat16_attends_in_groups_and_is_as_before_afterwards(family):
    model = toy_model(family, dtype=torch.bfloat16)
    before = model.config._attn_implementation
    tokens = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    bias = torch.full((1, 1, 11, 11), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
    expected = logits(model, tokens, attention_mask=bias)
    with faster_layers(model, tokens=ENOUGH):
        grouped = model.config._attn_implementation == kernels.GROUPED
        assert grouped == (before == "sdpa")
        error = (logits(model, tokens, attention_mask=bias) - expected).abs().max()
    assert error < 0.1 * expected.std()
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, tokens, attention_mask=bias), expected)
