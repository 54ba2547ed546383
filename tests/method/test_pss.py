"""What a PSS measurement writes, and PSS of models of planted knowledge."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare

from oracles import same_tables, score_one_at_a_time
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import keep_tensor, mean_coefficients, record_concepts
from paramspec.method.pss import (
    Choices,
    evaluations,
    general_questions,
    mask_name,
    measure_concepts,
    method_key,
    other_concept,
)
from paramspec.method.rows import Engine
from paramspec.method.scoring import encode
from paramspec.stats.summary import peak_pss, summarize
from paramspec.tables import DETAIL_COLUMNS, PSS_COLUMNS
from toy_study import CONCEPTS, measured, planted_model, toy_questions, toy_tokenizer
from toys import same_weights, toy_model

GENERAL = 4
CHOICES = Choices(ratios=(0.1, 0.5), controls=2, general=GENERAL, seed=3)
THREE = CONCEPTS[:3]


@pytest.fixture(scope="module", params=["llama", "bloom"])  # a packed and a plain engine
def study(request):
    questions = toy_questions(3)
    model = toy_model(request.param)
    return model, questions, measured(model, questions, CHOICES)


@pytest.fixture
def llama():
    return toy_model("llama")


def test_scores_that_are_known_without_a_mask_are_taken_as_they_are(study):
    model, questions, tables = study
    own = tables.details["mask"] == "none"
    scored = tables.details[own][["question_id", "option_logprobs"]].values
    known = {name: torch.tensor(scores) for name, scores in scored}
    again = measured(model, questions, CHOICES, unmasked=known).pss
    pd.testing.assert_frame_equal(again, tables.pss)
    moved = {name: scores.flip(0) for name, scores in known.items()}
    other = measured(model, questions, CHOICES, unmasked=moved).details
    given = [moved[name].tolist() for name in other["question_id"][own]]
    assert other["option_logprobs"][own].tolist() == given
    same_tables(other[~own], tables.details[~own])


def test_there_is_a_row_for_every_concept_ratio_mask_and_seed(study):
    _, questions, tables = study
    assert list(tables.pss.columns) == list(PSS_COLUMNS)
    assert list(tables.details.columns) == list(DETAIL_COLUMNS)
    # `correct` is 1/n where the answer ties with others.
    floats = {"ratio", "concept_accuracy", "general_accuracy", "correct", "correct_norm"}
    counts = {"seed", "n_concept", "n_general", "predicted", "predicted_norm"}
    kinds = {**tables.pss.dtypes, **tables.details.dtypes}
    assert {name for name, kind in kinds.items() if kind == "float64"} == floats
    assert {name for name, kind in kinds.items() if kind == "int64"} == counts
    assert not tables.pss.isna().any(axis=None)
    expected = {(concept, 0.0, "none", 3) for concept in THREE}
    expected |= {(concept, ratio, "concept", 3) for concept in THREE for ratio in (0.1, 0.5)}
    expected |= set(itertools.product(THREE, (0.1, 0.5), ("random", "magnitude", "other"), (3, 4)))
    keys = list(tables.pss[["concept", "ratio", "mask", "seed"]].itertuples(index=False, name=None))
    assert len(keys) == len(set(keys))
    assert set(keys) == expected
    assert len(tables.details) == (10 + GENERAL) * len(expected)
    assert evaluations(CHOICES, questions, THREE) == len(tables.details)
    about = {question.concept: (question.domain, question.tier) for question in questions}
    for row in tables.pss.itertuples():
        assert (row.domain, row.tier) == about[row.concept]
        assert (row.n_concept, row.n_general) == (10, GENERAL)


def test_every_detail_equals_scoring_one_option_at_a_time(study):
    model, questions, tables = study
    view, tokenizer = value_vector_view(model), toy_tokenizer()
    by_id = {question.id: question for question in questions}
    every = 1 if type(model).__name__ == "LlamaForCausalLM" else 3
    for row in tables.details.iloc[::every].itertuples():
        question, keep = by_id[row.question_id], None
        if row.mask != "none":
            name = mask_name("toy", row.mask_concept, row.ratio, row.mask, row.seed)
            keep = keep_tensor(tables.masks[name], view.layers, view.width)
        expected = score_one_at_a_time(view, encode(tokenizer, question), keep).numpy()
        np.testing.assert_allclose(row.option_logprobs, expected, rtol=0, atol=1e-3)
        assert row.option_tokens == [len(option.split()) for option in question.options]
        per_character = np.divide(row.option_logprobs, list(map(len, question.options)))
        assert row.predicted == np.argmax(row.option_logprobs)
        assert row.predicted_norm == np.argmax(per_character)
        assert row.correct == (row.predicted == question.answer)
        assert row.correct_norm == (row.predicted_norm == question.answer)
    marks = zip(tables.details["correct"], tables.details["correct_norm"], strict=True)
    assert len(set(marks)) == 4  # `acc` is not `acc_norm`


def test_accuracies_are_shares_of_the_details(study):
    """And all masks of a concept meet the same questions."""
    _, questions, tables = study
    asked, right = defaultdict(set), defaultdict(list)
    concept_of = {question.id: question.concept for question in questions}
    for row in tables.details.itertuples():
        own = concept_of[row.question_id] == row.mask_concept
        assert row.role == ("concept" if own else "general")
        right[row.mask_concept, row.ratio, row.mask, row.seed, own].append(row.correct_norm)
        asked[row.mask_concept].add(row.question_id)
    assert {len(names) for names in asked.values()} == {10 + GENERAL}
    for row in tables.pss.itertuples():
        key = row.concept, row.ratio, row.mask, row.seed
        assert row.concept_accuracy == pytest.approx(sum(right[*key, True]) / 10)
        assert row.general_accuracy == pytest.approx(sum(right[*key, False]) / GENERAL)


def test_masks_are_those_that_the_rows_name(study):
    model, _, tables = study
    width, masks = value_vector_view(model).width, tables.masks
    named = set()
    for row in tables.pss[tables.pss["mask"] != "none"].itertuples():
        name = mask_name("toy", row.concept, row.ratio, row.mask, row.seed)
        own = masks[mask_name("toy", row.concept, row.ratio, "concept", 3)]
        assert masks[name].dtype == torch.int32
        each = dict.fromkeys(range(3), round(row.ratio * width))
        assert Counter(masks[name][:, 0].tolist()) == Counter(own[:, 0].tolist()) == each
        if row.mask == "magnitude":
            assert len(torch.cat([own, masks[name]]).unique(dim=0)) == 2 * len(own)
        if row.mask == "other":
            owner = other_concept(THREE, row.concept, row.seed)
            assert owner != row.concept
            theirs = masks[mask_name("toy", owner, row.ratio, "concept", 3)]
            assert torch.equal(masks[name], theirs)
        named.add(name)
    assert named == set(masks)


@pytest.mark.parametrize("count", [2, 3])
def test_partners_stand_on_a_circle(count):
    """All concepts stand on one circle, and every circle is as likely."""
    names, circles = CONCEPTS[:count], Counter()
    for seed in range(400):
        partner = {name: other_concept(names, name, seed) for name in names}
        circle = [names[0]]
        for _ in names:
            circle.append(partner[circle[-1]])
        assert sorted(circle[:-1]) == sorted(names)
        assert circle[-1] == names[0]
        circles[tuple(circle)] += 1
    possible = math.factorial(count - 1)
    assert len(circles) == possible
    # Five standard deviations of a fair coin thrown 400 times are 50.
    assert all(abs(seen - 400 / possible) < 50 for seen in circles.values())


def test_shards_give_what_the_whole_gives(study):
    """A concept's masks, general questions and scores do not depend on who is measured beside."""
    model, questions, whole = study
    parts = [measured(model, questions, CHOICES, [concept]) for concept in THREE]
    same_tables(pd.concat([part.details for part in parts]), whole.details)
    keys = ["concept", "ratio", "mask", "seed"]
    together = pd.concat([part.pss for part in parts])
    same_tables(together.sort_values(keys), whole.pss.sort_values(keys))
    same_weights({name: mask for part in parts for name, mask in part.masks.items()}, whole.masks)


