"""Open-ended answers against a greedy loop on edited weights, one prompt at a time."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from paramspec.errors import InputError
from paramspec.method.generation import OPEN_PROMPT, decode, generate_answers, likeliest
from paramspec.method.hooks import value_vector_view
from paramspec.specwiki import load_questions
from toy_study import toy_tokenizer
from toys import toy_model

FAMILIES = ["llama", "gemma2", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon"]
PROMPTS = [
    "king of beta",
    "the river of the old king of omega is",
    "song",
    "the age of alpha the age of beta the age of",
    "old ash new bee",
]


def random_masks(view, share=0.3):
    draw = torch.Generator().manual_seed(1)
    shape = (len(PROMPTS) - 1, view.layers, view.width)
    return [None, *(torch.rand(shape, generator=draw) > share)]


@torch.no_grad()
def greedy(view, tokenizer, prompt, keep, steps):
    """The oracle: no padding, no cache, no hooks; masked value vectors are zeroed in a copy."""
    model = copy.deepcopy(view.model)
    if keep is not None:
        for layer, name in enumerate(view.names):
            module = model.get_submodule(name)
            weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
            weight[~keep[layer]] = 0
    tokens = tokenizer.encode(prompt)
    start = len(tokens)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_under_masks_equal_a_greedy_loop_on_edited_weights(family):
    view, tokenizer = value_vector_view(toy_model(family)), toy_tokenizer()
    masks = random_masks(view)
    expected = [
        greedy(view, tokenizer, prompt, keep, 6)
        for prompt, keep in zip(PROMPTS, masks, strict=True)
    ]
    options = {"prompt": "{question}", "max_new_tokens": 6}
    assert generate_answers(view, tokenizer, PROMPTS, masks, **options) == expected
    assert generate_answers(view, tokenizer, PROMPTS, masks, batch_size=2, **options) == expected
    unmasked = [greedy(view, tokenizer, prompt, None, 6) for prompt in PROMPTS]
    assert generate_answers(view, tokenizer, PROMPTS, **options) == unmasked
    assert unmasked[0] == expected[0]
    assert sum(one != other for one, other in zip(unmasked, expected, strict=True)) >= 2


@pytest.mark.parametrize("front", ["", "<s> "])
def test_a_tokenizer_that_ends_texts_answers_as_one_that_does_not(front):
    view = value_vector_view(toy_model("llama"))
    bare, ending = (
        generate_answers(view, toy_tokenizer(f"{front}$A{end}"), PROMPTS, prompt="{question}")
        for end in ("", " </s>")
    )
    assert bare == ending
    assert all(bare)


@pytest.mark.parametrize("several", [True, False])
def test_an_answer_ends_with_any_of_the_model_s_end_tokens(several):
    """Of the generation config, as of Llama 3's, and of the tokenizer."""
    view, tokenizer = value_vector_view(toy_model("llama")), toy_tokenizer()
    ((whole,),) = decode(view, tokenizer, PROMPTS[:1], likeliest, max_new_tokens=6)
    end = whole.tokens[2]
    if several:
        view.model.generation_config.eos_token_id = [2, end]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ((row,),) = decode(view, tokenizer, PROMPTS[:1], likeliest, max_new_tokens=6)
    assert row.tokens == whole.tokens[: whole.tokens.index(end) + 1]


def test_a_model_without_numbers_gives_no_answer():
    model = toy_model("llama")
    model.lm_head.weight[5] = torch.nan
    with pytest.raises(InputError, match=r"^the logits of LlamaForCausalLM are not numbers"):
        decode(value_vector_view(model), toy_tokenizer(), PROMPTS[:1], likeliest)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_unlike_length_are_answered_together_as_alone(family):
    """Behind a beginning that all share; a window shorter than the prompts is kept, too."""
    view, tokenizer = value_vector_view(toy_model(family)), toy_tokenizer()
    prompts = ["the old king of " * 6 + prompt for prompt in PROMPTS]
    options = {"copies": 2, "max_new_tokens": 6}
    alone = [decode(view, tokenizer, [prompt], likeliest, **options)[0] for prompt in prompts]
    together = decode(view, tokenizer, prompts, likeliest, **options)
    for one, other in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        assert one.tokens == other.tokens
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        torch.testing.assert_close(one.state, other.state, rtol=0, atol=1e-4)
    texts = [tokenizer.decode(row.tokens, skip_special_tokens=True).strip() for row, _ in alone]
    assert texts == [greedy(view, tokenizer, prompt, None, 6) for prompt in prompts]


def test_an_answer_is_the_first_line_without_space_around_it(monkeypatch):
    view, tokenizer = value_vector_view(toy_model("llama")), toy_tokenizer()
    texts = [" Paris\nQuestion: What", "\n\nthe Thames \n", "", "Big Ben"]
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *_, **__: texts)
    answers = generate_answers(view, tokenizer, PROMPTS[:4], prompt="{question}")
    assert answers == ["Paris", "the Thames", "", "Big Ben"]


def test_questions_may_hold_braces():
    view, tokenizer = value_vector_view(toy_model("llama")), toy_tokenizer()
    answers = generate_answers(
        view, tokenizer, ["king of {question} {0}"], prompt="{question} is", max_new_tokens=2
    )
    assert len(answers) == 1


def test_the_examples_of_the_prompt_are_about_no_concept():
    """They would give answers away."""
    assert OPEN_PROMPT.endswith("Question: {question}\nAnswer:")
    for concept in {question.concept for question in load_questions()}:
        assert not re.search(rf"\b{re.escape(concept)}\b", OPEN_PROMPT), concept
