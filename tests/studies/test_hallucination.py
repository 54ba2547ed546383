"""Sampling against plain forward passes; entropy and dimension against data with a known answer."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from paramspec.errors import InputError
from paramspec.method.generation import decode, generate_answers
from paramspec.method.hooks import value_vector_view
from paramspec.specwiki import load_questions
from paramspec.studies.hallucination import (
    cluster_answers,
    embedding_judge,
    entailment_judge,
    local_intrinsic_dimension,
    sample_answers,
    semantic_entropy,
)
from toy_study import toy_tokenizer
from toys import FAMILIES, toy_model

PROMPT = "the old king of the new {question} of the"
ASKED = ["beta", "river of omega", "age", "song of alpha old", "ash new bee", "price"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gpt2", "opt"])
def test_what_is_decoded_is_what_plain_forward_passes_predict(family, monkeypatch):
    """No cache, no batch: likelihoods, hidden states and where an answer ends.

    A sliding window, in the families that have one, is shorter than the prompts.
    """
    class_name, settings = FAMILIES[family]
    short = {"sliding_window": 5} if "sliding_window" in settings else {}
    monkeypatch.setitem(FAMILIES, family, (class_name, settings | short))
    view, tokenizer = value_vector_view(toy_model(family)), toy_tokenizer()
    prompts = [PROMPT.replace("{question}", asked) for asked in ASKED]
    draw = torch.Generator().manual_seed(3)

    def pick(index, copies, logits):
        return torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]

    decoded = decode(view, tokenizer, prompts, pick, copies=3, max_new_tokens=7)
    assert [len(copies) for copies in decoded] == [3] * len(prompts)
    for prompt, copies in zip(prompts, decoded, strict=True):
        start = tokenizer.encode(prompt)
        for row in copies:
            tokens = torch.tensor([start + row.tokens])
            with torch.no_grad():
                logits = view.model(tokens, use_cache=False).logits[0]
                states = view.model.base_model(tokens, use_cache=False).last_hidden_state[0]
            chosen = logits.log_softmax(-1)[len(start) - 1 : -1]
            expected = chosen.gather(1, torch.tensor(row.tokens)[:, None]).sum()
            assert row.log_likelihood == pytest.approx(float(expected), abs=1e-4)
            torch.testing.assert_close(row.state, states[-2], atol=1e-4, rtol=1e-4)
            assert tokenizer.eos_token_id not in row.tokens[:-1]
            assert row.tokens[-1] == tokenizer.eos_token_id or len(row.tokens) == 7
    assert len({tuple(row.tokens) for copies in decoded for row in copies}) > 12


def test_samples_depend_on_the_seed_and_the_question_alone():
    """An answer that ends leaves the batch, and the others go on as if it had stayed."""
    model = toy_model("llama")
    model.lm_head.weight[2] *= 3  # the end of a text is likely, or very unlikely
    view, tokenizer = value_vector_view(model), toy_tokenizer()
    options = {"prompt": PROMPT, "samples": 20, "max_new_tokens": 6}
    first = sample_answers(view, tokenizer, ASKED, **options)
    assert len({n for one in first for n in one.tokens}) > 2
    other = sample_answers(view, tokenizer, ASKED, seed=1, **options)
    for asked, one, two in zip(ASKED, first, other, strict=True):
        (alone,) = sample_answers(view, tokenizer, [asked], **options)
        assert one.answers == alone.answers
        assert one.log_likelihoods == pytest.approx(alone.log_likelihoods, abs=1e-4)
        assert one.greedy == two.greedy
    assert [one.answers for one in first] != [one.answers for one in other]
    greedy = generate_answers(view, tokenizer, ASKED, prompt=PROMPT, max_new_tokens=6)
    assert [one.greedy for one in first] == greedy
    with pytest.raises(InputError, match="does not fit the model's context of 64"):
        sample_answers(view, tokenizer, ["old " * 60], prompt="{question}")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_tokens_are_drawn_as_often_as_the_model_says(temperature):
    """A chi-square test of 4,000 draws; rare tokens are taken together, so that each is expected
    five times at least. It rejects a right sampler at one seed in 10,000."""
    view, tokenizer = value_vector_view(toy_model("llama")), toy_tokenizer()
    sampled = sample_answers(
        view, tokenizer, ["song of alpha"], prompt="{question}", samples=4000,
        temperature=temperature, max_new_tokens=1,
    )[0]  # fmt: skip
    tokens = torch.tensor([tokenizer.encode("song of alpha")])
    with torch.no_grad():
        logits = view.model(tokens).logits[0, -1].double()
    words = tokenizer.batch_decode([[token] for token in range(97)], skip_special_tokens=True)
    # Special tokens are all no words.
    wanted = pd.Series((logits / temperature).softmax(-1) * 4000).groupby(words).sum()
    found = pd.Series(sampled.answers).value_counts().reindex(wanted.index, fill_value=0)
    kind = wanted.index.where(wanted >= 5, "rare")
    observed, expected = (each.groupby(kind).sum() for each in (found, wanted))
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    logprobs = dict(zip(words, logits.log_softmax(-1).tolist(), strict=True))
    for answer, likelihood in zip(sampled.answers, sampled.log_likelihoods, strict=True):
        if answer:
            assert likelihood == pytest.approx(logprobs[answer], abs=1e-4)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("Rhine, the rhine., Po, Rhine", [0, 0, 1, 0]),  # the same words
        ("Thames, Donau, the Thames, Danube, THAMES!", [0, 1, 0, 1, 0]),  # aliases, a judge's word
        (", Donau, , ..., Danube, Rhine", [0, 1, 0, 0, 1, 2]),
        # An answer joins the first cluster whose first member means the same: in a judge's eyes
        # y is like x and z, and x unlike z.
        ("x, y, z", [0, 0, 1]),
        ("y, x, z", [0, 0, 0]),
        ("z, x, y", [0, 1, 0]),
    ],
)
def test_answers_are_clustered_by_words_then_aliases_then_judgement(answers, expected):
    """A judge is asked neither of accepted answers nor of empty ones."""

    def same(question, pairs):
        assert question == "Which river?"
        assert not {"Thames", "", "..."} & set(itertools.chain(*pairs))
        alike = ({"Donau", "Danube"}, {"x", "y"}, {"y", "z"})
        return [any({*pair} <= group for group in alike) for pair in pairs]

    aliases = ("the Thames", "Thames")
    assert cluster_answers("Which river?", answers.split(", "), aliases, same) == expected


@pytest.mark.slow
def test_embeddings_tell_phrasings_from_other_answers():
    """The shares that the threshold was chosen by, measured anew on as many pairs."""
    draw = random.Random(0)
    questions = load_questions()
    draw.shuffle(questions)
    forms = ("{}", "It is {}", "{}, I think", "The answer is {}", "probably {}", "{} of course")
    same, other = [], []
    for question in questions[:300]:
        one, two = draw.sample(forms, 2)
        answer = question.options[question.answer]
        wrong = draw.choice([o for o in question.options if o != answer])
        same.append((one.format(answer), two.format(answer)))
        other += [(one.format(answer), two.format(wrong)), (one.format(answer), one.format(wrong))]
    judge = embedding_judge()
    joined = np.mean(judge("", same)), np.mean(judge("", other))
    assert joined[0] > 0.8
    assert joined[1] < 0.07
    pairs = [("Paris", "Lyon"), ("in 1815", "in 1816"), ("Paris", "Paris, France")]
    assert judge("Which?", pairs) == [False, False, True]


@pytest.fixture(params=[("entailment", "neutral", "contradiction"), ("no", "maybe", "ENTAILMENT")])
def classifier(request, tmp_path):
    """A tiny classifier whose verdicts vary; its labels in two orders."""
    labels = request.param
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
        id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = BertForSequenceClassification(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.classifier.bias.zero_()
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    return tmp_path, model, [label.lower() for label in labels].index("entailment")


def test_entailment_is_asked_both_ways_after_the_question(classifier):
    """Against the classifier itself, one pair at a time and without padding."""
    path, model, label = classifier
    tokenizer, question = toy_tokenizer(), "the king of beta"
    pairs = list(itertools.combinations(["ash", "old bee", "new cow", "gnu fox hen", "of"], 2))

    def entails(one, other):
        batch = tokenizer(f"{question} {one}", f"{question} {other}", return_tensors="pt")
        return int(model(**batch).logits.argmax()) == label

    expected = [entails(one, other) and entails(other, one) for one, other in pairs]
    assert entailment_judge(str(path))(question, pairs) == expected
    one_way = [entails(one, other) for one, other in pairs]
    assert 0 < sum(expected) < sum(one_way)  # so that asking one way alone would show


def test_what_is_no_judge_is_refused(tmp_path, classifier):
    path, model, _ = classifier
    model.config.label2id = {label: number for number, label in enumerate("abc")}
    model.config.save_pretrained(path)
    with pytest.raises(InputError, match=r"labels \['a', 'b', 'c'\], .*`entailment`"):
        entailment_judge(str(path))
    tensors = load_file(path / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing weights \['classifier.weight'\]"):
        entailment_judge(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: cannot be loaded"):
        entailment_judge(str(tmp_path / "empty"))


def test_entropy_of_known_shares():
    assert math.copysign(1, semantic_entropy([0] * 10)) == 1  # 0, and not -0
    for shares in ([10], [1] * 10, [2, 2], [5, 3, 2]):
        clusters = np.repeat(range(len(shares)), shares)
        assert semantic_entropy(clusters) == pytest.approx(stats.entropy(shares))


def test_likelihoods_weigh_meanings_by_their_length():
    """Worked by hand: per-token likelihoods 0.5, 0.25 and 0.25 of two meanings."""
    found = semantic_entropy(
        [0, 1, 1], [2 * math.log(0.5), math.log(0.25), 3 * math.log(0.25)], [2, 1, 3]
    )
    assert found == pytest.approx(math.log(2))
    sure = semantic_entropy([0, 1], [-1.0, -2000.0], [1, 1])
    assert sure == pytest.approx(0, abs=1e-9)
    for given in ([], [-1.0, -2.0]), ([0, 1], [-1.0, -2.0]), ([],):
        with pytest.raises(InputError, match="clusters"):
            semantic_entropy(*given)


def points(n):
    return torch.randn(n, 20, generator=torch.Generator().manual_seed(0))


def test_the_estimate_is_levina_and_bickels():
    """Written out for each point: the inverse mean log ratio of distances, over k - 2."""
    distances = torch.cdist(points(60).double(), points(60).double()).numpy()
    for row, value in zip(distances, local_intrinsic_dimension(points(60), 7), strict=True):
        near = np.sort(row)[1:8]
        assert value == pytest.approx((7 - 2) / np.log(near[-1] / near[:-1]).sum(), rel=1e-4)


def test_equal_states_count_as_one_point():
    plain = local_intrinsic_dimension(points(100), 10)
    twice = local_intrinsic_dimension(torch.cat([points(100), points(100)[:30]]), 10)
    np.testing.assert_allclose(twice, [*plain, *plain[:30]])


def test_points_that_have_no_dimension_are_refused():
    for states, neighbours in ((points(30), 3), (points(30), 30), (torch.ones(50, 8), 10)):
        with pytest.raises(InputError, match=f"neighbours {neighbours}: "):
            local_intrinsic_dimension(states, neighbours)