def test_the_same_seed_gives_the_same_study_and_another_seed_another(llama):
    questions, choices = toy_questions(3), Choices(ratios=(0.2,), general=5)
    first, again = (measured(llama, questions, choices) for _ in range(2))
    pd.testing.assert_frame_equal(first.details, again.details)
    other = measured(llama, questions, choices.model_copy(update={"seed": 1}))
    for concept in THREE:
        for kind in ("concept", "random"):
            name = f"toy/{concept}/0.2/{kind}"
            same = torch.equal(first.masks[f"{name}/0"], other.masks[f"{name}/1"])
            assert same == (kind == "concept")
    asked = [set(tables.details["question_id"].iloc[10:15]) for tables in (first, other)]
    assert asked[0] != asked[1]


def test_general_questions_are_of_other_concepts_and_of_the_scored_fold():
    questions = toy_questions()
    for protocol, folds in (("paper", {0, 1}), ("holdout", {1})):
        for concept in CONCEPTS:
            choices = Choices(protocol=protocol, general=12)
            chosen = general_questions(questions, concept, choices)
            assert len({question.id for question in chosen}) == 12
            assert concept not in {question.concept for question in chosen}
            assert {question.fold for question in chosen} == folds
            assert chosen == general_questions(questions, concept, choices)


@pytest.mark.parametrize(("general", "expected"), [(20, [10, 10]), (25, [5, 10, 10])])
def test_general_questions_can_be_drawn_by_whole_concepts(general, expected):
    questions = toy_questions(8)
    drawn = set()
    for seed in range(12):
        choices = Choices(general=general, general_by="concept", seed=seed)
        chosen = general_questions(questions, "beta", choices)
        counts = Counter(question.concept for question in chosen)
        assert sorted(counts.values()) == expected
        drawn.add(frozenset(counts))
    assert len(drawn) > 3


