"""What is trained: the texts hold no wording of an evaluation, the vectors are those of a rule.

The oracles are coefficients recorded, and gradients taken, one text at a time on whole weights.
"""

from __future__ import annotations

import copy
import itertools
import re
from typing import get_args

import pytest
import torch

from oracles import coefficients_alone
from paramspec.errors import InputError
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import keep_tensor, magnitude_matched_vectors
from paramspec.specwiki import load_questions
from paramspec.studies.training import (
    METHODS,
    Rule,
    Training,
    choose_vectors,
    encode_texts,
    gradient_norms,
    language_modelling_loss,
    other_concepts,
    training_texts,
)
from toy_study import CONCEPTS, toy_questions, toy_tokenizer
from toys import toy_model, value_vectors

LAYERS, WIDTH = 3, 48
QUESTIONS = toy_questions()
DOMAINS = {question.concept: question.domain for question in QUESTIONS}


def choices(**changed):
    given = {"method": "FT-PV", "concepts": ("alpha", "beta"), "statements": 2}
    return Training.parse(**given | changed)


def texts_of(*concepts, count=2):
    return [t for q in QUESTIONS if q.concept in concepts for t in q.statements[:count]]


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def view(family):
    return value_vector_view(toy_model(family))


def choose(view, **changed):
    """What is trained, as bool `[layers, width]`."""
    vectors = choose_vectors(view, toy_tokenizer(), QUESTIONS, choices(**changed))
    chosen = torch.zeros(LAYERS, WIDTH, dtype=torch.bool)
    chosen[tuple(vectors.long().T)] = True
    assert vectors.dtype == torch.int32
    assert torch.equal(chosen.nonzero().int(), vectors)  # sorted, and each once
    return chosen


