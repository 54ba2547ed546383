"""What a PSS measurement writes, and PSS of models of planted knowledge."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import keep_tensor, record_concepts
from paramspec.method.pss import (
    Choices,
    concept_masks,
    evaluations,
    general_questions,
    mask_name,
    method_key,
    other_concept,
)
from paramspec.method.scoring import encode
from paramspec.stats.summary import peak_pss, summarize
from paramspec.tables import DETAIL_COLUMNS, PSS_COLUMNS
from toy_study import CONCEPTS, measured, toy_questions, toy_tokenizer
from toys import toy_model

KINDS = {"none", "concept", "random", "magnitude", "other"}


GENERAL = 4
CHOICES = Choices(ratios=(0.1, 0.5), controls=2, general=GENERAL, seed=3)


@pytest.fixture(scope="module", params=["llama", "bloom"])  # a packed and a plain engine
def study(request):
    questions = toy_questions(3)
    model = toy_model(request.param)
    return model, questions, measured(model, questions, CHOICES)


def test_scores_that_are_known_without_a_mask_are_taken_as_they_are(study):
    model, questions, tables = study
    none = tables.details[tables.details["mask"] == "none"]
    known = {
        name: torch.tensor(scores)
        for name, scores in none[["question_id", "option_logprobs"]].values
    }
    pd.testing.assert_frame_equal(
        measured(model, questions, CHOICES, unmasked=known).pss, tables.pss
    )
    moved = {name: scores.flip(0) for name, scores in known.items()}
    other = measured(model, questions, CHOICES, unmasked=moved).details
    own = other["mask"] == "none"
    assert other["option_logprobs"][own].map(list).tolist() == [
        moved[name].tolist() for name in other["question_id"][own]
    ]
    np.testing.assert_allclose(
        np.stack(other["option_logprobs"][~own]),
        np.stack(tables.details["option_logprobs"][~own]),
        rtol=0,
        atol=1e-4,
    )


# What is written


def test_columns_and_types_are_those_of_the_schema(study):
    _, _, tables = study
    assert list(tables.pss.columns) == list(PSS_COLUMNS)
    assert list(tables.details.columns) == list(DETAIL_COLUMNS)
    kinds = {**tables.pss.dtypes, **tables.details.dtypes}
    # `correct` is 1/n where the answer ties with others.
    floats = ("ratio", "concept_accuracy", "general_accuracy", "correct", "correct_norm")
    counts = ("seed", "n_concept", "n_general", "predicted", "predicted_norm")
    for name, kind in (*((n, "float64") for n in floats), *((n, "int64") for n in counts)):
        assert kinds[name] == kind, name
    assert not tables.pss.isna().any(axis=None)


def test_there_is_a_row_for_every_concept_ratio_mask_and_seed(study):
    _, questions, tables = study
    expected = {(concept, 0.0, "none", 3) for concept in CONCEPTS[:3]}
    expected |= {(concept, ratio, "concept", 3) for concept in CONCEPTS[:3] for ratio in (0.1, 0.5)}
    expected |= set(
        itertools.product(CONCEPTS[:3], (0.1, 0.5), ("random", "magnitude", "other"), (3, 4))
    )
    keys = list(tables.pss[["concept", "ratio", "mask", "seed"]].itertuples(index=False, name=None))
    assert len(keys) == len(set(keys))
    assert set(keys) == expected
    assert set(tables.pss["n_concept"]) == {10}
    assert set(tables.pss["n_general"]) == {GENERAL}
    assert len(tables.details) == (10 + GENERAL) * len(expected)
    assert evaluations(CHOICES, questions, CONCEPTS[:3]) == len(tables.details)
    about = {question.concept: (question.domain, question.tier) for question in questions}
    for row in tables.pss.itertuples():
        assert (row.domain, row.tier) == about[row.concept]


def test_every_detail_equals_scoring_one_option_at_a_time(study):
    model, questions, tables = study
    view, tokenizer = value_vector_view(model), toy_tokenizer()
    by_id = {question.id: question for question in questions}
    every = 1 if type(model).__name__ == "LlamaForCausalLM" else 3
    for row in tables.details.iloc[::every].itertuples():
        question = by_id[row.question_id]
        name = mask_name("toy", row.mask_concept, row.ratio, row.mask, row.seed)
        keep = None
        if row.mask != "none":
            keep = keep_tensor(tables.masks[name], view.layers, view.width)
        item = encode(tokenizer, question)
        expected = score_one_at_a_time(view, item, keep).numpy()
        np.testing.assert_allclose(row.option_logprobs, expected, rtol=0, atol=1e-3)
        assert row.option_tokens == [len(option.split()) for option in question.options]
        per_character = [
            value / len(option)
            for value, option in zip(row.option_logprobs, question.options, strict=True)
        ]
        assert row.predicted == max(range(4), key=lambda i, v=row.option_logprobs: v[i])
        assert row.predicted_norm == max(range(4), key=lambda i, v=per_character: v[i])
        assert row.correct == (row.predicted == question.answer)
        assert row.correct_norm == (row.predicted_norm == question.answer)


def test_details_hold_all_outcomes(study):
    """Otherwise the test above could not tell `acc` from `acc_norm`, or a mask from none."""
    details = study[2].details
    assert set(zip(details["correct"], details["correct_norm"], strict=True)) == set(
        itertools.product((False, True), repeat=2)
    )
    unmasked = details[details["mask"] == "none"].set_index(["mask_concept", "question_id"])
    for kind in KINDS - {"none"}:
        moved = [
            np.max(np.abs(np.subtract(row.option_logprobs, unmasked.loc[key, "option_logprobs"])))
            for row in details[details["mask"] == kind].itertuples()
            for key in [(row.mask_concept, row.question_id)]
        ]
        assert min(moved) > 1e-2


def test_what_a_model_cannot_decide_is_shared_by_the_options(study):
    """Every word is equally likely: sums tie where options have as many words."""
    questions = toy_questions(3)
    model = toy_model("llama")
    model.lm_head.weight.zero_()
    tables = measured(model, questions, Choices(ratios=(0.1,), general=5))
    share = {}
    for question in questions:
        lengths = [len(option) for option in question.options]
        longest = [place for place in range(4) if lengths[place] == max(lengths)]
        share[question.id] = (question.answer in longest) / len(longest)
    assert {0, 0.5, 1} < set(share.values()) | {0.25}
    for row in tables.details.itertuples():
        assert (row.correct, row.correct_norm) == (0.25, share[row.question_id])
        assert row.predicted == 0
    own = [np.mean([share[q.id] for q in questions if q.concept == c]) for c in CONCEPTS[:3]]
    none = tables.pss[tables.pss["mask"] == "none"]
    np.testing.assert_allclose(none["concept_accuracy"], own)
    summary = summarize(tables.pss).set_index(["mask", "ratio"])
    assert summary.loc[("none", 0), "concept_accuracy"] == pytest.approx(np.mean(own))


def test_accuracies_are_shares_of_the_details(study):
    """And all masks of a concept meet the same questions."""
    _, questions, tables = study
    for _, part in tables.details.groupby("mask_concept"):
        asked = {tuple(one["question_id"]) for _, one in part.groupby(["ratio", "mask", "seed"])}
        assert len(asked) == 1
        assert len(set(next(iter(asked)))) == 10 + GENERAL
    concept_of = {question.id: question.concept for question in questions}
    right = defaultdict(list)
    for row in tables.details.itertuples():
        own = concept_of[row.question_id] == row.mask_concept
        assert row.role == ("concept" if own else "general")
        right[row.mask_concept, row.ratio, row.mask, row.seed, own].append(row.correct_norm)
    for row in tables.pss.itertuples():
        own = right[row.concept, row.ratio, row.mask, row.seed, True]
        general = right[row.concept, row.ratio, row.mask, row.seed, False]
        assert row.concept_accuracy == pytest.approx(sum(own) / 10)
        assert row.general_accuracy == pytest.approx(sum(general) / GENERAL)


def test_masks_are_those_that_the_rows_name(study):
    model, _, tables = study
    width = value_vector_view(model).width
    rows = tables.pss[tables.pss["mask"] != "none"]
    names = {
        mask_name("toy", row.concept, row.ratio, row.mask, row.seed) for row in rows.itertuples()
    }
    assert names == set(tables.masks)
    for name, vectors in tables.masks.items():
        _, concept, ratio, kind, _ = name.split("/")
        assert vectors.dtype == torch.int32
        assert vectors.shape[1] == 2
        own = tables.masks[f"toy/{concept}/{ratio}/concept/3"]
        sizes = Counter(own[:, 0].tolist())
        assert sizes == dict.fromkeys(range(3), round(float(ratio) * width))
        assert Counter(vectors[:, 0].tolist()) == sizes
        if kind == "magnitude":
            both = torch.cat([own, vectors])
            assert len(torch.unique(both, dim=0)) == len(both)


def test_the_other_mask_is_another_concepts_own(study):
    tables = study[2]
    for ratio, seed in itertools.product(("0.1", "0.5"), (3, 4)):
        for concept in CONCEPTS[:3]:
            theirs = tables.masks[f"toy/{concept}/{ratio}/other/{seed}"]
            owners = [
                owner
                for owner in CONCEPTS[:3]
                if torch.equal(theirs, tables.masks[f"toy/{owner}/{ratio}/concept/3"])
            ]
            assert owners == [other_concept(CONCEPTS[:3], concept, seed)]
            assert owners != [concept]


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
    parts = [measured(model, questions, CHOICES, [concept]) for concept in CONCEPTS[:3]]
    pd.testing.assert_frame_equal(
        pd.concat([part.pss for part in parts], ignore_index=True).sort_values(
            ["concept", "ratio", "mask", "seed"], ignore_index=True
        ),
        whole.pss.sort_values(["concept", "ratio", "mask", "seed"], ignore_index=True),
    )
    details = pd.concat([part.details for part in parts], ignore_index=True)
    pd.testing.assert_frame_equal(
        details.drop(columns="option_logprobs"), whole.details.drop(columns="option_logprobs")
    )
    np.testing.assert_allclose(
        details["option_logprobs"].tolist(), whole.details["option_logprobs"].tolist(), atol=1e-3
    )
    for name, vectors in itertools.chain(*(part.masks.items() for part in parts)):
        assert torch.equal(vectors, whole.masks[name])


def test_the_same_seed_gives_the_same_study_and_another_seed_another():
    model, questions = toy_model("llama"), toy_questions(3)
    choices = Choices(ratios=(0.2,), general=5)
    first, again = (measured(model, questions, choices) for _ in range(2))
    pd.testing.assert_frame_equal(first.details, again.details)
    other = measured(model, questions, choices.model_copy(update={"seed": 1}))
    for concept in CONCEPTS[:3]:
        own = f"toy/{concept}/0.2/concept"
        assert torch.equal(first.masks[f"{own}/0"], other.masks[f"{own}/1"])
        chance = f"toy/{concept}/0.2/random"
        assert not torch.equal(first.masks[f"{chance}/0"], other.masks[f"{chance}/1"])
    asked = [set(tables.details["question_id"].iloc[10:15]) for tables in (first, other)]
    assert asked[0] != asked[1]


# General questions


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


# The held-out protocol


def with_other_clozes(questions, fold):
    """The same questions, those of a fold asked in other words."""
    return [
        question.model_copy(update={"cloze": f"old {question.cloze}"})
        if question.fold == fold
        else question
        for question in questions
    ]


def test_holdout_scores_on_fold_1_and_chooses_on_fold_0():
    model, questions = toy_model("llama"), toy_questions(4)
    choices = Choices(ratios=(0.2,), general=5, protocol="holdout")
    tables = measured(model, questions, choices)
    fold = {question.id: question.fold for question in questions}
    assert {fold[name] for name in tables.details["question_id"]} == {1}
    assert set(tables.pss["n_concept"]) == {5}
    assert set(tables.pss["protocol"]) == {"holdout"}

    scored_otherwise = measured(model, with_other_clozes(questions, 1), choices)
    assert tables.masks.keys() == scored_otherwise.masks.keys()
    for name, vectors in tables.masks.items():
        assert torch.equal(vectors, scored_otherwise.masks[name]), name
    assert tables.details["option_logprobs"].tolist() != (
        scored_otherwise.details["option_logprobs"].tolist()
    )
    chosen_otherwise = measured(model, with_other_clozes(questions, 0), choices)
    for kind in ("concept", "magnitude", "other"):
        name = f"toy/alpha/0.2/{kind}/0"
        assert not torch.equal(tables.masks[name], chosen_otherwise.masks[name])


def test_the_papers_protocol_chooses_and_scores_on_both_folds():
    model, questions = toy_model("llama"), toy_questions(4)
    choices = Choices(ratios=(0.2,), general=5)
    tables = measured(model, questions, choices)
    assert set(tables.pss["n_concept"]) == {10}
    for fold in (0, 1):
        otherwise = measured(model, with_other_clozes(questions, fold), choices)
        name = "toy/alpha/0.2/concept/0"
        assert not torch.equal(tables.masks[name], otherwise.masks[name])


# Choices


def test_ratios_are_sorted_unique_and_without_zero():
    assert Choices(ratios=(0.2, 0.01, 0.2, 0, 0.05)).ratios == (0.01, 0.05, 0.2)
    assert Choices(ratios=(0,)).ratios == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratios": (0.1, 1.5)}, r"ratios\[1\] 1\.5: input should be less than or equal to 1"),
        ({"ratios": (float("nan"),)}, r"ratios\[0\] nan: "),
        ({"ratios": (0.1, "a")}, r"ratios\[1\] 'a': input should be a valid number"),
        ({"position": "first"}, r"position 'first': input should be 'mean' or 'last'"),
        ({"controls": -1}, r"controls -1: "),
        ({"general": 0}, r"general 0: "),
        ({"seed": 2**70}, r"seed 1180591620717411303424: "),
        ({"ratio": 0.1}, r"ratio 0\.1: extra inputs are not permitted"),
        ({"folds": ()}, r"folds \(\): "),
        ({"folds": (0, -1)}, r"folds\[1\] -1: input should be 0 or 1"),
        ({"nulls": ("random", "none")}, r"nulls\[1\] 'none': .*'random', 'magnitude' or 'other'"),
    ],
)
def test_a_choice_that_is_none_is_one_line(given, message):
    with pytest.raises(InputError, match=message) as caught:
        Choices.parse(**given)
    assert "\n" not in str(caught.value)


def test_without_controls_or_ratios_there_are_fewer_masks():
    model, questions = toy_model("llama"), toy_questions(3)
    tables = measured(model, questions, Choices(ratios=(0.2,), controls=0, general=5))
    assert set(tables.pss["mask"]) == {"none", "concept"}
    tables = measured(model, questions, Choices(ratios=(0.0,), general=5))
    assert set(tables.pss["mask"]) == {"none"}
    assert tables.masks == {}
    assert len(summarize(tables.pss)) == 1
    assert peak_pss(tables.pss).empty


def test_the_concept_mask_grows_with_the_ratio():
    """Masks of a concept are nested: a larger ratio adds to a smaller one's."""
    view = value_vector_view(toy_model("llama"))
    coefficients = record_concepts(view, toy_tokenizer(), toy_questions(3))
    choices = Choices(ratios=(0.1, 0.2, 0.5, 1.0), controls=0)
    masks = concept_masks(coefficients, "beta", choices)
    for smaller, larger in itertools.pairwise(masks):
        assert set(map(tuple, smaller.vectors.tolist())) < set(map(tuple, larger.vectors.tolist()))
    assert len(masks[-1].vectors) == view.layers * view.width