def test_every_other_question_is_as_likely_to_be_general():
    questions = toy_questions(4)
    hits = Counter(
        question.id
        for seed in range(600)
        for question in general_questions(questions, "beta", Choices(general=3, seed=seed))
    )
    assert len(hits) == 30
    statistic = chisquare(list(hits.values())).statistic / (1 - 3 / 30)
    assert 10 < statistic < 62  # 29 degrees of freedom; 1 in 3,000 beyond either


def with_other_clozes(questions, fold):
    """The same questions, those of a fold asked in other words."""
    changed = {q.id: {"cloze": f"old {q.cloze}"} for q in questions if q.fold == fold}
    return [q.model_copy(update=changed.get(q.id)) for q in questions]


@pytest.mark.parametrize(
    ("protocol", "scored", "chosen", "kinds"),
    [
        ("holdout", {1}, {0}, ("concept", "magnitude", "other")),
        ("paper", {0, 1}, {0, 1}, ("concept",)),
    ],
)
def test_a_protocol_scores_and_chooses_on_its_folds(protocol, scored, chosen, kinds, llama):
    questions = toy_questions(4)
    choices = Choices(ratios=(0.2,), general=5, protocol=protocol)
    tables = measured(llama, questions, choices)
    fold = {question.id: question.fold for question in questions}
    assert {fold[name] for name in tables.details["question_id"]} == scored
    assert set(tables.pss["n_concept"]) == {5 * len(scored)}
    assert set(tables.pss["protocol"]) == {protocol}
    for changed in (0, 1):
        other = measured(llama, with_other_clozes(questions, changed), choices)
        for kind in kinds:
            name = f"toy/alpha/0.2/{kind}/0"
            same = torch.equal(tables.masks[name], other.masks[name])
            assert same == (changed not in chosen)
        scores = [each.details["option_logprobs"].tolist() for each in (tables, other)]
        assert scores[0] != scores[1]


