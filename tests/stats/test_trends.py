"""Trends over models, held against scipy, against `summarize` and values worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from paramspec.errors import InputError
from paramspec.stats.bootstrap import Draws, percentiles, with_interval
from paramspec.stats.summary import peak_pss, summarize
from paramspec.stats.trends import (
    balance_tiers,
    contrast,
    correlations,
    half_way,
    like_sized_ends,
    model_table,
    resample_models,
)

OWN, GENERAL, RATIOS = 5, 4, (0.1, 0.4)


def answers(model, knows, effect, concepts=40, seed=0):
    """PSS rows of a model that knows a share of all questions, and loses some under its masks."""
    rng, rows = np.random.default_rng(seed), []
    masked = [(mask, ratio) for mask in ("concept", "random") for ratio in RATIOS]
    for number in range(concepts):
        for mask, ratio in [("none", 0.0), *masked]:
            known = max(knows - effect * ratio, 0) if mask == "concept" else knows
            row = {"concept": f"concept {number}", "domain": ("city", "country")[number % 2]}
            row |= {"tier": ("high", "medium", "low")[number % 3], "mask": mask, "ratio": ratio}
            row["concept_accuracy"] = rng.binomial(OWN, known) / OWN
            row["general_accuracy"] = rng.binomial(GENERAL, knows) / GENERAL
            rows.append(row)
    kept = {"model": model, "protocol": "paper", "seed": 0, "n_concept": OWN, "n_general": GENERAL}
    return pd.DataFrame(rows).assign(**kept)


def constant(names, **measures):
    """Draws whose resamples are all as measured."""
    values = {measure: np.tile(each, (3, 1)) for measure, each in measures.items()}
    return Draws(tuple(names), values)


@pytest.fixture(scope="module")
def pss():
    """Eight models of two families; what is lost grows with what is known."""
    return pd.concat(
        [
            answers(f"{family}-{place}", 0.3 + 0.08 * place, 0.2 * place, seed=10 * place + shift)
            for shift, family in enumerate(("llama", "gemma"))
            for place in range(1, 5)
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def draws(pss):
    return resample_models(pss, resamples=400)


def test_the_measured_values_are_those_of_summarize_and_peak_pss(pss, draws):
    table = model_table(draws).set_index("model")
    summary = summarize(pss, resamples=10).set_index(["model", "mask", "ratio"]).sort_index()
    peaks = peak_pss(pss, resamples=10).set_index(["model", "mask"])
    for model in draws.models:
        base, dids = summary.loc[(model, "none", 0.0)], summary.loc[(model, "concept")]["did"]
        own, null = peaks.loc[(model, "concept")], peaks.loc[(model, "random")]
        expected = {
            "accuracy": base["concept_accuracy"],
            "peak_pss": own["peak_pooled"],
            "peak_null": null["peak_pooled"],
            "peak_excess": own["peak_pooled"] - null["peak_pooled"],
            "peak_per_concept": own["peak_per_concept"],
            "peak_did": dids.max(),
            "ceiling": max(base["general_accuracy"] - 0.25, 0) / base["general_accuracy"],
        }
        assert table.loc[model, list(expected)].to_dict() == pytest.approx(expected)


def test_models_share_their_resampled_concepts(pss, draws):
    """A model and its copy never differ, in no resample and whatever the order of its rows."""
    one = pss[pss["model"] == "llama-3"]
    copy = one.assign(model="copy").sample(frac=1, random_state=1)
    both = resample_models(pd.concat([one, copy]), resamples=50)
    for measure in ("accuracy", "peak_pss", "peak_did"):
        assert contrast(both, "copy", "llama-3", measure) == {"value": 0, "low": 0, "high": 0}
    assert contrast(draws, "llama-4", "llama-1", "accuracy")["low"] > 0
    same = contrast(draws, "llama-4", "gemma-4", "accuracy")
    assert same["low"] < 0 < same["high"]


def test_correlations_are_scipys(draws):
    found = correlations(draws, y="peak_pss").set_index("statistic")
    x, y = draws.of("accuracy"), draws.of("peak_pss")
    for name, function in (("Pearson", stats.pearsonr), ("Spearman", stats.spearmanr)):
        every = [function(x[row], y[row]).statistic for row in range(len(x))]
        assert found.loc[name, "r"] == pytest.approx(every[0])
        low, high = np.percentile(every[1:], [2.5, 97.5])
        assert (found.loc[name, "low"], found.loc[name, "high"]) == pytest.approx((low, high))
        assert found.loc[name, "n"] == 8
    tokens = [10, 100, 1000, 10000] * 2  # what is no measure of the study
    rho = correlations(draws, x=tokens).set_index("statistic").loc["Spearman", "r"]
    assert rho == pytest.approx(stats.spearmanr(tokens, y[0]).statistic)


def test_a_partial_correlation_is_that_of_residuals(draws):
    found = correlations(draws, y="peak_pss", given="peak_null").set_index("statistic")
    x, y, z = (draws.of(name)[0] for name in ("accuracy", "peak_pss", "peak_null"))

    def without(values):
        return values - np.polyval(np.polyfit(z, values, 1), z)

    expected = stats.pearsonr(without(x), without(y)).statistic
    assert found.loc["Pearson", "r"] == pytest.approx(expected)
    assert abs(found.loc["Pearson", "r"] - correlations(draws).iloc[0]["r"]) > 1e-3


def test_the_interval_over_families_is_wide_when_one_family_makes_the_trend():
    """Three families without a trend and one that has it all."""
    values, flat = [0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.2, 0.1]
    names = [f"{family}{n}" for family in "abcd" for n in range(4)]
    draws = constant(names, accuracy=values * 4, peak_pss=values + flat * 3)
    row = correlations(draws, families={name: name[0] for name in names}).iloc[0]
    without = correlations(draws, models=[name for name in names if name[0] != "a"]).iloc[0]
    alone = correlations(draws, models=[name for name in names if name[0] == "a"]).iloc[0]
    assert (without["r"], alone["r"]) == (pytest.approx(-0.447, abs=0.01), pytest.approx(1))
    # (3/4)^4 of the draws, 32 %, lack the family; 0.4 % hold nothing else.
    assert row["family_low"] == pytest.approx(without["r"])
    assert without["r"] < row["r"] < row["family_high"] < 1


def test_a_coefficient_of_nothing_is_not_a_number():
    rising, other = np.arange(5.0), np.array([0.0, 3.0, 1.0, 2.0, 5.0])
    draws = constant("abcde", x=rising, y=other, same=2 * rising, flat=np.ones(5))
    for options in ({"y": "flat"}, {"y": "y", "given": "same"}, {"y": "same", "given": "y"}):
        for r in correlations(draws, x="x", **options)["r"]:
            assert np.isnan(r) or abs(r) <= 1 + 1e-9
    assert correlations(draws, x="x", y="flat")["r"].isna().all()


def test_half_way_is_where_a_curve_passes_its_middle():
    steps = [10, 100, 1000, 10000]
    curves = {
        (0.0, 0.0, 1.0, 1.0): 10**2.5,  # half between 100 and 1000, in logarithms
        (0.0, 1.0, 1.0, 1.0): 10**1.5,
        (0.0, 0.2, 0.1, 0.8): 10 ** (3 + 0.2 / 0.6),  # a dip on the way
        (0.5, 0.4, 0.3, 0.2): np.inf,  # never rises
        (0.0, 0.0, np.nan, 1.0): np.nan,
    }
    draws = Draws(tuple("abcd"), {"accuracy": np.array(list(curves))})
    found = half_way(draws, "abcd", steps, "accuracy")
    assert found == pytest.approx(list(curves.values()), nan_ok=True)


def bounds_by_hand(values):
    """Each resample without a value put where it does most harm; of finite values, numpy's."""
    low = np.percentile(np.where(np.isnan(values), -1e300, values), 2.5)
    high = np.percentile(np.where(np.isnan(values), 1e300, values), 97.5)
    return (low if low > -1e290 else np.nan), (high if high < 1e290 else np.nan)


