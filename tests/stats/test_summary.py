"""Summaries against tables worked by hand and exact enumeration; intervals against simulation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from paramspec.errors import InputError
from paramspec.stats.summary import best_general_change, peak_pss, summarize, verdict


def row(concept, mask, ratio, own, general, seed=0):
    """`own` and `general` as (right, questions)."""
    row = {"model": "toy", "protocol": "paper", "concept": concept, "seed": seed}
    row |= {"mask": mask, "ratio": ratio, "n_concept": own[1], "n_general": general[1]}
    accuracies = {"concept_accuracy": own[0] / own[1], "general_accuracy": general[0] / general[1]}
    return row | accuracies


def control(*draws):
    """A study of two concepts, of no mask and of random ones: (ratio, seed, right own of 10)."""
    cells = [("none", 0.0, 0, 5), *(("random", *draw) for draw in draws)]
    return pd.DataFrame(
        row(name, mask, ratio, (n, 10), (5, 10), seed)
        for name in "ab"
        for mask, ratio, seed, n in cells
    )


HAND = [
    row("a", "none", 0.0, (9, 10), (6, 10)),
    row("b", "none", 0.0, (2, 5), (4, 5)),
    row("a", "concept", 0.1, (3, 10), (5, 10)),
    row("b", "concept", 0.1, (4, 5), (3, 5)),
    row("a", "concept", 0.2, (1, 10), (4, 10)),
    row("b", "concept", 0.2, (1, 5), (1, 5)),
]


def test_the_statistics_of_a_table_worked_by_hand():
    """Pooled: C(0) 11/15, G(0) 10/15, C(.1) 7/15, G(.1) 8/15, C(.2) 2/15, G(.2) 5/15."""
    summary = summarize(pd.DataFrame(HAND)).set_index(["mask", "ratio"])
    g0 = 10 / 15
    names = ["concept_accuracy", "general_accuracy", "pss_pooled", "pss_per_concept", "did"]
    names += ["general_change", "concepts"]
    expected = {
        ("none", 0.0): (11 / 15, 10 / 15, (1 / 15) / g0, (0.3 + 0.4) / 2 / g0, 0, 0, 2),
        ("concept", 0.1): (7 / 15, 8 / 15, 0.1, (0.2 + 0.2) / 2 / g0, 2 / 15 / g0, -2 / 15, 2),
        ("concept", 0.2): (2 / 15, 5 / 15, 0.3, (0.3 + 0.0) / 2 / g0, 4 / 15 / g0, -5 / 15, 2),
    }
    assert set(summary.index) == set(expected)
    for cell, values in expected.items():
        assert summary.loc[cell, names].tolist() == pytest.approx(values), cell


def test_peaks_of_the_table_worked_by_hand():
    """Pooled, PSS peaks at 0.2; per concept, at 0.1. Without 0.2, only the pooled peak falls."""
    for rows, pooled, ratio in ((HAND, 0.3, 0.2), (HAND[:4], 0.1, 0.1)):
        (peak,) = peak_pss(pd.DataFrame(rows)).to_dict("records")
        assert peak["peak_pooled"] == pytest.approx(pooled)
        assert peak["peak_per_concept"] == pytest.approx(0.3)
        assert peak["ratio"] == ratio


def test_models_and_protocols_are_kept_apart():
    both = [("x", "paper"), ("x", "holdout"), ("y", "paper")]
    tables = [pd.DataFrame(HAND).assign(model=model, protocol=protocol) for model, protocol in both]
    tables[2]["concept_accuracy"] = 0.0
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


def test_a_table_with_a_hole_is_refused():
    with pytest.raises(InputError, match=r"mask 'concept', ratio 0\.2, seed 0: no row for 'b'"):
        summarize(pd.DataFrame(HAND[:-1]))
    with pytest.raises(InputError, match=r"mask 'none': no row"):
        summarize(pd.DataFrame(HAND[2:]))
    with pytest.raises(ValueError, match="duplicate entries"):  # a study measured twice
        summarize(pd.DataFrame([*HAND, HAND[0]]))


def test_what_is_undefined_is_no_number():
    """The interval of a single concept; PSS and its floor of a model that knows nothing."""
    summary = summarize(pd.DataFrame([one for one in HAND if one["concept"] == "a"]))
    assert summary["pss_pooled"].notna().all()
    assert summary[["pss_pooled_low", "did_high"]].isna().all(axis=None)
    summary = summarize(pd.DataFrame(HAND).assign(concept_accuracy=0.0, general_accuracy=0.0))
    assert summary[["pss_pooled", "floor_pooled"]].isna().all(axis=None)
    assert (summary["general_accuracy"] == 0).all()


def simulated(rng, concepts):
    """Concepts of very different difficulty: a concept's questions go together."""
    rows = []
    for name in map(str, range(concepts)):
        easy = rng.beta(1.2, 0.8)
        hit = easy * (1 - 0.2 * rng.uniform(0, 2))
        general = rng.beta(30, 20)
        for mask, ratio, p, q in (("none", 0.0, easy, 0.6), ("concept", 0.1, hit, general)):
            own, others = rng.binomial(10, p), rng.binomial(10, q)
            rows.append(row(name, mask, ratio, (own, 10), (others, 10)))
    return pd.DataFrame(rows)


