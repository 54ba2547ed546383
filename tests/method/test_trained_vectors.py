"""Value vectors that are trained, or replaced, within a block: a model leaves it as it entered."""

from __future__ import annotations

import copy
from contextlib import ExitStack, suppress

import pytest
import torch

from paramspec.errors import InputError
from paramspec.method.hooks import (
    mask_value_vectors,
    replace_value_vectors,
    train_value_vectors,
    value_vector_view,
)
from toys import same_weights, toy_model, value_vectors, weights_of

LAYERS, WIDTH, HIDDEN = 3, 48, 32
DRAW = torch.Generator().manual_seed(0)
SOME = (torch.rand(LAYERS, WIDTH, generator=DRAW) < 0.3).nonzero().int()


@pytest.fixture(params=["llama", "gpt2", "opt"])
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return toy_model(family)


@torch.no_grad()
def logits(model):
    tokens = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(1))
    return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


@torch.no_grad()
def move(trained):
    """Give every offset of the block a value."""
    for offset in trained.offsets.values():
        offset.copy_(torch.randn(offset.shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_leaves_the_block_as_it_entered(model, raises):
    view, before, output = value_vector_view(model), weights_of(model), logits(model)
    with suppress(KeyError), train_value_vectors(view, SOME) as trained:
        assert torch.equal(logits(model), output)  # nothing has moved yet
        move(trained)
        assert not torch.allclose(logits(model), output, atol=0.1)
        if raises:
            raise KeyError
    same_weights(before, weights_of(model))
    assert torch.equal(logits(model), output)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mask_within", [True, False])
def test_a_masked_vector_contributes_nothing_moved_or_not(model, family, mask_within):
    """Each row under its own mask, against editing weights a row at a time."""
    view = value_vector_view(model)
    keep = torch.rand(LAYERS, 3, WIDTH, generator=torch.Generator().manual_seed(2)) > 0.3
    with ExitStack() as stack:
        if not mask_within:
            stack.enter_context(mask_value_vectors(view, keep))
        trained = stack.enter_context(train_value_vectors(view, SOME))
        move(trained)
        if mask_within:
            stack.enter_context(mask_value_vectors(view, keep))
        output = logits(model)
    both = 0
    for row in range(3):
        edited = copy.deepcopy(model)
        for layer, own in enumerate(value_vectors(edited, family)):
            chosen = SOME[SOME[:, 0] == layer, 1].long()
            own[chosen] += trained.offsets[str(layer)].detach()
            own[~keep[layer, row]] = 0
            both += int((~keep[layer, row, chosen]).sum())
        torch.testing.assert_close(output[row], logits(edited)[row], rtol=1e-4, atol=1e-4)
    assert both > 20


@pytest.mark.parametrize("raises", [False, True])
def test_replaced_vectors_come_back_bit_by_bit(model, family, raises):
    view, before, output = value_vector_view(model), weights_of(model), logits(model)
    draw = torch.Generator().manual_seed(3)
    vectors = SOME[torch.randperm(len(SOME), generator=draw)]  # in any order
    values = torch.randn(len(vectors), HIDDEN, generator=draw)
    edited = copy.deepcopy(model)
    for layer, own in enumerate(value_vectors(edited, family)):
        rows = vectors[:, 0] == layer
        own[vectors[rows, 1].long()] = values[rows]
    with suppress(KeyError), replace_value_vectors(view, vectors, values):
        assert torch.is_grad_enabled()
        inside = logits(model)
        if raises:
            raise KeyError
    same_weights(before, weights_of(model))
    assert torch.equal(logits(model), output)
    assert torch.equal(inside, logits(edited))
    assert not torch.allclose(inside, output, atol=0.1)


@pytest.mark.parametrize("vectors", [[], [[0, 1], [0, 1]], [[0, -1]], [[3, 0]], [[0, 48]]])
def test_vectors_that_are_not_there_or_given_twice_are_refused(vectors):
    view, chosen = value_vector_view(toy_model("llama")), torch.tensor(vectors).view(-1, 2).int()
    with pytest.raises(InputError, match="expected at least one"):
        train_value_vectors(view, chosen).__enter__()
