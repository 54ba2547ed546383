"""Estimates and their intervals, held against scipy, finite differences and hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from paramspec.stats.estimates import (
    Estimates,
    absolute,
    difference,
    largest,
    mean_of,
    means,
    over_seeds,
    pooled,
    quantile,
    share,
    with_interval,
)


def answers(seed: int = 0, concepts: int = 30) -> pd.DataFrame:
    """Right and wrong answers of two cells, on concepts with unlike numbers of questions."""
    draw = np.random.default_rng(seed)
    rows = [
        {"cell": cell, "concept": f"c{concept}", "right": float(draw.random() < easy)}
        for concept, easy in enumerate(draw.random(concepts))
        for cell in "ab"
        for _ in range(draw.integers(1, 8))
    ]
    return pd.DataFrame(rows)


def plain(values, moves=None, count=10) -> Estimates:
    values = np.asarray(values, dtype=float)
    return Estimates(values, np.zeros((3, *values.shape)) if moves is None else moves, count)


def test_with_as_many_questions_on_each_concept_it_is_the_t_interval_of_their_means():
    draw = np.random.default_rng(1)
    table = pd.DataFrame({"concept": np.repeat(np.arange(40), 5), "right": draw.random(200)})
    _, found = means(table.assign(cell=0), "right", ["cell"])
    low, high = found.bounds()
    each = table.groupby("concept")["right"].mean()
    expected = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))
    assert found.values[0] == pytest.approx(each.mean())


def formula(a, b):
    """An expression that uses every operator, of estimates or of numbers."""
    return (a - b * 2.0) / (a + b) * a - 1.0 + -b / 3.0


def test_what_is_computed_moves_by_the_chain_rule():
    """Against finite differences: more weight on one concept's answers, and all anew."""
    table = answers()
    names = sorted(set(table["concept"]))
    _, found = means(table, "right", ["cell"])
    computed = formula(found[0], found[1])

    def anew(weights: dict[str, float]) -> float:
        weight = table["concept"].map(weights).fillna(1.0)
        sums = (table["right"] * weight).groupby(table["cell"]).sum()
        return formula(*(sums / weight.groupby(table["cell"]).sum()))

    assert computed.values == pytest.approx(anew({}))
    for place, name in enumerate(names):
        slope = (anew({name: 1 + 1e-5}) - anew({name: 1 - 1e-5})) / 2e-5
        assert computed.moves[place] == pytest.approx(slope, abs=1e-8)
    assert computed.moves.sum() == pytest.approx(0, abs=1e-12)


def test_arithmetic_follows_numpys_shapes():
    draw = np.random.default_rng(2)
    many = Estimates(draw.random((3, 2)), draw.random((5, 3, 2)), 5)
    one = Estimates(np.array(0.5), draw.random(5), 4)
    both = many * one
    assert both.values.shape == (3, 2)
    assert both.count == 4
    for i in range(3):
        for j in range(2):
            alone = many[i, j] * one
            assert both.values[i, j] == alone.values
            assert np.allclose(both.moves[:, i, j], alone.moves)
    assert np.allclose(many.mean(1).moves, many.moves.mean(2))


def test_what_is_undefined_is_no_number():
    """Nothing divided by zero; no interval of one concept, nor where nothing varies."""
    _, found = means(answers(), "right", ["cell"])
    assert np.isnan((found[0] / (found[0] - found[0])).values)
    assert np.isnan((found[0] - found[0]).bounds()).all()
    _, single = means(answers(concepts=1), "right", ["cell"])
    assert np.isnan(single.bounds()).all()