def test_intervals_equal_a_bootstrap_written_by_hand():
    table = simulated(np.random.default_rng(4), 30)
    summary = summarize(table, resamples=9000).set_index("mask").loc["concept"]
    columns = ["concept_accuracy", "general_accuracy"]
    none, masked = (table.loc[table["mask"] == m, columns].to_numpy() for m in ("none", "concept"))
    sample = np.random.default_rng(99).choice(30, (9000, 30))
    (c0, g0), (c, g) = none[sample].mean(1).T, masked[sample].mean(1).T
    draws = {
        "concept_accuracy": c,
        "general_accuracy": g,
        "pss_pooled": abs(g - c) / g0,
        "pss_per_concept": abs(masked[sample, 1] - masked[sample, 0]).mean(1) / g0,
        "did": (g - c - g0 + c0) / g0,
        "general_change": g - g0,
    }
    for name, values in draws.items():
        # The Monte Carlo error of a 2.5 % quantile of 9,000 normal draws is 0.028 of their
        # standard deviation; two independent bootstraps differ by that times root 2.
        tolerance = 5 * 0.028 * 2**0.5 * np.std(values)
        for end, percent in (("low", 2.5), ("high", 97.5)):
            expected = np.percentile(values, percent)
            assert summary[f"{name}_{end}"] == pytest.approx(expected, abs=tolerance), name


@pytest.mark.slow
def test_intervals_cover_the_truth_about_95_times_in_100(monkeypatch):
    """Truth from the definition of the simulation; questions of a concept are not independent."""
    # Floors take most of the time of a summary, and are tested by themselves.
    monkeypatch.setattr("paramspec.stats.summary._floors", lambda *_: {})
    before, after = 0.6, 0.6 * 0.8  # of a concept's own questions; G is 0.6
    truth = {"concept_accuracy": after, "general_accuracy": 0.6, "general_change": 0.0}
    truth |= {"pss_pooled": (0.6 - after) / 0.6, "did": (before - after) / 0.6}
    rng, covered, studies = np.random.default_rng(7), Counter(), 250
    for _ in range(studies):
        summary = summarize(simulated(rng, 60), resamples=400).set_index("mask").loc["concept"]
        for name, value in truth.items():
            covered[name] += summary[f"{name}_low"] <= value <= summary[f"{name}_high"]
    for name in truth:
        # 3 standard errors of 250 studies are 0.041; a percentile interval of 60 concepts
        # covers a little less than 0.95. Bootstrapping questions instead would cover 0.75.
        assert 0.90 <= covered[name] / studies <= 0.99, (name, covered[name] / studies)


def test_intervals_come_from_the_seed():
    table = simulated(np.random.default_rng(4), 20)
    pd.testing.assert_frame_equal(summarize(table), summarize(table))
    assert not summarize(table).equals(summarize(table, seed=1))


