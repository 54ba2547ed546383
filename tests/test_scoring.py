"""Scoring against one option at a time, in every family, packed or not, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paramspec.errors import InputError
from paramspec.hooks import mask_value_vectors, value_vector_view
from paramspec.scoring import (
    Engine,
    Item,
    Request,
    _packed_rows,
    answer_matches,
    choose,
    choose_engine,
    score_one_at_a_time,
    score_options,
)
from toys import FAMILIES, toy_model

# Families whose attention is biased by distances that `position_ids` does not set.
PLAIN_FAMILIES = {"bloom", "mpt"}


def random_items(count, seed=0, longest=9):
    """Questions with shared beginnings, options of one to four tokens, and equal options."""
    draw = np.random.default_rng(seed)
    stems = [tuple(draw.integers(3, 97, draw.integers(1, longest))) for _ in range(4)]
    items = []
    for _ in range(count):
        context = stems[draw.integers(4)] + tuple(draw.integers(3, 97, draw.integers(1, 4)))
        options = [tuple(draw.integers(3, 97, draw.integers(1, 5))) for _ in range(4)]
        options[1] = options[0][:1] + options[1]
        items.append(
            Item(tuple(map(int, context)), tuple(tuple(map(int, option)) for option in options))
        )
    return items


def random_masks(view, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    masks = [torch.rand(view.layers, view.width, generator=draw) > 0.3 for _ in range(count - 1)]
    return [*masks, None]


@pytest.fixture(scope="module", params=FAMILIES)
def view(request):
    return value_vector_view(toy_model(request.param))


def test_scores_equal_one_option_at_a_time(view):
    items, keeps = random_items(12), random_masks(view, 3)
    requests = [Request(item, index % 3) for index, item in enumerate(items)]
    for batch_tokens in (16, 200):
        scores = score_options(view, requests, keeps, row_tokens=24, batch_tokens=batch_tokens)
        for request, score in zip(requests, scores, strict=True):
            expected = score_one_at_a_time(view, request.item, keeps[request.mask])
            torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def test_packed_rows_are_used_where_they_are_right(view):
    engine = choose_engine(view)
    family = type(view.model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    expected = "plain" if family.lower() in PLAIN_FAMILIES else "packed"
    assert engine.name == expected, engine.reason


def test_masks_change_scores_of_their_own_rows_only():
    view = value_vector_view(toy_model("llama"))
    items = random_items(8)
    keeps = random_masks(view, 2)
    alone = score_options(view, [Request(item, 1) for item in items], keeps)
    mixed = score_options(view, [Request(item, i % 2) for i, item in enumerate(items)], keeps)
    for index in range(8):
        same = torch.allclose(alone[index], mixed[index], atol=1e-3)
        assert same == (index % 2 == 1)


def test_order_and_budget_do_not_move_scores():
    view = value_vector_view(toy_model("gemma2"))
    keeps = random_masks(view, 3)
    requests = [Request(item, i % 3) for i, item in enumerate(random_items(20))]
    expected = score_options(view, requests, keeps)
    for row_tokens, batch_tokens in ((1, 1), (7, 50), (64, 64), (400, 4000)):
        scores = score_options(
            view, requests[::-1], keeps, row_tokens=row_tokens, batch_tokens=batch_tokens
        )[::-1]
        for one, other in zip(scores, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_a_row_holds_each_needed_token_once():
    """Oracle: the set of distinct prefixes of all that must be read."""
    items = random_items(15)
    numbered = [(index, Request(item, 0)) for index, item in enumerate(items)]
    rows = list(_packed_rows(numbered, row_tokens=10_000))
    prefixes = {
        (item.context + option)[:size]
        for item in items
        for option in item.options
        for size in range(1, len(item.context) + len(option))
    }
    assert len(rows) == 1
    assert len(rows[0].tokens) == len(prefixes)


def test_rows_keep_to_their_budget_and_lose_no_request():
    items = random_items(40)
    numbered = [(index, Request(item, index % 2)) for index, item in enumerate(items)]
    rows = list(_packed_rows(numbered, row_tokens=40))
    assert len(rows) > 2
    assert max(len(row.tokens) for row in rows) <= 40
    assert {read.request for row in rows for read in row.reads} == set(range(40))
    for row in rows:
        assert {numbered[read.request][1].mask for read in row.reads} == {row.mask}


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_paths_longer_than_the_sliding_window_are_still_right(family):
    view = value_vector_view(toy_model(family))  # window of 32
    long = random_items(1, longest=2)[0]
    draw = np.random.default_rng(3)
    long = Item(tuple(map(int, draw.integers(3, 97, 45))), long.options)
    requests = [Request(item, 0) for item in (*random_items(3), long)]
    assert choose_engine(view).longest == 32
    for request, score in zip(requests, score_options(view, requests, [None]), strict=True):
        expected = score_one_at_a_time(view, request.item)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def test_a_model_that_ignores_the_tree_is_scored_plainly():
    model = toy_model("llama")
    forward = model.model.forward

    def causal_only(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = causal_only
    engine = choose_engine(value_vector_view(model))
    assert engine.name == "plain"
    assert "differ" in engine.reason


def test_an_attention_without_tree_masks_is_scored_plainly():
    view = value_vector_view(toy_model("llama"))
    assert choose_engine(view).name == "packed"
    view.model.config._attn_implementation = "flash_attention_2"
    engine = choose_engine(view)
    assert engine.name == "plain"
    assert "flash_attention_2" in engine.reason


def test_eager_attention_gets_an_additive_mask():
    model = toy_model("llama")
    model.set_attn_implementation("eager")
    view = value_vector_view(model)
    item = random_items(1)[0]
    engine = Engine("packed", "asked for")
    score = score_options(view, [Request(item, 0)], [None], engine=engine)[0]
    torch.testing.assert_close(score, score_one_at_a_time(view, item), rtol=0, atol=1e-3)


def test_masked_scores_are_not_changed_by_a_mask_left_over():
    view = value_vector_view(toy_model("qwen2"))
    item = random_items(1)[0]
    before = score_one_at_a_time(view, item)
    score_options(view, [Request(item, 0)], random_masks(view, 2))
    torch.testing.assert_close(score_one_at_a_time(view, item), before, rtol=0, atol=0)


def test_progress_counts_every_request_once():
    view = value_vector_view(toy_model("llama"))
    requests = [Request(item, 0) for item in random_items(17)]
    for engine in (Engine("packed", ""), Engine("plain", "")):
        done = []
        score_options(view, requests, [None], engine=engine, batch_tokens=60, progress=done.append)
        assert sum(done) == 17
        assert len(done) > 1


@pytest.mark.parametrize("budget", [{"row_tokens": 0}, {"batch_tokens": 0}])
def test_a_budget_of_nothing_is_refused(budget):
    view = value_vector_view(toy_model("llama"))
    with pytest.raises(InputError, match=r"tokens 0: expected at least 1"):
        score_options(view, [Request(random_items(1)[0], 0)], [None], **budget)


def test_a_question_longer_than_the_context_is_refused():
    view = value_vector_view(toy_model("llama"))
    item = Item(tuple(range(3, 68)), ((5,), (6,)))
    with pytest.raises(InputError, match="65 tokens does not fit the model's context of 64"):
        score_options(view, [Request(item, 0)], [None])


def test_choice_by_sum_and_by_characters():
    # lm-evaluation-harness: acc = argmax(sum), acc_norm = argmax(sum / characters).
    assert choose([-4.0, -6.0], ["ab", "abcdef"]) == (0, 1)
    assert choose([-4.0, -13.0], ["ab", "abcdef"]) == (0, 0)


def test_squad_exact_match():
    assert answer_matches(" the  Paris.", ["paris"])
    assert answer_matches("A U.S.", ["USA", "US"])
    assert not answer_matches("Paris, France", ["Paris"])
    assert not answer_matches("", ["Paris"])


def test_the_mask_is_gone_when_scoring_fails():
    view = value_vector_view(toy_model("llama"))
    with pytest.raises(InputError), mask_value_vectors(view, torch.ones(1, 1, 1).bool()):
        pass
    assert not any(module._forward_pre_hooks for module in view.modules)