# The folds and the kinds of controls that a study takes


def test_a_study_of_one_fold_is_that_of_its_questions_alone():
    """Of the other fold, neither the questions nor their coefficients are used."""
    model, questions = toy_model("llama"), toy_questions(4)
    both = Choices(ratios=(0.2,), controls=2, general=5)
    for fold in (0, 1):
        choices = both.model_copy(update={"folds": (fold,)})
        part = measured(model, questions, choices)
        alone = measured(model, [q for q in questions if q.fold == fold], both)
        pd.testing.assert_frame_equal(part.details, alone.details)
        pd.testing.assert_frame_equal(part.pss, alone.pss)
        assert part.masks.keys() == alone.masks.keys()
        assert all(torch.equal(part.masks[name], alone.masks[name]) for name in part.masks)
        otherwise = measured(model, with_other_clozes(questions, 1 - fold), choices)
        pd.testing.assert_frame_equal(part.details, otherwise.details)
        assert evaluations(choices, questions, CONCEPTS[:4]) == len(part.details)


@pytest.mark.parametrize(
    "nulls", [(), ("random",), ("random", "other"), ("magnitude", "other")], ids="-".join
)
def test_fewer_kinds_of_controls_are_those_rows_of_a_full_study(study, nulls):
    """A kind's draws do not depend on which other kinds are drawn beside it."""
    model, questions, whole = study
    choices = CHOICES.model_copy(update={"nulls": nulls})
    part = measured(model, questions, choices)
    kinds = {"none", "concept", *nulls}
    for one, other in ((part.pss, whole.pss), (part.details, whole.details)):
        assert set(one["mask"]) == kinds
        expected = other[other["mask"].isin(kinds)].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            one.drop(columns="option_logprobs", errors="ignore"),
            expected.drop(columns="option_logprobs", errors="ignore"),
        )
    expected = {name for name in whole.masks if name.split("/")[3] in kinds}
    assert set(part.masks) == expected
    assert all(torch.equal(part.masks[name], whole.masks[name]) for name in expected)
    assert evaluations(choices, questions, CONCEPTS[:3]) == len(part.details)


def test_folds_and_kinds_of_controls_are_part_of_the_key():
    given = [
        Choices(folds=folds, nulls=nulls)
        for folds in ((0,), (1,), (0, 1))
        for nulls in ((), ("random",), ("other",), ("random", "magnitude", "other"))
    ]
    keys = [json.dumps(method_key(choices), sort_keys=True) for choices in given]
    assert len(set(keys)) == len(given)
    both = Choices().with_folds((0, 1))  # as a study does where no micro model is measured
    assert method_key(both) == method_key(given[-1])
    # Said otherwise, the same: nothing is measured twice.
    again = Choices(folds=(1, 0, 1), nulls=("other", "random", "magnitude", "random"))
    assert method_key(again) == method_key(both)
    assert evaluations(again, toy_questions(3), CONCEPTS[:3]) == (
        evaluations(Choices(), toy_questions(3), CONCEPTS[:3])
    )