@pytest.mark.parametrize("rule", get_args(Rule))
def test_budgets_of_the_four_methods(view, rule):
    full, own, rest, chance = (choose(view, method=method, rule=rule) for method in METHODS)
    assert full.all()
    assert own.sum(1).tolist() == chance.sum(1).tolist() == [WIDTH // 8] * LAYERS
    assert torch.equal(own, ~rest)
    assert not torch.equal(own, chance)
    for method, chosen in zip(METHODS, (full, own, rest, chance), strict=True):
        some = choose(view, method=method, rule=rule, layers=(0, 2))
        assert torch.equal(some[[0, 2]], chosen[[0, 2]])
        assert not some[1].any()


def test_a_share_and_a_seed(view):
    for method in ("FT-PV", "FT-RV"):
        assert choose(view, method=method, share=1.0).all()
    for rule in ("coefficient", "gradient"):
        assert torch.equal(choose(view, rule=rule), choose(view, rule=rule, seed=1))
    draws = [choose(view, method="FT-RV", seed=seed) for seed in (0, 1, 2, 3, 0)]
    assert torch.equal(draws[0], draws[4])
    assert len({str(draw.nonzero().tolist()) for draw in draws}) == 4


def coefficients_one_at_a_time(view, texts):
    """Mean absolute coefficients, `[3, 48]`."""
    rows = [toy_tokenizer().encode(text) for text in texts]
    return sum(coefficients_alone(view, row, "mean").double() for row in rows) / len(rows)


def gradients_one_at_a_time(view, family, texts):
    """Norms of the gradients of whole weights, of the mean over all tokens: `[3, 48]`."""
    model = copy.deepcopy(view.model).requires_grad_(True)
    rows = [[*toy_tokenizer().encode(text), 2] for text in texts]
    for row in rows:
        tokens = torch.tensor([row])
        output = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        (-output.gather(1, tokens[0, 1:, None]).sum()).backward()
    norms = [own.norm(dim=1) for own in value_vectors(model, family, gradients=True)]
    return torch.stack(norms) / sum(len(row) - 1 for row in rows)


def highest(values):
    """The highest eighth of each layer."""
    least = values.sort(1, descending=True).values[:, WIDTH // 8 - 1]
    return values >= least[:, None]


def test_each_rule_against_brute_force(view, family):
    training = choices()
    own = coefficients_one_at_a_time(view, texts_of(*training.concepts))
    others = coefficients_one_at_a_time(view, texts_of(*other_concepts(QUESTIONS, training)))
    norms = gradients_one_at_a_time(view, family, texts_of(*training.concepts))
    chosen = {rule: choose(view, rule=rule) for rule in get_args(Rule)}
    scores = {"coefficient": own, "score": own - others, "other": others, "gradient": norms}
    for rule, values in scores.items():
        assert torch.equal(chosen[rule], highest(values)), rule
    found = gradient_norms(view, toy_tokenizer(), texts_of(*training.concepts))
    torch.testing.assert_close(found, norms, rtol=1e-3, atol=1e-6)
    draw = torch.Generator().manual_seed(training.seed)
    most = chosen["coefficient"].nonzero().int()
    matched = magnitude_matched_vectors(most, own.float().argsort(1), draw)
    assert torch.equal(chosen["magnitude"], ~keep_tensor(matched, *own.shape))
    assert len({str(rule.nonzero().tolist()) for rule in chosen.values()}) == len(chosen)


def test_other_concepts_are_not_trained_on_and_of_the_same_domains():
    """Toy concepts alternate between two domains, four of each."""
    seeds = [choices(concepts=("alpha", "gamma", "beta"), seed=seed) for seed in range(12)]
    drawn = [other_concepts(QUESTIONS, training) for training in seeds]
    for names in drawn:
        assert len({*names, "alpha", "gamma", "beta"}) == 6
        # Two of alpha's and gamma's domain are left, one of them for each.
        assert [DOMAINS[name] for name in names] == ["greek", "greek", "letter"]
    assert len(set(map(tuple, drawn))) > 3
    # Where a domain has none left, any will do.
    names = other_concepts(QUESTIONS, choices(concepts=("alpha", "gamma", "zeta")))
    assert sorted(DOMAINS[name] for name in names) == ["greek", "letter", "letter"]
    with pytest.raises(InputError, match=r"rule 'other': needs .* has 3;"):
        other_concepts(QUESTIONS, choices(concepts=CONCEPTS[:5], rule="other"))


def test_no_text_holds_the_cloze_of_an_evaluation():
    """All of SpecWiki: no statement of any concept holds the cloze of any, word by word."""
    questions = load_questions()
    clozes = {" ".join(re.findall(r"\w+", q.cloze.casefold())) for q in questions}
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    texts = {text for question in questions for text in question.statements}
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        spans = itertools.combinations(range(len(words) + 1), 2)
        assert not clozes & {" ".join(words[start:end]) for start, end in spans}, text
    # Nor does this refuse any of many concepts, which are trained at once.
    assert set(training_texts(questions, choices(concepts=concepts[::40]))) <= texts


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("alpha", "one says the AGE  of alpha bee"),  # its own cloze, in other case and spacing
        ("beta", "the age of alpha bee"),  # another trained concept's
        ("alpha", "who asks: what age has alpha? bee"),  # its own question
    ],
)
def test_a_statement_that_holds_a_wording_is_refused(where, text):
    changes = {"alpha/age": {"question": "what age has alpha?"}}
    changes[f"{where}/king"] = {"statements": (text,)}
    changed = [q.model_copy(update=changes.get(q.id, {})) for q in QUESTIONS]
    with pytest.raises(InputError, match=r"statement .* question 'alpha/age'"):
        training_texts(changed, choices())
    # Statements that are not trained on may say what they like.
    assert training_texts(changed, choices(concepts=("gamma",)))


def test_texts_are_the_first_statements_of_each_fact_once():
    for count in (1, 2, 4, 9):
        expected = texts_of("alpha", "gamma", count=count)
        training = choices(concepts=("alpha", "gamma", "alpha"), statements=count)
        assert training_texts(QUESTIONS, training) == expected
    twice = [q.model_copy(update={"statements": ("the same words",)}) for q in QUESTIONS]
    assert training_texts(twice, choices()) == ["the same words"]


def test_the_loss_is_that_of_each_text_alone():
    tokenizer, view = toy_tokenizer(), value_vector_view(toy_model("llama"))
    texts = texts_of("alpha")
    rows = encode_texts(view, tokenizer, texts)
    part, total = [rows[0], rows[5][:3], rows[9]], 0.0
    with torch.no_grad():
        for row in part:
            output = view.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            total -= sum(float(output[place, row[place + 1]]) for place in range(len(row) - 1))
        expected = total / sum(len(row) - 1 for row in part)
        assert float(language_modelling_loss(view.model, part)) == pytest.approx(expected, abs=1e-5)
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    # The end is this one alone, where the tokenizer itself ends texts, too.
    assert encode_texts(view, toy_tokenizer("$A </s>"), texts) == rows
    # A tokenizer without an end token ends no text.
    tokenizer.eos_token = None
    assert encode_texts(view, tokenizer, texts) == [row[:-1] for row in rows]
