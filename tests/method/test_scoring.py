"""Scoring against one option at a time, in every family, packed or not, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.method import scoring
from paramspec.method.generation import answer_matches
from paramspec.method.hooks import value_vector_view
from paramspec.method.rows import Engine, Item, Request
from paramspec.method.scoring import (
    choose,
    choose_engine,
    encode,
    mark,
    score_options,
)
from toy_study import toy_questions, toy_tokenizer
from toys import FAMILIES, toy_model

# Families whose attention is biased by distances that `position_ids` does not set.
PLAIN_FAMILIES = {"bloom", "mpt"}
PACKED = Engine("packed", "asked for")


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


def windowed(family):
    """A model whose window of 32 is shorter than one of its questions."""
    view = value_vector_view(toy_model(family))
    draw = np.random.default_rng(3)
    context = tuple(map(int, draw.integers(3, 97, 45)))
    items = [*random_items(3), Item(context, random_items(1)[0].options)]
    return view, [Request(item, 0) for item in items]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gemma3", "sdpa")],
)
def test_paths_longer_than_the_sliding_window_are_packed_and_right(family, attention):
    view, requests = windowed(family)
    view.model.set_attn_implementation(attention)
    engine = choose_engine(view)
    assert (engine.name, engine.longest) == ("packed", None)
    for request, score in zip(requests, score_options(view, requests, [None]), strict=True):
        expected = score_one_at_a_time(view, request.item)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_model_that_lets_a_tree_out_of_its_window_is_scored_plainly_there(family, monkeypatch):
    view, requests = windowed(family)
    inputs = scoring._inputs

    def without_window(*given):
        found = inputs(*given)
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "attention_window", lambda config: None)
            return found | {"attention_mask": inputs(*given)["attention_mask"]}

    monkeypatch.setattr(scoring, "_inputs", without_window)
    engine = choose_engine(view)
    assert (engine.name, engine.longest) == ("packed", 32)
    for request, score in zip(requests, score_options(view, requests, [None]), strict=True):
        expected = score_one_at_a_time(view, request.item)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def rows_of_each_layer(view, requests, keeps):
    """Into and out of every value-vector layer, in one forward pass after the other."""
    found, hooks = [], []
    for layer, module in enumerate(view.modules):
        mlp = view.model.get_submodule(view.names[layer].rpartition(".")[0])
        hooks.append(mlp.register_forward_pre_hook(lambda _, args: found.append(len(args[0]))))
        hooks.append(module.register_forward_hook(lambda *args: found.append(len(args[2]))))
    score_options(view, requests, keeps, engine=choose_engine(view))
    for hook in hooks:
        hook.remove()
    return found[-2 * view.layers :]


def test_what_no_mask_touches_is_computed_once():
    view = value_vector_view(toy_model("llama"))
    items = random_items(5)
    masks = random_masks(view, 3)
    requests = [Request(item, mask) for mask in range(3) for item in items]
    assert rows_of_each_layer(view, requests, masks) == [1, 3, 3, 3, 3, 3]
    for mask in masks[:2]:
        mask[:2] = True  # the last layer alone is masked
    assert rows_of_each_layer(view, requests, masks) == [1, 1, 1, 1, 1, 3]
    scores = score_options(view, requests, masks)
    for request, score in zip(requests, scores, strict=True):
        expected = score_one_at_a_time(view, request.item, masks[request.mask])
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def test_masks_that_mask_nothing_are_as_no_mask():
    view = value_vector_view(toy_model("llama"))
    item = random_items(1)[0]
    everything = torch.ones(view.layers, view.width, dtype=torch.bool)
    requests = [Request(item, mask) for mask in range(3)]
    for score in score_options(view, requests, [None, everything, everything.clone()]):
        expected = score_one_at_a_time(view, item)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gptj"])
def test_blocks_of_the_vocabulary_add_up(family, monkeypatch):
    """Scaled, capped and shifted logits too; 97 tokens in blocks of 10."""
    monkeypatch.setattr(scoring, "VOCABULARY_BLOCK", 10)
    view = value_vector_view(toy_model(family))
    items = random_items(4)
    scores = score_options(view, [Request(item, 0) for item in items], [None], engine=PACKED)
    for item, score in zip(items, scores, strict=True):
        torch.testing.assert_close(score, score_one_at_a_time(view, item), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_bfloat16_is_off_by_its_rounding_alone(family):
    view = value_vector_view(toy_model(family, dtype=torch.bfloat16))
    exact = value_vector_view(toy_model(family, dtype=torch.bfloat16).float())
    engine, keeps = choose_engine(view), random_masks(view, 2)
    requests = [Request(item, mask) for mask in range(2) for item in random_items(12)]
    assert engine.name == "packed"
    ours = torch.cat(score_options(view, requests, keeps, engine=engine))
    plain = [score_one_at_a_time(view, item, keeps[mask]) for item, mask in requests]
    right = [score_one_at_a_time(exact, item, keeps[mask]) for item, mask in requests]
    errors = [(scores - torch.cat(right)).abs().mean() for scores in (ours, torch.cat(plain))]
    assert errors[0] <= 1.5 * errors[1]  # both are a mean of rounding


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
    named = replace(item, name="france/capital")
    with pytest.raises(InputError, match=r"^france/capital of 65 tokens does not fit"):
        score_options(view, [Request(named, 0)], [None])


@pytest.mark.parametrize(("template", "front"), [("$A </s>", ()), ("<s> $A </s>", (1,))])
def test_a_tokenizer_that_ends_texts_gives_the_tokens_of_one_that_does_not(template, front):
    for question in toy_questions(4):
        item = encode(toy_tokenizer(template), question)
        bare = encode(toy_tokenizer(), question)
        assert item == replace(bare, context=front + bare.context)


def asking(**changed):
    return toy_questions(1)[0].model_copy(update=changed)


def test_options_of_the_same_tokens_are_refused_by_name():
    polish = ("Łódź", "Gdańsk", "Kraków", "Wrocław")  # all of them unknown words
    with pytest.raises(InputError) as error:
        encode(toy_tokenizer(), asking(options=polish))
    assert str(error.value).startswith(
        "alpha/age: options 'Łódź', 'Gdańsk', 'Kraków', 'Wrocław' are the same tokens to this "
        "tokenizer (<pad>), so the model cannot tell them apart; "
    )
    with pytest.raises(InputError, match=r"alpha/age: options 'old Łódź', 'old Gdańsk' are the sa"):
        encode(toy_tokenizer(), asking(options=("old Łódź", "ash", "old Gdańsk", "bee")))
    item = encode(toy_tokenizer(), asking(options=("ash", "Łódź", "old Gdańsk", "bee")))
    assert len(set(item.options)) == 4  # one unknown word differs from all others


def test_a_text_that_the_tokenizer_cannot_read_is_refused_with_its_question():
    with pytest.raises(InputError, match=r"^alpha/age: text '.*</s>.*' in it as a special token"):
        encode(toy_tokenizer(), asking(cloze="the age of </s>"))
    with pytest.raises(InputError, match=r"^alpha/age: text .*</s>"):
        encode(toy_tokenizer(), asking(options=("ash", "</s>", "bee", "cow")))


def spelling(*merges):
    """A letter a token, but for merges that words do not limit, as in SuperBPE."""
    letters = sorted(set("the age of alphabcdw 1960Ty"))
    words = [*letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({word: n for n, word in enumerate(words)}, list(merges)))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_split_is_at_the_length_of_the_prompt_where_the_space_joins_the_prompt():
    question = asking(cloze="the age", options=("a", "b", "cd", "d"))
    plain = encode(spelling(("g", "e")), question)
    joined = encode(spelling(("g", "e"), ("ge", " ")), question)
    assert [len(option) for option in plain.options] == [2, 2, 3, 2]
    assert joined.context == plain.context  # of the prompt alone, as the harness has it
    assert [len(option) for option in joined.options] == [1, 1, 2, 1]


def test_an_option_whose_letters_join_the_prompt_is_refused():
    tokenizer = spelling(("e", " "), ("e ", "c"))
    for option in ("cd", "c"):
        question = asking(cloze="the age", options=("a", "b", option, "d"))
        with pytest.raises(InputError, match=rf"^alpha/age: .*option '{option}'"):
            encode(tokenizer, question)


@pytest.mark.parametrize("answer", range(4))
def test_a_tie_is_shared_by_those_that_tie(answer):
    question = asking(options=("ab", "abcd", "abcde", "abcd"), answer=answer)
    marked = mark([-2.0, -4.0, -3.0, -2.0], question)
    assert (marked["predicted"], marked["predicted_norm"]) == (0, 3)
    assert marked["correct"] == (0.5, 0, 0, 0.5)[answer]  # options 0 and 3 have -2
    assert marked["correct_norm"] == (0, 0, 0, 1)[answer]
    even = mark([-2.0, -4.0, -5.0, -4.0], question)
    assert (even["predicted"], even["predicted_norm"]) == (0, 0)
    assert (even["correct"], even["correct_norm"]) == (float(answer == 0), 0.25)


def test_rounding_breaks_no_tie_and_makes_none():
    question = asking(options=("ab", "abcdef", "abcde", "abcd"), answer=1)
    third = float(np.float32(-1.1)) / 3  # a sum is rounded to float32, whatever its length
    scores = [float(np.float32(third * n)) for n in (2, 6, 9, 9)]
    assert mark(scores, question)["correct_norm"] == 0.5
    assert mark([-20.0, -19.9999, -30.0, -30.0], question)["correct"] == 1


def test_what_is_no_number_is_never_a_choice():
    for score in ([-1.0, np.nan, -2.0, -3.0], [np.nan] * 4):
        with pytest.raises(InputError, match=r"log-likelihoods \[.*nan.*not all are numbers"):
            mark(score, asking())
        with pytest.raises(InputError, match="not all are numbers"):
            choose(score, asking().options)


def test_a_model_without_numbers_is_told_with_the_question():
    model = toy_model("llama")
    item = replace(random_items(1)[0], name="france/capital")
    model.lm_head.weight[item.options[2][0]] = torch.inf
    view = value_vector_view(model)
    with pytest.raises(InputError, match=r"^france/capital: a log-likelihood of LlamaForCausalLM"):
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
    # Of some aliases, normalisation leaves nothing, and nothing is no answer.
    for alias in ("A", "The", "#"):
        assert not answer_matches("", [alias])
        assert not answer_matches("an", [alias])
        assert answer_matches(f" {alias.lower()} ", ["Paris", alias])


def hooked(view):
    """Modules that hooks or another forward were put on."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return [
        module
        for module in view.model.modules()
        if "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)
    ]


@pytest.mark.parametrize("engine", [PACKED, replace(PACKED, branches=True), Engine("plain", "")])
def test_the_model_is_as_it_was_when_scoring_fails(engine):
    """It fails after the last layer, with every mask in place."""
    view = value_vector_view(toy_model("llama"))
    requests = [Request(item, mask) for mask in range(3) for item in random_items(5)]
    before = [score_one_at_a_time(view, request.item) for request in requests[:5]]
    assert hooked(view) == []
    masked = []

    def fail(*_):
        masked.append(set(hooked(view)) >= set(view.modules))
        raise KeyError("half way")

    handle = view.model.model.norm.register_forward_hook(fail)
    with pytest.raises(KeyError, match="half way"):
        score_options(view, requests, random_masks(view, 3), engine=engine)
    handle.remove()
    assert masked == [True]
    assert hooked(view) == []
    for request, score in zip(requests, before, strict=False):
        assert torch.equal(score_one_at_a_time(view, request.item), score)
