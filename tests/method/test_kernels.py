"""Packed linear layers against torch's own; the model is unchanged when the block ends."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from paramspec.method import kernels
from paramspec.method.kernels import packed_layers
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


def test_missing_operators_are_done_without_and_a_lack_of_memory_is_reported(monkeypatch):
    failing = Mock(side_effect=AttributeError("no such operator"))
    monkeypatch.setattr(kernels, "_pack", failing)
    assert not kernels.packs.__wrapped__()
    failing.side_effect = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        kernels.packs.__wrapped__()
