"""Scoring against one option at a time, in every family, packed or not, whatever the batch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.method import scoring
from paramspec.method.hooks import value_vector_view
from paramspec.method.rows import Engine, Item, Request
from paramspec.method.scoring import choose_engine, encode, mark, score_options
from toy_study import toy_questions, toy_tokenizer
from toys import FAMILIES, random_model, toy_model

# Families whose attention is biased by distances that `position_ids` does not set.
PLAIN_FAMILIES = {"bloom", "mpt"}
PACKED = Engine("packed", "asked for")


def random_items(count, seed=0):
    """Questions with shared beginnings, options of one to four tokens, and equal options."""
    draw = np.random.default_rng(seed)

    def words(least, most):
        return tuple(map(int, draw.integers(3, 97, draw.integers(least, most))))

    stems, items = [words(1, 9) for _ in range(4)], []
    for _ in range(count):
        context = stems[draw.integers(4)] + words(1, 4)
        options = [words(1, 5) for _ in range(4)]
        options[1] = options[0][:1] + options[1]
        items.append(Item(context, tuple(options)))
    return items


def random_masks(view, count):
    """The last of them masks nothing."""
    draw = torch.Generator().manual_seed(0)
    return [*(torch.rand(count - 1, view.layers, view.width, generator=draw) > 0.3), None]


def asking(items, masks=1):
    """Each item under each mask."""
    return [Request(item, mask) for mask in range(masks) for item in items]


def require_right(view, requests, keeps=(None,), **options):
    scores = score_options(view, requests, keeps, **options)
    for request, score in zip(requests, scores, strict=True):
        expected = score_one_at_a_time(view, request.item, keeps[request.mask])
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


@pytest.fixture
def llama():
    return value_vector_view(toy_model("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_one_option_at_a_time(family):
    view = value_vector_view(toy_model(family))
    engine = choose_engine(view)
    assert engine.name == ("plain" if family in PLAIN_FAMILIES else "packed"), engine.reason
    requests = [Request(item, index % 3) for index, item in enumerate(random_items(12))]
    for row_tokens, batch_tokens in ((1, 1), (24, 200), (400, 4000)):
        budgets = {"row_tokens": row_tokens, "batch_tokens": batch_tokens}
        require_right(view, requests, random_masks(view, 3), **budgets)


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_distances_that_position_ids_do_not_set_are_scored_plainly_in_bfloat16_too(family):
    """There, an error of theirs is as small as rounding."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    config.alibi = True  # of Falcon; the others have it always
    view = value_vector_view(random_model(config, dtype=torch.bfloat16))
    assert choose_engine(view).name == "plain"


def longer_than_the_window(family):
    """A model whose window of 32 is shorter than one of its questions."""
    context = tuple(map(int, np.random.default_rng(3).integers(3, 97, 45)))
    items = [*random_items(3), Item(context, random_items(1)[0].options)]
    return value_vector_view(toy_model(family)), asking(items)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gemma3", "sdpa")],
)
def test_paths_longer_than_the_sliding_window_are_packed_and_right(family, attention):
    view, requests = longer_than_the_window(family)
    view.model.set_attn_implementation(attention)
    assert choose_engine(view).name == "packed"
    require_right(view, requests)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_model_that_lets_a_tree_out_of_its_window_is_scored_plainly(family, monkeypatch):
    view, requests = longer_than_the_window(family)
    inputs = scoring._inputs

    def without_window(*given):
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "attention_window", lambda config: None)
            return inputs(*given)

    monkeypatch.setattr(scoring, "_inputs", without_window)
    assert choose_engine(view).name == "plain"
    require_right(view, requests)


def rows_of_each_layer(view, requests, keeps):
    """How many rows come out of every value-vector layer, in the last forward pass."""
    found, engine = [], choose_engine(view)
    with ExitStack() as stack:
        for module in view.modules:
            count = module.register_forward_hook(lambda *args: found.append(len(args[2])))
            stack.enter_context(count)
        score_options(view, requests, keeps, engine=engine)
    return found[-view.layers :]


def test_what_no_mask_touches_is_computed_once(llama):
    masks, requests = random_masks(llama, 3), asking(random_items(5), 3)
    assert rows_of_each_layer(llama, requests, masks) == [3, 3, 3]
    for mask in masks[:2]:
        mask[:2] = True  # the last layer alone is masked
    assert rows_of_each_layer(llama, requests, masks) == [1, 1, 3]
    require_right(llama, requests, masks)
    everything = torch.ones(llama.layers, llama.width, dtype=torch.bool)  # as no mask
    require_right(llama, requests, [None, everything, everything.clone()])


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gptj"])
def test_blocks_of_the_vocabulary_add_up(family, monkeypatch):
    """Scaled, capped and shifted logits too; 97 tokens in blocks of 10."""
    monkeypatch.setattr(scoring, "VOCABULARY_BLOCK", 10)
    require_right(value_vector_view(toy_model(family)), asking(random_items(4)), engine=PACKED)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_bfloat16_is_off_by_its_rounding_alone(family):
    view = value_vector_view(toy_model(family, dtype=torch.bfloat16))
    exact = value_vector_view(toy_model(family, dtype=torch.bfloat16).float())
    engine, keeps = choose_engine(view), random_masks(view, 2)
    requests = asking(random_items(12), 2)
    assert engine.name == "packed"
    ours = torch.cat(score_options(view, requests, keeps, engine=engine))
    plain, right = (
        torch.cat([score_one_at_a_time(each, item, keeps[mask]) for item, mask in requests])
        for each in (view, exact)
    )
    # Both are a mean of rounding.
    assert (ours - right).abs().mean() <= 1.5 * (plain - right).abs().mean()


