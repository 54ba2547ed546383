"""Open-ended answers against a greedy loop on edited weights, one prompt at a time."""

from __future__ import annotations

import re

import pytest
import torch

from oracles import with_vectors_zeroed
from paramspec.errors import InputError
from paramspec.method import generation
from paramspec.method.generation import (
    OPEN_PROMPT,
    answer_matches,
    decode,
    generate_answers,
    likeliest,
)
from paramspec.method.hooks import mask_rows, value_vector_view
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
AS_IT_IS = {"prompt": "{question}", "max_new_tokens": 6}


@pytest.fixture
def llama():
    return value_vector_view(toy_model("llama"))


@torch.no_grad()
def greedy(view, tokenizer, prompt, keep=None, steps=6):
    """The oracle: no padding, no cache, no hooks; masked value vectors are zeroed in a copy."""
    model, tokens = with_vectors_zeroed(view, keep), tokenizer.encode(prompt)
    start = len(tokens)
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_under_masks_equal_a_greedy_loop_on_edited_weights(family, monkeypatch):
    view, tokenizer = value_vector_view(toy_model(family)), toy_tokenizer()
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(view.layers, view.width, generator=draw) > 0.3
    # A window of 32 is shorter than the beginning that all of these share.
    long = ["the old king of " * 9 + prompt for prompt in PROMPTS]
    found = []
    for prompts, keep, batch in (
        (PROMPTS, None, 64),
        (PROMPTS, mask, 64),
        (PROMPTS, mask, 2),
        (long, None, 64),
    ):
        monkeypatch.setattr(generation, "BATCH", batch)
        with mask_rows(view, [keep]):
            found.append(generate_answers(view, tokenizer, prompts, **AS_IT_IS))
        assert found[-1] == [greedy(view, tokenizer, prompt, keep) for prompt in prompts]
    assert sum(one != other for one, other in zip(*found[:2], strict=True)) >= 2


@pytest.mark.parametrize("front", ["", "<s> "])
def test_a_tokenizer_that_ends_texts_answers_as_one_that_does_not(front, llama):
    bare, ending = (
        generate_answers(llama, toy_tokenizer(f"{front}$A{end}"), PROMPTS, **AS_IT_IS)
        for end in ("", " </s>")
    )
    assert bare == ending
    assert all(bare)


@pytest.mark.parametrize("several", [True, False])
def test_an_answer_ends_with_any_of_the_model_s_end_tokens(several, llama):
    """Of the generation config, as of Llama 3's, and of the tokenizer."""
    tokenizer = toy_tokenizer()
    ((whole,),) = decode(llama, tokenizer, PROMPTS[:1], likeliest, max_new_tokens=6)
    end = whole.tokens[2]
    if several:
        llama.model.generation_config.eos_token_id = [2, end]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ((row,),) = decode(llama, tokenizer, PROMPTS[:1], likeliest, max_new_tokens=6)
    assert row.tokens == whole.tokens[: whole.tokens.index(end) + 1]


def test_a_model_without_numbers_gives_no_answer(llama):
    llama.model.lm_head.weight[5] = torch.nan
    with pytest.raises(InputError, match=r"of LlamaForCausalLM is not a finite number"):
        decode(llama, toy_tokenizer(), PROMPTS[:1], likeliest)


@pytest.mark.parametrize(
    ("said", "answer"),
    [(" Paris\nQuestion: What", "Paris"), ("\n\nthe Thames \n", "the Thames"), ("", "")],
)
def test_an_answer_is_the_first_line_without_space_around_it(said, answer, monkeypatch, llama):
    tokenizer = toy_tokenizer()
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: said)
    # A question may hold braces.
    assert generate_answers(llama, tokenizer, ["{question} {0}"], **AS_IT_IS) == [answer]


def test_the_examples_of_the_prompt_are_about_no_concept():
    """They would give answers away."""
    assert OPEN_PROMPT.endswith("Question: {question}\nAnswer:")
    for concept in {question.concept for question in load_questions()}:
        assert not re.search(rf"\b{re.escape(concept)}\b", OPEN_PROMPT), concept


def test_squad_exact_match():
    assert answer_matches(" the  Paris.", ["paris"])
    assert answer_matches("A U.S.", ["USA", "US"])
    assert not answer_matches("Paris, France", ["Paris"])
    # Of some aliases, normalisation leaves nothing, and nothing is no answer.
    for alias in ("A", "The", "#"):
        assert not answer_matches("", [alias])
        assert not answer_matches("an", [alias])
        assert answer_matches(f" {alias.lower()} ", ["Paris", alias])
