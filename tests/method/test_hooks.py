"""The value-vector view against a brute-force oracle that edits weights, in every family."""

from __future__ import annotations

import copy
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import pytest
import torch

from oracles import coefficients_alone, with_vectors_zeroed
from paramspec.errors import InputError
from paramspec.method.hooks import (
    mask_value_vectors,
    record_coefficients,
    replace_value_vectors,
    train_value_vectors,
    value_vector_view,
)
from paramspec.models.registry import load_registry, published_config
from toys import FAMILIES, MIXTURES, same_weights, toy_model, value_vectors, weights_of

ROWS, TOKENS = 3, 7
LAYERS, WIDTH, HIDDEN = 3, 48, 32  # of most families


def draw(seed):
    return torch.Generator().manual_seed(seed)


IDS = torch.randint(3, 97, (ROWS, TOKENS), generator=draw(1))
SOME = (torch.rand(LAYERS, WIDTH, generator=draw(0)) < 0.3).nonzero().int()


@pytest.fixture(scope="module", params=FAMILIES)
def view(request):
    return value_vector_view(toy_model(request.param))


@pytest.fixture
def llama():
    return toy_model("llama")


@torch.no_grad()
def logits(model, attention_mask=None):
    attention_mask = torch.ones_like(IDS) if attention_mask is None else attention_mask
    return model(input_ids=IDS, attention_mask=attention_mask, use_cache=False).logits


def random_keep(view, rows, seed=0):
    return torch.rand(view.layers, rows, view.width, generator=draw(seed)) > 0.3


def test_masking_rows_equals_editing_the_weights_one_row_at_a_time(view):
    assert (view.layers, view.hidden) == (3, 32)
    assert view.vectors(0).shape == (view.width, view.hidden)
    keep, unmasked = random_keep(view, ROWS), logits(view.model)
    with mask_value_vectors(view, keep):
        masked = logits(view.model)
    for row in range(ROWS):
        expected = logits(with_vectors_zeroed(view, keep[:, row]))[row]
        torch.testing.assert_close(masked[row], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(masked[row], unmasked[row], atol=1e-2)


def test_every_architecture_of_the_registry_is_among_these():
    tested = {config for config, _ in FAMILIES.values()}
    for spec in load_registry().values():
        assert type(published_config(spec)).__name__ in tested, spec.id


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("qwen2", torch.bfloat16)],
)
def test_one_mask_for_all_rows_is_bit_identical_to_editing_the_weights(family, dtype):
    view = value_vector_view(toy_model(family, dtype=dtype))
    keep = random_keep(view, 1)
    with mask_value_vectors(view, keep):
        masked = logits(view.model)
    assert torch.equal(masked, logits(with_vectors_zeroed(view, keep[:, 0])))


def test_a_mask_by_the_mean_adds_what_the_masked_vectors_add_on_average(view):
    """Against a model whose masked vectors are zeroed, with a constant added to each layer."""
    keep = random_keep(view, 1)
    with record_coefficients(view, torch.ones(ROWS, TOKENS), signed=True) as recorded:
        logits(view.model)
    means = recorded.mean(0)
    with mask_value_vectors(replace(view, ablated=means), keep):
        masked = logits(view.model)
    edited = with_vectors_zeroed(view, keep[:, 0])
    for layer, module in enumerate(value_vector_view(edited).modules):
        constant = (means[layer] * ~keep[layer, 0]) @ view.vectors(layer)
        module.register_forward_hook(lambda _, args, out, constant=constant: out + constant)
    torch.testing.assert_close(masked, logits(edited), rtol=1e-4, atol=1e-4)
    with mask_value_vectors(view, keep):
        assert not torch.allclose(masked, logits(view.model), atol=1e-3)


def test_hooks_are_gone_after_the_block_and_after_an_error(view):
    before = logits(view.model)
    with pytest.raises(KeyError), mask_value_vectors(view, random_keep(view, 1)):
        raise KeyError
    with record_coefficients(view, torch.ones(ROWS, TOKENS)):
        pass
    assert torch.equal(before, logits(view.model))
    assert not any(module._forward_pre_hooks for module in view.modules)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_coefficients_equal_those_of_each_prompt_alone(view, position):
    lengths = [7, 4, 2]
    attention_mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    with record_coefficients(view, attention_mask, position, signed=True) as signed:
        logits(view.model, attention_mask)
    with record_coefficients(view, attention_mask, position) as recorded:
        logits(view.model, attention_mask)
    for row, length in enumerate(lengths):
        expected = coefficients_alone(view, IDS[row, :length].tolist(), position)
        torch.testing.assert_close(recorded[row], expected, rtol=1e-4, atol=1e-5)
        if position == "last":  # of one token
            torch.testing.assert_close(signed[row].abs(), expected, rtol=1e-4, atol=1e-5)
    assert (signed < 0).any() != (view.model.config.model_type == "opt")  # whose ReLU has no signs