@pytest.mark.parametrize("missing", [0, 1, 5, 20, 30, 500, 1000])
def test_a_resample_without_a_value_is_not_left_out(missing):
    values = np.random.default_rng(missing).normal(size=1000)
    values[:missing] = np.nan
    low, high = percentiles(values)
    assert (low, high) == pytest.approx(bounds_by_hand(values), nan_ok=True)
    assert np.isnan(low) == np.isnan(high) == (missing > 25)
    known = values[missing:]
    if 0 < missing < 26:  # they may make it wider, never narrower
        assert low <= np.percentile(known, 2.5)
        assert high >= np.percentile(known, 97.5)


def test_an_infinite_resample_is_a_value():
    later = np.where(np.arange(1000) < 500, np.inf, np.arange(1000.0))
    assert percentiles(later) == (pytest.approx(np.percentile(np.arange(500, 1500), 2.5)), np.inf)
    assert percentiles(np.full(100, np.inf)) == (np.inf, np.inf)
    assert percentiles(np.array([np.inf] * 5 + [1.0] * 995)) == (1, 1)
    low, high = percentiles(np.stack([later, np.ones(1000), np.full(1000, np.nan)], axis=1))
    assert low[1] == high[1] == 1
    assert high[0] == np.inf
    assert np.isnan([low[2], high[2]]).all()


