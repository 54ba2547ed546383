"""The value-vector view against a brute-force oracle that edits weights, in every family."""

from __future__ import annotations

import pytest
import torch

from oracles import coefficients_alone, with_vectors_zeroed
from paramspec.errors import InputError
from paramspec.method.hooks import mask_value_vectors, record_coefficients, value_vector_view
from paramspec.models.registry import load_registry, published_config
from toys import FAMILIES, MIXTURES, toy_model

ROWS, TOKENS = 3, 7


@pytest.fixture(scope="module", params=FAMILIES)
def view(request):
    return value_vector_view(toy_model(request.param))


@pytest.fixture
def llama():
    return toy_model("llama")


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def logits(model, tokens, attention_mask=None):
    if attention_mask is None:
        attention_mask = torch.ones_like(tokens)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits


def random_keep(view, rows):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(view.layers, rows, view.width, generator=generator) > 0.3


def assert_each_row_has_its_own_mask(view, tokens):
    keep = random_keep(view, ROWS)
    with mask_value_vectors(view, keep):
        masked = logits(view.model, tokens)
    for row in range(ROWS):
        expected = logits(with_vectors_zeroed(view, keep[:, row]), tokens)[row]
        torch.testing.assert_close(masked[row], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(masked[row], logits(view.model, tokens)[row], atol=1e-2)


def test_masking_rows_equals_editing_the_weights_one_row_at_a_time(view, tokens):
    assert (view.layers, view.hidden) == (3, 32)
    assert view.vectors(0).shape == (view.width, view.hidden)
    assert_each_row_has_its_own_mask(view, tokens)


def test_every_architecture_of_the_registry_is_among_these():
    tested = {config for config, _ in FAMILIES.values()}
    for spec in load_registry().values():
        assert type(published_config(spec)).__name__ in tested, spec.id


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("qwen2", torch.bfloat16)],
)
def test_one_mask_for_all_rows_is_bit_identical_to_editing_the_weights(family, dtype, tokens):
    view = value_vector_view(toy_model(family, dtype=dtype))
    keep = random_keep(view, 1)
    with mask_value_vectors(view, keep):
        masked = logits(view.model, tokens)
    assert torch.equal(masked, logits(with_vectors_zeroed(view, keep[:, 0]), tokens))


def test_hooks_are_gone_after_the_block_and_after_an_error(view, tokens):
    before = logits(view.model, tokens)
    with pytest.raises(KeyError), mask_value_vectors(view, random_keep(view, 1)):
        raise KeyError
    with record_coefficients(view, torch.ones(ROWS, TOKENS)):
        pass
    assert torch.equal(before, logits(view.model, tokens))
    assert not any(module._forward_pre_hooks for module in view.modules)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_coefficients_equal_those_of_each_prompt_alone(view, tokens, position):
    lengths = [7, 4, 2]
    attention_mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    with record_coefficients(view, attention_mask, position) as recorded:
        logits(view.model, tokens, attention_mask)
    for row, length in enumerate(lengths):
        expected = coefficients_alone(view, tokens[row, :length].tolist(), position)
        torch.testing.assert_close(recorded[row], expected, rtol=1e-4, atol=1e-5)


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


# What is refused


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
        (rename, "no down projection found"),
        (scale, r"layers\.1\.mlp\.down_proj differs"),
        (squash, r"layers\.2\..*output of its MLP"),
    ],
)
def test_a_view_that_does_not_hold_is_refused(change, message, llama):
    change(llama)
    with pytest.raises(InputError, match=message):
        value_vector_view(llama)


@pytest.mark.parametrize("shape", [(3, 1, 48), (3, 1, 47), (2, 1, 48), (3, 48)])
def test_a_mask_of_the_wrong_kind_is_refused(shape, llama):
    keep = torch.ones(shape, dtype=torch.float32 if shape == (3, 1, 48) else torch.bool)
    with (
        pytest.raises(InputError, match=r"expected torch\.bool \[3, batch, 48\]"),
        mask_value_vectors(value_vector_view(llama), keep),
    ):
        pass


def test_an_unknown_position_is_refused(llama):
    recording = record_coefficients(value_vector_view(llama), torch.ones(1, 2), "first")
    with pytest.raises(InputError, match="position 'first'"), recording:
        pass