def test_infinities_of_padding_and_of_what_is_masked_reach_nothing(llama):
    view = value_vector_view(llama)
    inputs = torch.ones(1, 3, view.width)
    inputs[:, 2] = torch.inf
    with record_coefficients(view, torch.tensor([[1, 1, 0]])) as recorded:
        for module in view.modules:
            module(inputs)
    assert torch.equal(recorded, torch.ones(1, 3, view.width))
    keep = torch.ones(3, 1, view.width, dtype=torch.bool)
    keep[:, :, 5] = False
    inputs = torch.zeros(1, 1, view.width)
    inputs[..., 5] = torch.inf
    with mask_value_vectors(view, keep):
        assert torch.equal(view.modules[0](inputs), torch.zeros(1, 1, view.hidden))


@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_of_experts_is_refused_by_name(family):
    model = toy_model(family)
    with pytest.raises(InputError, match=rf"{type(model).__name__}.*mixture of experts.*expert"):
        value_vector_view(model)


def rename(model):
    for layer in model.model.layers:
        layer.mlp.output = layer.mlp.down_proj
        del layer.mlp.down_proj


def scale(model):
    projection = model.model.layers[1].mlp.down_proj
    forward = projection.forward
    projection.forward = lambda x: 1.5 * forward(x)


def squash(model):
    mlp = model.model.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x).tanh()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "no down projection of a known name in its 3 layers"),
        (scale, r"layers\.1\.mlp\.down_proj differs"),
        (squash, r"layers\.2\..*output of its MLP"),
    ],
)
def test_a_view_that_does_not_hold_is_refused(change, message, llama):
    change(llama)
    with pytest.raises(InputError, match=message):
        value_vector_view(llama)


def train_and_replace(vectors):
    vectors = torch.tensor(vectors, dtype=torch.int32).reshape(-1, 2)
    values = torch.zeros(len(vectors), HIDDEN)
    return (
        partial(train_value_vectors, vectors=vectors),
        partial(replace_value_vectors, vectors=vectors, values=values),
    )


SHAPES = [(3, 1, 47), (2, 1, 48), (3, 48)]
KEEPS = [*(torch.ones(shape).bool() for shape in SHAPES), torch.ones(3, 1, 48)]
NO_VECTORS = [[], [[3, 0]], [[0, 48]], [[-1, 0]], [[0, -1]], [[1, 5], [1, 5]]]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([partial(mask_value_vectors, keep=keep) for keep in KEEPS], r"keep: .*\[3, batch, 48\]"),
        ([partial(record_coefficients, tokens_kept=IDS, position="first")], "position 'first'"),
        (sum(map(train_and_replace, NO_VECTORS), ()), "^value vectors .* of 3 layers"),
    ],
    ids=["masks", "position", "vectors"],
)
def test_what_does_not_fit_the_view_is_refused(blocks, message, llama):
    view, before = value_vector_view(llama), weights_of(llama)
    for block in blocks:
        with pytest.raises(InputError, match=message), block(view):
            pass
    same_weights(before, weights_of(llama))


# Value vectors that are trained, or replaced, within a block


@pytest.fixture(params=["llama", "gpt2", "opt"])
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return toy_model(family)


@torch.no_grad()
def move(trained):
    """Give every offset of the block a value."""
    for offset in trained.offsets.values():
        offset.copy_(torch.randn(offset.shape, generator=draw(5)))


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
    keep = random_keep(view, ROWS, seed=2)
    with ExitStack() as stack:
        if not mask_within:
            stack.enter_context(mask_value_vectors(view, keep))
        trained = stack.enter_context(train_value_vectors(view, SOME))
        move(trained)
        if mask_within:
            stack.enter_context(mask_value_vectors(view, keep))
        output = logits(model)
    both = 0
    for row in range(ROWS):
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
    vectors = SOME[torch.randperm(len(SOME), generator=draw(3))]  # in any order
    values = torch.randn(len(vectors), HIDDEN, generator=draw(4))
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