def test_a_share_has_wilsons_interval():
    draw = np.random.default_rng(3)
    for p in (0.02, 0.3, 0.97):
        right = (draw.random(4000) < p).astype(float)
        table = pd.DataFrame({"concept": range(4000), "right": right, "cell": 0})
        _, found = means(table, "right", ["cell"])
        one = share(found[0], 4000)
        expected = stats.binomtest(int(right.sum()), 4000).proportion_ci(0.95, "wilson")
        assert (one["low"], one["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_right_or_all_wrong_is_as_sure_as_there_are_concepts(right):
    for concepts, questions, many in ((12, 60, 12), (1, 7, 7)):
        _, found = means(
            pd.DataFrame({"concept": np.arange(questions) % concepts, "right": right, "cell": 0}),
            "right",
            ["cell"],
        )
        one = share(found[0], questions)
        reach = quantile(many) ** 2 / (many + quantile(many) ** 2)
        assert one["value"] == right
        assert sorted((one["low"], one["high"])) == pytest.approx(
            sorted((right, abs(right - reach)))
        )


def test_questions_on_one_concept_count_for_less_where_they_go_together():
    """Ten copies of each answer are worth no more than one."""
    table = pd.DataFrame({"concept": range(50), "right": [1.0] * 30 + [0.0] * 20, "cell": 0})
    alone, copied = (
        share(means(rows, "right", ["cell"])[1][0], len(rows))
        for rows in (table, pd.concat([table] * 10))
    )
    assert alone == pytest.approx(copied)


def test_an_absolute_value_is_above_zero_only_where_its_sign_is_known():
    low, high = absolute(np.array([0.1, -0.3, -0.1, -0.3]), np.array([0.3, -0.1, 0.3, 0.1]))
    assert low.tolist() == [0.1, 0.1, 0, 0]
    assert high.tolist() == [0.3, 0.3, 0.3, 0.3]
    assert np.isnan(absolute(np.array(np.nan), np.array(np.nan))).all()


def test_a_maximum_holds_its_point_and_one_value_needs_no_correction():
    draw = np.random.default_rng(4)
    for _ in range(50):
        gaps = Estimates(draw.normal(0, 1, 4), draw.normal(0, 0.2, (20, 4)), 20)
        for signed in (True, False):
            one = largest(gaps, signed=signed)
            assert one["value"] == max(gaps.values if signed else abs(gaps.values))
            assert one["low"] <= one["value"] <= one["high"]
        alone = largest(gaps[:1], signed=True)
        assert alone == pytest.approx(gaps[0].interval())
        # Of four, all must hold at once.
        four, error = largest(gaps[[0, 0, 0, 0]], signed=True), gaps.errors()[0]
        assert four["low"] == pytest.approx(
            four["value"] - error * stats.t.isf(1 - 0.975**0.25, 19)
        )
        assert four["high"] == pytest.approx(alone["high"])


def test_seeds_are_a_sample_too():
    """Without variation over concepts it is the t interval of seeds; with one seed, of concepts."""
    values = np.array([0.5, 0.6, 0.8])
    found = over_seeds(plain(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    sample = np.random.default_rng(5).normal(0, 0.4, 20)
    moves = np.repeat((sample - sample.mean())[:, None] / 20, 3, axis=1)
    both = over_seeds(plain(values, moves, 20))
    welch = stats.ttest_ind(sample, values, equal_var=False).confidence_interval(0.95)
    assert both["high"] - both["low"] == pytest.approx(welch.high - welch.low)
    alone = plain(values, moves, 20)
    assert over_seeds(alone[:1]) == pytest.approx(alone[0].interval(), rel=1e-12)
    again = over_seeds(alone, alone)  # two models alike: a mean that is known better
    assert again["value"] == both["value"]
    assert both["low"] < again["low"] < again["high"] < both["high"]
    assert math.isnan(over_seeds(plain([0.5, 0.5]))["low"])


def test_intervals_of_independent_values_add_in_quadrature():
    one, other = {"value": 1.0, "low": 0.7, "high": 1.4}, {"value": 0.5, "low": 0.1, "high": 0.8}
    assert difference(one, other) == pytest.approx(
        {"value": 0.5, "low": 0.5 - math.hypot(0.3, 0.3), "high": 0.5 + math.hypot(0.4, 0.4)}
    )
    assert pooled([one, other]) == pytest.approx(
        {"value": 0.75, "low": 0.75 - 0.25, "high": 0.75 + 0.25}
    )
    assert mean_of([one, other]) == pytest.approx({"value": 0.75, "low": 0.4, "high": 1.1})


def test_a_value_is_told_with_its_interval_and_never_broken():
    row = {"value": 0.1, "did": 3.0, "did_low": -2.0, "did_high": 1234.5}
    assert with_interval(row, "did", "+,.1f") == "+3.0\u00a0[-2.0,\u00a0+1,234.5]"
    far = {"value": 2.0, "low": -3e9, "high": 4e6}
    assert with_interval(far) == "2.00\u00a0[-3.0e+09,\u00a04.0e+06]"
    assert (
        with_interval({"value": 0.1, "low": np.nan, "high": 1.0}) == "0.10\u00a0[no\u00a0interval]"
    )
    assert with_interval({"value": np.nan, "low": np.nan, "high": np.nan}) == "nan"
