"""Faster operators against torch's own; and the model is as it was when the block ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from paramspec.execution.limits import OutOfMemory
from paramspec.method import kernels
from paramspec.method.kernels import faster_layers, linear_of
from toys import FAMILIES, toy_model

ENOUGH = 10**6
# Those whose layers are LLaMA's, and what is like them but for something that must not be missed:
# norms of heads, other norms or activations, scaled sums.
DECODERS = {"llama", "mistral", "qwen2", "granite"}
OTHERS = {"qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "cohere", "stablelm"}
GATED = DECODERS | OTHERS


def require_packing(dtype):
    """Skip a test of packed layers where there are none, as of bfloat16 on some processors."""
    if not kernels._packing_works(dtype):
        pytest.skip(f"torch has no packed linear layers of {dtype} here")


@pytest.fixture
def packing(monkeypatch):
    """Layers are packed, whether that pays on this machine or not."""
    require_packing(torch.float32)
    monkeypatch.setattr(kernels, "packs", lambda dtype: True)


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_give_the_same_logits_and_are_gone_afterwards(family, packing):
    model = toy_model(family)
    tokens = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    causal = additive(torch.ones(1, 1, 11, 11).bool().tril())
    given = {"attention_mask": causal} if family in DECODERS else {}
    expected = logits(model, tokens, **given)
    with faster_layers(model, tokens=ENOUGH) as faster:
        assert faster.packs
        swapped = {module for module in model.modules() if "forward" in vars(module)}
        linear = {module for module in model.modules() if type(module) in (nn.Linear, Conv1D)}
        wider = swapped - linear  # decoder layers, gated MLPs: all of them but the last step
        within = [{part for part in each.modules() if part in linear} for each in wider]
        assert set().union(*within, swapped & linear) == linear - {model.get_output_embeddings()}
        assert all(len(parts & swapped) == 1 for parts in within)
        assert len(wider) == (3 if family in GATED else 0)
        torch.testing.assert_close(logits(model, tokens, **given), expected, rtol=0, atol=1e-3)
    assert not forwards(model)
    assert torch.equal(logits(model, tokens, **given), expected)


def test_few_tokens_no_wish_or_no_room_pack_nothing(packing, monkeypatch):
    model = toy_model("llama")
    for wish in ({"tokens": 10}, {"tokens": ENOUGH, "prepacked": False}):
        with faster_layers(model, **wish) as faster:
            assert not faster.packs
    monkeypatch.setattr(kernels, "available_memory", lambda: 9)
    with faster_layers(model, tokens=ENOUGH) as faster:
        assert not faster.packs


def test_what_accelerate_has_placed_is_left_alone(packing):
    model = toy_model("llama")
    placed = model.model.layers[0].mlp.up_proj
    own = placed.forward
    placed.forward = lambda states: own(states)
    kept = placed.forward
    with faster_layers(model, tokens=ENOUGH):
        assert placed.forward is kept
    assert placed.forward is kept


def scarce_memory(monkeypatch, most):
    """Memory for so many packed weights."""
    pack, calls = kernels._pack, []

    def scarce(weight):
        calls.append(weight)
        if len(calls) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pack(weight)

    monkeypatch.setattr(kernels, "_pack", scarce)


def forwards(model):
    """The forward passes that were put into the model."""
    return [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]


def test_running_out_of_memory_while_packing_leaves_the_rest_as_it_is(packing, monkeypatch):
    model, tokens = toy_model("gpt2"), torch.arange(3, 14)[None]
    scarce_memory(monkeypatch, 3)
    expected = logits(model, tokens)
    with faster_layers(model, tokens=ENOUGH) as faster:
        assert not faster.packs  # and so the unembedding is not packed either
        assert len(forwards(model)) == 3
        torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-3)


def test_a_linear_layer_with_a_bias(packing):
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*s, generator=draw) for s in ((5, 7), (11, 7), (11,)))
    expected = states @ weight.T + bias
    for prepacked in (True, False):
        actual = linear_of(weight, bias, prepacked=prepacked)(states)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    packed, anew = (linear_of(weight, bias, copied=copied) for copied in (True, False))
    assert torch.equal(anew(states), packed(states))
    anew_again, weight[:] = linear_of(weight, bias, copied=False), 0
    assert torch.equal(anew_again(states), bias.expand(5, 11))  # it has no weight of its own


def test_operators_that_are_missing_or_give_other_numbers_are_done_without(monkeypatch):
    run = functional.linear
    monkeypatch.setattr(kernels, "_pack", lambda weight: weight)
    for factor in (1, 1.001):
        monkeypatch.setattr(
            kernels, "_run_packed", lambda states, packed, bias, f=factor: f * run(states, packed)
        )
        assert kernels._packing_works(torch.float32) == (factor == 1)

    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(kernels, "_pack", missing)
    assert not kernels._packing_works(torch.float32)


# --- decoder layers -----------------------------------------------------------------------------


def random_tree(rows, tokens, draw):
    """Bool `[rows, 1, tokens, tokens]`: itself and its ancestors, none of which is certain."""
    sees = torch.eye(tokens, dtype=torch.bool).repeat(rows, 1, 1)
    for row in sees:
        for token in range(1, tokens):
            parent = int(torch.randint(-1, token, (), generator=draw))
            if parent >= 0:
                row[token] |= row[parent]
    return sees[:, None]


def additive(sees, dtype=torch.float32):
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


@pytest.mark.parametrize("tokens", [1, 7, 32, 33, 70])
@pytest.mark.parametrize("shared", [1, 3, 9])
def test_attention_by_blocks_is_attention(shared, tokens):
    """Against a loop over heads and all pairs of tokens, in double precision."""
    draw = torch.Generator().manual_seed(tokens)
    merged = torch.randn(2, tokens, 9 + 2 * shared, 4, generator=draw)
    rotated = torch.randn(2, tokens, 9 + shared, 4, generator=draw)
    sees = random_tree(2, tokens, draw)
    for rows in (1, 2):  # one mask for all rows, or one each
        bias = additive(sees[:rows])
        blocks = kernels._Blocks.of(bias, 2, 9, shared)
        flat = rotated.reshape(-1, 4), merged.reshape(-1, 4)
        actual = blocks.attend(*flat, scaling=0.3).view(2, tokens, 9, 4)
        for row in range(2):
            for head in range(9):
                own = head // (9 // shared)
                query, key = rotated[row, :, head], rotated[row, :, 9 + own]
                scores = 0.3 * query.double() @ key.double().T + bias[row % rows, 0]
                value = merged[row, :, 9 + shared + own].double()
                expected = scores.softmax(-1) @ value
                found = actual[row, :, head].double()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_block_holds_no_more_keys_than_its_queries_see():
    sees = torch.eye(96, dtype=torch.bool)
    sees[:, :3] = torch.ones(96, 3).bool().tril()
    blocks = kernels._Blocks.of(additive(sees[None, None]), 1, 2, 1)
    # 32 queries and the three at the root, to a multiple of sixteen.
    assert blocks.bias.shape == (3, 2 * 32, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(GATED))
def test_decoder_layers_are_found_and_give_the_same(family, dtype, packing):
    require_packing(dtype)
    model = toy_model(family, dtype=dtype)
    with torch.no_grad():  # a norm's weight of one would hide that it is left out
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 97, (2, 40), generator=draw)
    sees = random_tree(2, 40, draw)
    mask = additive(sees, dtype)
    given = {"attention_mask": mask, "position_ids": sees[:, 0].sum(-1) - 1}
    if getattr(model.config, "layer_types", None):
        given["attention_mask"] = {"full_attention": mask, "sliding_attention": mask}
    expected = logits(model, tokens, **given)
    with faster_layers(model, tokens=ENOUGH):
        decoders = sum(isinstance(each, kernels._Decoder) for each in forwards(model))
        assert decoders == (3 if family in DECODERS else 0)
        error = (logits(model, tokens, **given) - expected).abs()
    assert error.max() < 1e-3 if dtype == torch.float32 else error.mean() < 0.05 * expected.std()
    assert torch.equal(logits(model, tokens, **given), expected)


@pytest.mark.parametrize("change", ["residual", "activation", "norm"])
def test_a_layer_that_only_looks_alike_is_left_alone(change, packing):
    model = toy_model("granite")
    for layer in model.model.layers:
        if change == "residual":
            layer.residual_multiplier = 0.9
        elif change == "activation":
            layer.mlp.act_fn = nn.ReLU()
        else:
            layer.input_layernorm.forward = lambda states: states
    with faster_layers(model, tokens=ENOUGH):
        assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_decoder_layers_are_replaced_all_or_none(packing, monkeypatch):
    """Between them the states are float32, which a layer of the model's own does not take."""
    require_packing(torch.bfloat16)
    model, gated = toy_model("llama", dtype=torch.bfloat16), kernels._gated_forward
    odd = model.model.layers[1].mlp
    monkeypatch.setattr(kernels, "_gated_forward", lambda m: None if m is odd else gated(m))
    with faster_layers(model, tokens=ENOUGH):
        assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_out_of_memory_in_a_decoder_layer_leaves_all_of_them(packing, dtype, monkeypatch):
    require_packing(dtype)
    model = toy_model("llama", dtype=dtype)
    scarce_memory(monkeypatch, 6)  # none for the second layer
    if dtype == torch.bfloat16:  # the numbers of torch's own layers are others
        with (
            pytest.raises(OutOfMemory, match=r"bfloat16 weights.* use float32.* a smaller model"),
            faster_layers(model, tokens=ENOUGH),
        ):
            pass
        assert not forwards(model)
        return
    with faster_layers(model, tokens=ENOUGH) as faster:
        assert not faster.packs
        assert not forwards(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_only_the_places_that_are_read_are_computed(family, packing):
    model = toy_model(family)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 97, (2, 20), generator=draw)
    mask = additive(random_tree(2, 20, draw))
    places = torch.tensor([[0, 5, 19], [7, 7, 2]])
    with torch.no_grad(), faster_layers(model, tokens=ENOUGH) as faster:
        whole = model.base_model(input_ids=tokens, attention_mask=mask)[0]
        read = torch.stack([row[own] for row, own in zip(whole, places, strict=True)])
        assert faster.read_only(places) == (family in DECODERS)
        if family in DECODERS:
            actual = model.base_model(input_ids=tokens, attention_mask=mask)[0]
            torch.testing.assert_close(actual, read, rtol=0, atol=1e-5)