def ends_of(*rows):
    columns = ["model", "family", "order", "parameters", "micro"]
    about = pd.DataFrame([(*row, False)[:5] for row in rows], columns=columns)
    return like_sized_ends(about)


def test_generations_are_compared_between_models_of_like_size():
    rows = [
        ("a-old", "a", 1, 100),
        ("a-middle", "a", 2, 120),
        ("a-new", "a", 3, 126),  # too large for the oldest, not for the one between
        ("a-large", "a", 4, 1000),
        ("b-old", "b", 1, 100),
        ("b-new", "b", 2, 200),
        ("c-1", "c", 1, 100),
        ("c-2", "c", 2, 104),
        ("c-3", "c", 3, 110),
        ("c-3-alike", "c", 3, 101),
        ("c-undated", "c", None, 100),
        ("d", "d", 1, 7),
        ("stranger", None, 1, 100),
    ]
    expected = {"a": ("a-middle", "a-new", 1.05), "c": ("c-1", "c-3-alike", 1.01)}
    for order in (rows, rows[::-1], rows[5:] + rows[:5]):
        ends = ends_of(*order).set_index("family")
        assert set(ends.index) == set("abcd")
        assert ends.loc[["b", "d"], ["oldest", "newest", "times"]].isna().all(axis=None)
        for family, (old, new, times) in expected.items():
            found = ends.loc[family, ["oldest", "newest", "times"]].tolist()
            assert found == [old, new, pytest.approx(times)]
    assert ends_of().empty
    # A micro model is no generation of a real family.
    mixed = ends_of(("old", "a", 1, 100, False), ("micro", "a", 2, 100, True))
    assert mixed["newest"].isna().tolist() == [True, True]


def test_balanced_tiers_hold_as_many_concepts_of_each_in_every_domain(pss):
    lopsided = pss[~((pss["domain"] == "city") & (pss["tier"] == "low"))]
    concepts = balance_tiers(pss).drop_duplicates("concept")
    counts = concepts.groupby(["domain", "tier"]).size().unstack()
    assert (counts.nunique(axis=1) == 1).all()
    assert len(concepts) > 30
    kept = balance_tiers(lopsided)
    assert set(kept["domain"]) == {"country"}
    assert set(kept["model"]) == set(pss["model"])
    with pytest.raises(InputError, match="no domain has one of each tier"):
        balance_tiers(pss[pss["tier"] != "high"])


def test_what_cannot_be_compared_is_refused(pss, draws):
    both = pd.concat([pss, pss.assign(protocol="holdout")])
    hole = (pss["model"] == "gemma-1") & (pss["concept"] == "concept 3")
    for compare, message in (
        (lambda: resample_models(both, resamples=2), "protocols .*give the rows of one"),
        (lambda: resample_models(pss[~hole], resamples=2), "'gemma-1': measured on other concepts"),
        (lambda: correlations(draws, models=["llama-1", "llama-2"]), "2 models: "),
    ):
        with pytest.raises(InputError, match=message):
            compare()


def test_a_study_without_random_masks_has_no_null(pss):
    bare = resample_models(pss[pss["mask"] != "random"], resamples=5)
    assert not {"peak_null", "peak_excess"} & bare.values.keys()
    assert "peak_did" in model_table(bare)


def test_a_value_is_told_with_its_interval_and_never_broken():
    row = {"value": 0.1, "did": 3.0, "did_low": -2.0, "did_high": 1234.5}
    assert with_interval(row, "did", "+,.1f") == "+3.0\u00a0[-2.0,\u00a0+1,234.5]"
