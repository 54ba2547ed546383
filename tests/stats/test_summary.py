"""Summaries and verdicts against tables worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from paramspec.errors import InputError
from paramspec.stats.summary import accuracy_table, general_change, peak_pss, summarize
from paramspec.stats.verdicts import holds, verdict


def cell(concept, mask, ratio, own, general, seed=0):
    """Answers of a mask of a concept, `own` and `general` as (right, questions)."""
    kept = {"model": "toy", "protocol": "paper", "mask_concept": concept, "mask": mask}
    return [
        {**kept, "ratio": ratio, "seed": seed, "role": role, "concept": about}
        | {"question_id": f"{about}/{place}", "correct_norm": float(place < right)}
        | {"option_logprobs": [0.0] * 4}
        for role, about, (right, asked) in (
            ("concept", concept, own),
            ("general", f"not {concept}", general),
        )
        for place in range(asked)
    ]


def details(*cells):
    return pd.DataFrame(itertools.chain(*cells))


def control(*draws):
    """A study of two concepts, of no mask and of random ones: (ratio, seed, right own of 10)."""
    cells = [("none", 0.0, 0, 5), *(("random", *draw) for draw in draws)]
    return details(
        *(
            cell(name, mask, ratio, (n, 10), (5, 10), seed)
            for name in "ab"
            for mask, ratio, seed, n in cells
        )
    )


HAND = [
    cell("a", "none", 0.0, (9, 10), (6, 10)),
    cell("b", "none", 0.0, (2, 5), (4, 5)),
    cell("a", "concept", 0.1, (3, 10), (5, 10)),
    cell("b", "concept", 0.1, (4, 5), (3, 5)),
    cell("a", "concept", 0.2, (1, 10), (4, 10)),
    cell("b", "concept", 0.2, (1, 5), (1, 5)),
]


def test_the_statistics_of_a_table_worked_by_hand():
    """Pooled: C(0) 11/15, G(0) 10/15, C(.1) 7/15, G(.1) 8/15, C(.2) 2/15, G(.2) 5/15."""
    summary = summarize(details(*HAND)).set_index(["mask", "ratio"])
    g0 = 10 / 15
    names = ["concept_accuracy", "general_accuracy", "pss_pooled", "pss_per_concept", "did"]
    names += ["general_change", "concepts"]
    expected = {
        ("none", 0.0): (11 / 15, 10 / 15, (1 / 15) / g0, (0.3 + 0.4) / 2 / g0, 0, 0, 2),
        ("concept", 0.1): (7 / 15, 8 / 15, 0.1, (0.2 + 0.2) / 2 / g0, 2 / 15 / g0, -2 / 15, 2),
        ("concept", 0.2): (2 / 15, 5 / 15, 0.3, (0.3 + 0.0) / 2 / g0, 4 / 15 / g0, -5 / 15, 2),
    }
    assert set(summary.index) == set(expected)
    for place, values in expected.items():
        assert summary.loc[place, names].tolist() == pytest.approx(values), place
    for name in names[:-1]:
        low, value, high = (summary[f"{name}{end}"] for end in ("_low", "", "_high"))
        assert (low.isna() | ((low <= value) & (value <= high))).all(), name


def test_peaks_of_the_table_worked_by_hand():
    """Pooled, PSS peaks at 0.2; per concept, at 0.1. Without 0.2, only the pooled peak falls."""
    for cells, pooled, ratio, did in ((HAND, 0.3, 0.2, 3 / 10), (HAND[:4], 0.1, 0.1, 2 / 10)):
        (peak,) = peak_pss(details(*cells)).to_dict("records")
        assert peak["peak_pooled"] == pytest.approx(pooled)
        assert peak["peak_per_concept"] == pytest.approx(0.3)
        assert peak["ratio"] == ratio
        assert peak["did"] == pytest.approx(did)
        assert peak["peak_did"] == pytest.approx({0.3: 0.4, 0.1: 0.2}[pooled])


def test_models_and_protocols_are_kept_apart():
    both = [("x", "paper"), ("x", "holdout"), ("y", "paper")]
    tables = [details(*HAND).assign(model=model, protocol=protocol) for model, protocol in both]
    tables[2].loc[tables[2]["role"] == "concept", "correct_norm"] = 0.0
    for function in (summarize, peak_pss):
        each = [function(table) for table in tables]
        whole = function(pd.concat(tables))
        pd.testing.assert_frame_equal(whole, pd.concat(each, ignore_index=True))
        assert each[0].iloc[:, 2:].equals(each[1].iloc[:, 2:])
        assert not each[0].iloc[:, 2:].equals(each[2].iloc[:, 2:])


def test_a_control_is_the_mean_over_its_draws_so_that_more_draws_do_not_shrink_it():
    """Each draw has a PSS of 0.2 / 0.5; averaged before the absolute value, it would be 0."""
    table = control((0.1, 0, 3), (0.1, 1, 7))
    summary = summarize(table).set_index("mask").loc["random"]
    assert summary["concept_accuracy"] == pytest.approx(0.5)
    assert summary["did"] == pytest.approx(0)
    assert summary["pss_pooled"] == summary["pss_per_concept"] == pytest.approx(0.4)
    peak = peak_pss(table).iloc[0]
    assert peak["peak_pooled"] == peak["peak_per_concept"] == pytest.approx(0.4)
    # The peak is that of one draw: draw 0 peaks at 0.1 and draw 1 at 0.2, each with 0.4.
    apart = control((0.1, 0, 3), (0.1, 1, 5), (0.2, 0, 5), (0.2, 1, 3))
    assert peak_pss(apart).loc[0, "peak_pooled"] == pytest.approx(0.4)


def test_answers_with_a_hole_are_refused():
    with pytest.raises(InputError, match=r"mask 'concept', ratio 0\.2, seed 0: no answer .* 'b'"):
        summarize(details(*HAND[:-1]))
    with pytest.raises(InputError, match=r"no answer \(general\) for 'b'"):
        summarize(details(*HAND[:-1], [one for one in HAND[-1] if one["role"] == "concept"]))
    with pytest.raises(InputError, match=r"mask 'none': no row"):
        summarize(details(*HAND[2:]))
    with pytest.raises(InputError, match="'a/0': answered twice under mask 'none' of 'a'"):
        summarize(details(*HAND, HAND[0]))


def test_what_is_undefined_is_no_number():
    """The interval of what a single concept shows; PSS of a model that knows nothing."""
    alone = [cell("a", "none", 0.0, (9, 10), (6, 10)), cell("a", "concept", 0.1, (3, 10), (5, 10))]
    summary = summarize(details(*alone))
    assert summary["pss_pooled"].notna().all()
    assert summary[["pss_pooled_low", "did_high"]].isna().all(axis=None)
    summary = summarize(details(*HAND).assign(correct_norm=0.0))
    assert summary[["pss_pooled", "pss_pooled_low"]].isna().all(axis=None)
    assert (summary["general_accuracy"] == 0).all()
    assert summary["general_accuracy_high"].between(0.2, 1).all()


def test_the_general_change_is_a_mean_over_ratios():
    change = general_change(details(*HAND), [0.1, 0.2])
    assert change["value"] == pytest.approx((-2 / 15 - 5 / 15) / 2)
    assert change["low"] < change["value"] < change["high"]


def test_groups_of_one_concept_have_an_interval_of_their_own_questions():
    table = pd.DataFrame({"concept": list("aabbbb"), "domain": list("xxyyyy")})
    table = table.assign(correct_norm=[1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    table["option_logprobs"] = [[0.0] * 2] * 2 + [[0.0] * 5] * 4
    found = accuracy_table(table, by=["domain"]).set_index("group")
    assert found.loc["y", ["accuracy", "high", "n"]].tolist() == [1, 1, 4]
    assert found["chance"].to_dict() == {"x": 1 / 2, "y": 1 / 5}
    assert found.loc["y", "low"] == pytest.approx(4 / (4 + 3.18245**2), abs=1e-4)  # t, 3 degrees
    assert found.loc["x", "low"] < 0.5 < found.loc["x", "high"]


UP, DOWN, UNSURE = (
    {"low": low, "high": high} for low, high in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3))
)
MISSING = [{"low": np.nan, "high": 0.3}, {"low": 0.1, "high": np.nan}]


def test_a_verdict_follows_from_all_intervals():
    for effects, expected in (
        ((), "not run"),
        ((UP,), "consistent"),
        ((UP, UP), "consistent"),
        ((UP, UNSURE), "cannot tell"),
        ((UNSURE, DOWN), "opposite"),
        ((UP, DOWN), "opposite"),
        (({"low": 0.0, "high": 0.3},), "cannot tell"),
        (({"low": -0.3, "high": 0.0},), "cannot tell"),
    ):
        assert verdict(*effects) == expected
        assert verdict(*effects, measured=False) == "not run"
    for missing in MISSING:  # supports no claim, and opposes none
        assert verdict(missing) == verdict(UP, missing) == verdict(missing, DOWN) == "cannot tell"
    assert verdict(UP, testable=False) == verdict(testable=False) == "not testable here"
    assert verdict(measured=False, testable=False) == "not run"


def test_an_interval_holds_the_papers_value_or_not():
    assert holds(UP, 0.2) == holds(UP, 0.1) == "yes"
    assert holds(UP, 0.31) == "no"
    assert holds(MISSING[0], 0.2) == "?"
