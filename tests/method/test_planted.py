"""PSS of models whose knowledge is planted: it is known which value vector holds which answer."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from paramspec.method.pss import Choices, mask_name
from paramspec.stats.summary import summarize
from toy_study import measured, planted_model, toy_questions


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
    summary = summarize(measured(model, questions, choices).pss).set_index("mask")
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
    summary = summarize(measured(model, questions, choices).pss)
    assert set(summary["concept_accuracy"]) == {1}
    paper = Choices(ratios=(0.02,), general=70, controls=0)
    summary = summarize(measured(model, questions, paper).pss).set_index("mask")
    assert summary.loc["concept", "concept_accuracy"] == pytest.approx(0.6)  # 4 of 10 are masked
    assert summary.loc["concept", "general_accuracy"] == 1


def test_superposed_knowledge_has_no_pss():
    """One value vector a relation serves all concepts: a mask takes as much from all of them."""
    questions = toy_questions(shortest=True, same_answers=True)
    model, home = planted_model(questions, shared=True)
    assert len(set(home.values())) == 10
    choices = Choices(ratios=(0.3, 0.6), controls=1, general=70)
    tables = measured(model, questions, choices)
    summary = summarize(tables.pss)
    masked = summary[summary["mask"] == "random"]
    assert (masked["concept_accuracy"] < 0.9).all()
    np.testing.assert_allclose(summary["pss_pooled"], 0, atol=1e-12)
    np.testing.assert_allclose(summary["pss_per_concept"], 0, atol=1e-12)