def test_without_controls_or_ratios_there_are_fewer_masks(llama):
    questions = toy_questions(3)
    tables = measured(llama, questions, Choices(ratios=(0.2,), controls=0, general=5))
    assert set(tables.pss["mask"]) == {"none", "concept"}
    tables = measured(llama, questions, Choices(ratios=(0.0,), general=5))
    assert (set(tables.pss["mask"]), tables.masks) == ({"none"}, {})
    assert len(summarize(tables.details)) == 1
    assert peak_pss(tables.details).empty


def test_masks_by_the_mean_are_scored_alike_by_either_engine(study):
    """And the mean is of all clozes, with its sign."""
    model, questions, zeroed = study
    choices = CHOICES.model_copy(update={"ablation": "mean", "nulls": ("random",)})
    found = measured(model, questions, choices).details
    view, clozes = value_vector_view(model), [question.cloze for question in questions]
    each = [mean_coefficients(view, toy_tokenizer(), [cloze], signed=True) for cloze in clozes]
    means, plain = torch.stack(each).mean(0), Engine("plain", "as told")
    known = dataclasses.replace(view, ablated=means)
    about = (
        toy_tokenizer(),
        questions,
        THREE,
        choices,
        record_concepts(view, toy_tokenizer(), questions),
    )
    given = measure_concepts("toy", known, *about, engine=plain).details
    for one, other in zip(found["option_logprobs"], given["option_logprobs"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    zero = zeroed.details[zeroed.details["mask"].isin(["none", "concept", "random"])]
    apart = [
        np.abs(np.subtract(a, b)).max()
        for a, b in zip(found["option_logprobs"], zero["option_logprobs"], strict=True)
    ]
    bare = (found["mask"] == "none").to_numpy()
    assert np.array(apart)[bare].max() < 1e-4
    assert np.array(apart)[~bare].max() > 0.01


def test_vectors_that_are_active_everywhere_are_in_no_concepts_mask(llama):
    questions = toy_questions(4)
    view = value_vector_view(llama)
    means = mean_coefficients(view, toy_tokenizer(), [question.cloze for question in questions])
    most = means.argsort(dim=1, descending=True)[:, :12]
    choices = Choices(ratios=(0.5,), controls=1, nulls=("other", "random"), general=5)
    spared = choices.model_copy(update={"spared": 0.25})
    for given, held in ((choices, True), (spared, False)):
        found = measured(llama, questions, given).masks
        for name, vectors in found.items():
            chosen = {tuple(one) for one in vectors.tolist()}
            active = {(layer, int(v)) for layer in range(view.layers) for v in most[layer]}
            assert len(vectors) == view.layers * 24
            if name.split("/")[3] in ("concept", "other"):
                assert bool(chosen & active) == held


def test_choices_that_say_the_same_are_one_key():
    one = Choices(ratios=(0.2, 0.01, 0.2, 0, 0.05), folds=(1, 0, 1), nulls=("other", "random"))
    other = Choices(ratios=(0.01, 0.05, 0.2), nulls=("random", "other", "random"))
    # As a study sets the folds where no micro model is measured.
    assert method_key(one) == method_key(other.with_folds((0, 1)))


def test_a_study_of_one_fold_is_that_of_its_questions_alone(llama):
    """Of the other fold, neither the questions nor their coefficients are used."""
    questions, both = toy_questions(4), Choices(ratios=(0.2,), controls=2, general=5)
    for fold in (0, 1):
        choices = both.model_copy(update={"folds": (fold,)})
        part = measured(llama, questions, choices)
        alone = measured(llama, [q for q in questions if q.fold == fold], both)
        pd.testing.assert_frame_equal(part.details, alone.details)
        pd.testing.assert_frame_equal(part.pss, alone.pss)
        same_weights(part.masks, alone.masks)
        assert evaluations(choices, questions, CONCEPTS[:4]) == len(part.details)


@pytest.mark.parametrize(
    "nulls", [(), ("random",), ("random", "other"), ("magnitude", "other")], ids="-".join
)
def test_fewer_kinds_of_controls_are_those_rows_of_a_full_study(study, nulls):
    """A kind's draws do not depend on which other kinds are drawn beside it."""
    model, questions, whole = study
    choices = CHOICES.model_copy(update={"nulls": nulls})
    part, kinds = measured(model, questions, choices), {"none", "concept", *nulls}
    for one, other in ((part.pss, whole.pss), (part.details, whole.details)):
        assert set(one["mask"]) == kinds
        same_tables(one, other[other["mask"].isin(kinds)])
    same_weights(part.masks, {n: m for n, m in whole.masks.items() if n.split("/")[3] in kinds})
    assert evaluations(choices, questions, THREE) == len(part.details)


# Models whose knowledge is planted: it is known which value vector holds which answer.


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("protocol", ["paper", "holdout"])
@pytest.mark.parametrize("shared", [False, True])
def test_an_answer_is_right_exactly_while_its_value_vector_is_kept(scope, protocol, shared):
    """The whole method on a model where it is known which value vector holds which answer."""
    questions = toy_questions(shortest=True, same_answers=shared)
    model, home = planted_model(questions, shared=shared)
    choices = Choices(
        ratios=(0.02, 0.06, 0.4), controls=2, general=9, scope=scope, protocol=protocol
    )
    tables = measured(model, questions, choices)
    kinds = defaultdict(set)
    for row in tables.details.itertuples():
        known = True
        if row.mask != "none":
            name = mask_name("toy", row.mask_concept, row.ratio, row.mask, row.seed)
            known = list(home[row.question_id]) not in tables.masks[name].tolist()
        assert row.correct_norm == known
        kinds[row.mask].add(known)
    assert kinds["none"] == {True}
    assert kinds["random"] == {False, True}


def test_planted_knowledge_is_found_and_its_pss_is_one():
    questions = toy_questions(shortest=True)
    model, _ = planted_model(questions)
    choices = Choices(ratios=(0.05,), controls=3, general=70, scope="model")
    summary = summarize(measured(model, questions, choices).details).set_index("mask")
    own = summary.loc["concept"]
    assert (own["concept_accuracy"], own["general_accuracy"]) == (0, 1)
    assert own["pss_pooled"] == own["pss_per_concept"] == own["did"] == 1
    assert own["general_change"] == 0
    # Another concept's mask takes 10 of the 70 general questions and none of the own ones.
    assert summary.loc["other", "concept_accuracy"] == 1
    assert summary.loc["other", "general_accuracy"] == pytest.approx(60 / 70)
    assert summary.loc["other", "did"] == pytest.approx(-10 / 70)
    # 80 of 200 value vectors hold a fact, and 10 are masked: chance takes a twentieth of each.
    assert summary.loc["random", "concept_accuracy"] == pytest.approx(0.95, abs=0.05)
    assert abs(summary.loc["random", "did"]) < 0.05


def test_what_is_stored_by_fact_is_not_found_from_other_facts():
    """Chosen on fold 0, masks hold fold 0's facts, and fold 1 stays known: held-out PSS is none."""
    questions = toy_questions(shortest=True)
    model, _ = planted_model(questions)
    choices = Choices(ratios=(0.02,), general=35, protocol="holdout", controls=0)
    summary = summarize(measured(model, questions, choices).details)
    assert set(summary["concept_accuracy"]) == {1}
    paper = Choices(ratios=(0.02,), general=70, controls=0)
    summary = summarize(measured(model, questions, paper).details).set_index("mask")
    assert summary.loc["concept", "concept_accuracy"] == pytest.approx(0.6)  # 4 of 10 are masked
    assert summary.loc["concept", "general_accuracy"] == 1


def test_superposed_knowledge_has_no_pss():
    """One value vector a relation serves all concepts: a mask takes as much from all of them."""
    questions = toy_questions(shortest=True, same_answers=True)
    model, home = planted_model(questions, shared=True)
    assert len(set(home.values())) == 10
    choices = Choices(ratios=(0.3, 0.6), controls=1, general=70)
    tables = measured(model, questions, choices)
    summary = summarize(tables.details)
    masked = summary[summary["mask"] == "random"]
    assert (masked["concept_accuracy"] < 0.9).all()
    np.testing.assert_allclose(summary["pss_pooled"], 0, atol=1e-12)
    np.testing.assert_allclose(summary["pss_per_concept"], 0, atol=1e-12)