def exact_floor(n_concept, n_general, accuracy):
    """Mean |G - C| of two binomials, by enumeration."""
    own, general = np.arange(n_concept + 1), np.arange(n_general + 1)
    weights = np.outer(binom.pmf(general, n_general, accuracy), binom.pmf(own, n_concept, accuracy))
    return float((weights * abs(general[:, None] / n_general - own / n_concept)).sum())


def test_floors_equal_exact_enumeration_and_are_in_units_of_pss():
    """Divided by G(0), as PSS is; the probability is the accuracy under the mask, 0.4."""
    sizes = [(5, 5), (10, 10), (5, 15)] * 14
    rows = [row(str(n), "none", 0.0, (1, 5), (4, 5)) for n in range(len(sizes))]
    for n, (own, general) in enumerate(sizes):
        rows.append(row(str(n), "concept", 0.1, (own * 0.2, own), (general * 0.54, general)))
    found = summarize(pd.DataFrame(rows), resamples=50).set_index("mask").loc["concept"]
    own, general = np.array(sizes).sum(axis=0)
    accuracy = (own * 0.2 + general * 0.54) / (own + general)
    each = np.mean([exact_floor(*pair, accuracy) for pair in sizes])
    pooled = exact_floor(own, general, accuracy)
    assert found["floor_per_concept"] == pytest.approx(each / 0.8, rel=0.01)
    assert found["floor_pooled"] == pytest.approx(pooled / 0.8, rel=0.05)


def test_a_bound_that_is_missing_supports_no_claim():
    for lows in ((), (np.nan,), (0.3, np.nan), (np.nan, 0.3), (-0.3, np.nan)):
        assert verdict(*lows) == verdict(*map(np.float64, lows)) == "not run here"
    for lows in ((0.3,), (0.3, 0.1)):
        assert verdict(*lows) == verdict(*map(np.float64, lows)) == "reproduced"
    for lows in ((0.3, 0.0), (-0.3, 0.1)):
        assert verdict(*lows) == "not reproduced"
    assert verdict(0.3, measured=False) == "not run here"


def unmoved(seed, ratios, concepts=60):
    """PSS rows of a model whose masks change nothing: whatever changes is chance."""
    draw = np.random.default_rng(seed)
    rows = []
    for ratio in (0.0, *ratios):
        general, own = draw.binomial(5, 0.6, (concepts, 2)).T
        table = pd.DataFrame({"concept": range(concepts), "mask": "concept" if ratio else "none"})
        table = table.assign(ratio=ratio, seed=0, n_concept=5, n_general=5)
        rows.append(table.assign(concept_accuracy=own / 5, general_accuracy=general / 5))
    return pd.concat(rows)


@pytest.mark.slow
def test_the_best_of_several_ratios_is_tested_as_the_best():
    """Of studies without any effect, 2.5 % find one; with each ratio's own interval, many do."""
    ratios = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
    found, naive = 0, 0
    for seed in range(300):
        pss = unmoved(seed, ratios, concepts=40)
        best = best_general_change(pss, ratios, resamples=200)
        counts = pss.pivot(index="concept", columns="ratio", values="general_accuracy")
        changes = counts[list(ratios)].sub(counts[0.0], axis=0)
        assert best["value"] == pytest.approx(changes.mean().max())
        assert changes.mean()[best["ratio"]] == pytest.approx(changes.mean().max())  # two may tie
        assert best["low"] <= best["value"] <= best["high"]
        own = changes[best["ratio"]]
        naive += own.mean() - 1.96 * own.sem() > 0
        found += best["low"] > 0
    # 7.5 are expected; 16 or more have a chance of 0.005.
    assert found <= 15
    assert naive > 20


def test_a_single_ratio_needs_no_correction():
    pss = unmoved(1, (0.1,), concepts=400)
    best = best_general_change(pss, (0.1,), resamples=4000)
    wide = pss.pivot(index="concept", columns="ratio", values="general_accuracy")
    change = wide[0.1] - wide[0.0]
    for bound, side in (("low", -1.96), ("high", 1.96)):
        assert best[bound] == pytest.approx(change.mean() + side * change.sem(), abs=0.004)
    alone = best_general_change(unmoved(1, (0.1,), concepts=1), (0.1,))
    assert np.isnan([alone["low"], alone["high"]]).all()