def test_a_model_that_does_not_take_the_tree_is_scored_plainly(llama):
    inner = llama.model.model
    forward = inner.forward

    def causal_only(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kwargs)

    inner.forward = causal_only
    engine = choose_engine(llama)
    assert (engine.name, "differ" in engine.reason) == ("plain", True)
    inner.forward = forward
    assert choose_engine(llama).name == "packed"
    llama.model.config._attn_implementation = "flash_attention_2"
    engine = choose_engine(llama)
    assert (engine.name, "flash_attention_2" in engine.reason) == ("plain", True)


def test_progress_counts_every_request_once(llama):
    for engine in (PACKED, Engine("plain", "")):
        done, options = [], {"engine": engine, "batch_tokens": 60}
        score_options(llama, asking(random_items(17)), [None], progress=done.append, **options)
        assert sum(done) == 17
        assert len(done) > 1


def hooked(view):
    """Modules that hooks or another forward were put on."""
    return [
        module
        for module in view.model.modules()
        if "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks
    ]


@pytest.mark.parametrize("engine", [PACKED, replace(PACKED, branches=True), Engine("plain", "")])
def test_the_model_is_as_it_was_after_scoring_also_when_it_fails(engine, llama):
    """It fails after the last layer, with every mask in place."""
    requests, keeps, masked = asking(random_items(5), 3), random_masks(llama, 3), []
    score_options(llama, requests, keeps, engine=engine)
    assert hooked(llama) == []

    def fail(*_):
        masked.append(set(hooked(llama)) >= set(llama.modules))
        raise KeyError("half way")

    with llama.model.model.norm.register_forward_hook(fail), pytest.raises(KeyError):
        score_options(llama, requests, keeps, engine=engine)
    assert masked == [True]
    assert hooked(llama) == []


def question(**changed):
    return toy_questions(1)[0].model_copy(update=changed)


def test_options_that_the_tokenizer_cannot_distinguish_are_refused():
    options = ("old Łódź", "ash", "old Gdańsk", "bee")  # two unknown words
    with pytest.raises(InputError, match=r"^alpha/age: options 'old Łódź' and 'old Gdańsk' are"):
        encode(toy_tokenizer(), question(options=options))


def spelling(*merges):
    """A letter a token, but for merges that words do not limit, as in SuperBPE."""
    letters = sorted(set("the age of alphabcdw 1960Ty"))
    words = [*letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(BPE({word: n for n, word in enumerate(words)}, list(merges)))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_split_is_at_the_length_of_the_prompt_where_the_space_joins_the_prompt():
    asked = question(cloze="the age", options=("a", "b", "cd", "d"))
    plain = encode(spelling(("g", "e")), asked)
    joined = encode(spelling(("g", "e"), ("ge", " ")), asked)
    assert [len(option) for option in plain.options] == [2, 2, 3, 2]
    assert joined.context == plain.context  # of the prompt alone, as the harness has it
    assert [len(option) for option in joined.options] == [1, 1, 2, 1]


@pytest.mark.parametrize("option", ["cd", "c"])
def test_an_option_whose_letters_join_the_prompt_is_refused(option):
    asked = question(cloze="the age", options=("a", "b", option, "d"))
    with pytest.raises(InputError, match=rf"^alpha/age: .*option '{option}'"):
        encode(spelling(("e", " "), ("e ", "c")), asked)


@pytest.mark.parametrize(
    ("scores", "by_sum", "by_characters"),
    [
        ([-4.0, -7.0, -9.0, -9.0], (0,), (1,)),
        ([-2.0, -4.0, -3.0, -2.0], (0, 3), (3,)),
        ([-2.0, -4.0, -5.0, -4.0], (0,), (0, 1, 2, 3)),
    ],
)
def test_the_choice_is_by_sum_or_by_characters_and_shared_by_those_that_tie(
    scores, by_sum, by_characters
):
    """As lm-evaluation-harness: acc = argmax(sum), acc_norm = argmax(sum / characters)."""
    for answer in range(4):
        marked = mark(scores, question(options=("ab", "abcd", "abcde", "abcd"), answer=answer))
        assert (marked["predicted"], marked["predicted_norm"]) == (by_sum[0], by_characters[0])
        assert marked["correct"] == (answer in by_sum) / len(by_sum)
        assert marked["correct_norm"] == (answer in by_characters) / len(by_characters)


def test_rounding_breaks_no_tie_and_makes_none():
    asked = question(options=("ab", "abcdef", "abcde", "abcd"), answer=1)
    third = float(np.float32(-1.1)) / 3  # a sum is rounded to float32, whatever its length
    scores = [float(np.float32(third * n)) for n in (2, 6, 9, 9)]
    assert mark(scores, asked)["correct_norm"] == 0.5
    assert mark([-20.0, -19.9999, -30.0, -30.0], asked)["correct"] == 1


@pytest.mark.parametrize("scores", [[-1.0, np.nan, -2.0, -3.0], [np.nan] * 4])
def test_what_is_no_number_is_never_a_choice(scores):
    with pytest.raises(IndexError):
        mark(scores, question())
