"""The value-vector view against a brute-force oracle that edits weights, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError
from paramspec.method.hooks import mask_value_vectors, record_coefficients, value_vector_view
from paramspec.models.registry import load_registry, published_config
from toys import FAMILIES, MIXTURES, toy_model

ROWS, TOKENS = 3, 7


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return toy_model(request.param)


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def logits(model, tokens, attention_mask=None):
    if attention_mask is None:
        attention_mask = torch.ones_like(tokens)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits


def with_vectors_zeroed(model, view, keep):
    """The oracle: a copy of the model in which the value vectors themselves are zero."""
    edited = copy.deepcopy(model)
    for layer, name in enumerate(view.names):
        module = edited.get_submodule(name)
        for vector in (~keep[layer]).nonzero()[:, 0].tolist():
            if isinstance(module, Conv1D):
                module.weight.data[vector, :] = 0
            else:
                module.weight.data[:, vector] = 0
    return edited


def random_keep(view, rows, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(view.layers, rows, view.width, generator=generator) > share


def test_view_has_one_down_projection_a_layer(model):
    view = value_vector_view(model)
    assert view.layers == 3
    assert view.vectors(0).shape == (view.width, view.hidden)
    assert view.hidden == 32


def test_masking_rows_equals_editing_the_weights_one_row_at_a_time(model, tokens):
    view = value_vector_view(model)
    keep = random_keep(view, ROWS)
    with mask_value_vectors(view, keep):
        masked = logits(model, tokens)
    for row in range(ROWS):
        edited = with_vectors_zeroed(model, view, keep[:, row])
        torch.testing.assert_close(masked[row], logits(edited, tokens)[row], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, logits(model, tokens), atol=1e-2)


def test_one_mask_for_all_rows_is_bit_identical_to_editing_the_weights(model, tokens):
    view = value_vector_view(model)
    keep = random_keep(view, 1)
    with mask_value_vectors(view, keep):
        masked = logits(model, tokens)
    edited = with_vectors_zeroed(model, view, keep[:, 0])
    assert torch.equal(masked, logits(edited, tokens))


def test_every_architecture_of_the_registry_is_among_these():
    tested = {config for config, _ in FAMILIES.values()}
    for spec in load_registry().values():
        assert type(published_config(spec)).__name__ in tested, spec.id


def test_hooks_are_gone_after_the_block_and_after_an_error(model, tokens):
    view = value_vector_view(model)
    before = logits(model, tokens)
    with pytest.raises(KeyError), mask_value_vectors(view, random_keep(view, 1)):
        raise KeyError
    with record_coefficients(view, torch.ones(ROWS, TOKENS)):
        pass
    assert torch.equal(before, logits(model, tokens))
    assert not any(module._forward_pre_hooks for module in view.modules)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_coefficients_equal_those_of_each_prompt_alone(model, tokens, position):
    """Oracle: each prompt by itself, without padding, reduced by hand."""
    view = value_vector_view(model)
    lengths = [7, 4, 2]
    attention_mask = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    for row, length in enumerate(lengths):
        attention_mask[row, :length] = 1
    with record_coefficients(view, attention_mask, position) as recorded:
        logits(model, tokens, attention_mask)
    for row, length in enumerate(lengths):
        inputs = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, layer=layer, inputs=inputs: inputs.update({layer: args[0]})
            )
            for layer, module in enumerate(view.modules)
        ]
        logits(model, tokens[row : row + 1, :length])
        for hook in hooks:
            hook.remove()
        alone = torch.stack([inputs[layer].reshape(length, -1).abs() for layer in range(3)])
        expected = alone.mean(1) if position == "mean" else alone[:, -1]
        torch.testing.assert_close(recorded.coefficients[row], expected, rtol=1e-4, atol=1e-5)


def test_padding_with_infinities_does_not_reach_coefficients():
    model = toy_model("llama")
    view = value_vector_view(model)
    with record_coefficients(view, torch.tensor([[1, 1, 0]])) as recorded:
        for module in view.modules:
            inputs = torch.ones(1, 3, view.width)
            inputs[:, 2] = torch.inf
            module(inputs)
    assert torch.equal(recorded.coefficients, torch.ones(1, 3, view.width))


def test_masking_an_infinite_coefficient_removes_it():
    model = toy_model("llama")
    view = value_vector_view(model)
    keep = torch.ones(3, 1, view.width, dtype=torch.bool)
    keep[:, :, 5] = False
    inputs = torch.zeros(1, 1, view.width)
    inputs[..., 5] = torch.inf
    with mask_value_vectors(view, keep):
        assert torch.equal(view.modules[0](inputs), torch.zeros(1, 1, view.hidden))


def test_bfloat16_masking_is_bit_identical_to_editing_the_weights(tokens):
    model = toy_model("qwen2", dtype=torch.bfloat16)
    view = value_vector_view(model)
    keep = random_keep(view, 1)
    with mask_value_vectors(view, keep):
        masked = logits(model, tokens)
    assert torch.equal(masked, logits(with_vectors_zeroed(model, view, keep[:, 0]), tokens))


@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_of_experts_is_refused_by_name(family):
    model = toy_model(family)
    with pytest.raises(InputError, match=rf"{type(model).__name__}.*mixture of experts.*expert"):
        value_vector_view(model)


def test_an_unknown_name_is_refused():
    model = toy_model("llama")
    for layer in model.model.layers:
        layer.mlp.output = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(InputError, match="no down projection found"):
        value_vector_view(model)


def test_a_view_that_the_forward_pass_contradicts_is_refused():
    model = toy_model("llama")
    projection = model.model.layers[1].mlp.down_proj
    forward = projection.forward
    projection.forward = lambda x: 1.5 * forward(x)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj differs"):
        value_vector_view(model)


def test_an_mlp_that_adds_something_else_is_refused():
    model = toy_model("llama")
    mlp = model.model.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x).tanh()
    with pytest.raises(InputError, match="output of its MLP"):
        value_vector_view(model)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(3, 1, 48), "expected bool"),
        (torch.ones(3, 1, 47, dtype=torch.bool), "does not fit"),
        (torch.ones(2, 1, 48, dtype=torch.bool), "does not fit"),
    ],
)
def test_a_mask_of_the_wrong_kind_is_refused(keep, message):
    view = value_vector_view(toy_model("llama"))
    with pytest.raises(InputError, match=message), mask_value_vectors(view, keep):
        pass


def test_recording_nothing_is_refused():
    view = value_vector_view(toy_model("llama"))
    with (
        pytest.raises(InputError, match="position 'first'"),
        record_coefficients(view, torch.ones(1, 2), "first"),
    ):
        pass
    with (
        pytest.raises(InputError, match="no token to record"),
        record_coefficients(view, torch.zeros(1, 2)),
    ):
        pass
    with record_coefficients(view, torch.ones(1, 2)) as recorded:
        pass
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = recorded.coefficients
