"""Trends over models, held against scipy, against `summarize` and values worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from paramspec.errors import InputError
from paramspec.stats.bootstrap import Draws, interval, percentiles, with_interval
from paramspec.stats.summary import peak_pss, summarize
from paramspec.stats.trends import (
    balance_tiers,
    contrast,
    correlations,
    half_way,
    like_sized_ends,
    mean_over,
    model_table,
    resample_models,
)

OWN, GENERAL, RATIOS = 5, 4, (0.1, 0.4)


def answers(model, knows, effect, concepts=40, seed=0, tiers=("high", "medium", "low")):
    """PSS rows of a model that knows a share of all questions, and loses some under its masks."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(concepts):
        for mask, ratio, lost in [
            ("none", 0.0, 0.0),
            *(("concept", ratio, effect * ratio) for ratio in RATIOS),
            *(("random", ratio, 0.0) for ratio in RATIOS),
        ]:
            rows.append(
                {
                    "model": model,
                    "concept": f"concept {number}",
                    "domain": "country" if number % 2 else "city",
                    "tier": tiers[number % len(tiers)],
                    "ratio": ratio,
                    "mask": mask,
                    "seed": 0,
                    "protocol": "paper",
                    "concept_accuracy": rng.binomial(OWN, max(knows - lost, 0)) / OWN,
                    "general_accuracy": rng.binomial(GENERAL, knows) / GENERAL,
                    "n_concept": OWN,
                    "n_general": GENERAL,
                }
            )
    return pd.DataFrame(rows)


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


FAMILIES = {f"{family}-{n}": family for family in ("llama", "gemma") for n in range(1, 5)}


def test_the_measured_values_are_those_of_summarize_and_peak_pss(pss, draws):
    table = model_table(draws).set_index("model")
    summary = summarize(pss, resamples=10).set_index(["model", "mask", "ratio"])
    peaks = peak_pss(pss, resamples=10).set_index(["model", "mask"])
    for model in draws.models:
        row = table.loc[model]
        base = summary.loc[(model, "none", 0.0)]
        assert row["accuracy"] == pytest.approx(base["concept_accuracy"])
        assert row["peak_pss"] == pytest.approx(peaks.loc[(model, "concept"), "peak_pooled"])
        assert row["peak_null"] == pytest.approx(peaks.loc[(model, "random"), "peak_pooled"])
        assert row["peak_excess"] == pytest.approx(row["peak_pss"] - row["peak_null"])
        each = peaks.loc[(model, "concept"), "peak_per_concept"]
        assert row["peak_per_concept"] == pytest.approx(each)
        dids = [summary.loc[(model, "concept", ratio), "did"] for ratio in RATIOS]
        assert row["peak_did"] == pytest.approx(max(dids))
        known = base["general_accuracy"]
        assert row["ceiling"] == pytest.approx(max(known - 0.25, 0) / known)


def test_intervals_are_those_of_scipys_bootstrap_up_to_its_draws(pss):
    one = pss[pss["model"] == "llama-3"]
    table = model_table(resample_models(one, resamples=4000)).iloc[0]
    own = one.loc[one["mask"] == "none", "concept_accuracy"].to_numpy()
    bounds = stats.bootstrap(
        (own,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert table["accuracy_low"] == pytest.approx(bounds.low, abs=0.006)
    assert table["accuracy_high"] == pytest.approx(bounds.high, abs=0.006)


def test_models_share_their_resampled_concepts(pss):
    """A model and its copy never differ, in no resample and whatever the order of its rows."""
    one = pss[pss["model"] == "llama-3"]
    copy = one.assign(model="copy").sample(frac=1, random_state=1)
    both = resample_models(pd.concat([one, copy]), resamples=50)
    for measure in ("accuracy", "peak_pss", "peak_did"):
        assert contrast(both, "copy", "llama-3", measure) == {"value": 0, "low": 0, "high": 0}


def test_a_contrast_tells_a_difference_from_none(draws):
    assert contrast(draws, "llama-4", "llama-1", "accuracy")["low"] > 0
    assert contrast(draws, "llama-1", "llama-4", "accuracy")["high"] < 0
    same = contrast(draws, "llama-4", "gemma-4", "accuracy")
    assert same["low"] < 0 < same["high"]


def test_draws_come_from_the_seed(pss):
    one, same, other = (resample_models(pss, resamples=20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.of("peak_pss"), same.of("peak_pss"))
    assert not np.array_equal(one.of("peak_pss")[1:], other.of("peak_pss")[1:])


def test_correlations_are_scipys(draws):
    found = correlations(draws, y="peak_pss", families=FAMILIES).set_index("statistic")
    x, y = draws.of("accuracy"), draws.of("peak_pss")
    for name, function in (("Pearson", stats.pearsonr), ("Spearman", stats.spearmanr)):
        every = [function(x[row], y[row]).statistic for row in range(len(x))]
        assert found.loc[name, "r"] == pytest.approx(every[0])
        low, high = np.percentile(every[1:], [2.5, 97.5])
        assert (found.loc[name, "low"], found.loc[name, "high"]) == pytest.approx((low, high))
        assert found.loc[name, "n"] == 8


def test_a_partial_correlation_is_that_of_residuals(draws):
    found = correlations(draws, y="peak_pss", given="peak_null").set_index("statistic")
    x, y, z = (draws.of(name)[0] for name in ("accuracy", "peak_pss", "peak_null"))

    def without(values):
        return values - np.polyval(np.polyfit(z, values, 1), z)

    expected = stats.pearsonr(without(x), without(y)).statistic
    assert found.loc["Pearson", "r"] == pytest.approx(expected)
    assert abs(found.loc["Pearson", "r"] - correlations(draws).iloc[0]["r"]) > 1e-3


def test_what_is_held_constant_cannot_be_the_reason():
    """Accuracy and PSS that only share a cause correlate; given the cause, they do not."""
    rng = np.random.default_rng(0)
    cause = rng.normal(size=400)
    values = {
        "accuracy": (cause + 0.3 * rng.normal(size=400))[None],
        "peak_pss": (cause + 0.3 * rng.normal(size=400))[None],
        "ceiling": cause[None],
    }
    draws = Draws(tuple(map(str, range(400))), {k: np.repeat(v, 2, 0) for k, v in values.items()})
    assert correlations(draws).iloc[0]["r"] > 0.8
    assert abs(correlations(draws, given="ceiling").iloc[0]["r"]) < 0.15


def test_the_interval_over_families_is_wide_when_one_family_makes_the_trend():
    """Three families without a trend and one that has it all."""
    values = np.array([0.1, 0.2, 0.3, 0.4])
    flat = np.array([0.2, 0.1, 0.2, 0.1])
    x = np.tile(values, 4)[None]
    y = np.concatenate([values, flat, flat, flat])[None]
    names = tuple(f"{family}{n}" for family in "abcd" for n in range(4))
    draws = Draws(names, {"accuracy": np.repeat(x, 2, 0), "peak_pss": np.repeat(y, 2, 0)})
    row = correlations(draws, families={name: name[0] for name in names}).iloc[0]
    without = correlations(draws, models=[name for name in names if name[0] != "a"]).iloc[0]
    alone = correlations(draws, models=[name for name in names if name[0] == "a"]).iloc[0]
    assert (without["r"], alone["r"]) == (pytest.approx(-0.447, abs=0.01), pytest.approx(1))
    # (3/4)^4 of the draws, 32 %, lack the family; 0.4 % hold nothing else.
    assert row["family_low"] == pytest.approx(without["r"])
    assert without["r"] < row["r"] < row["family_high"] < 1


def test_a_correlation_with_something_told_beside(draws):
    tokens = [10, 100, 1000, 10000] * 2
    rho = correlations(draws, x=tokens).set_index("statistic").loc["Spearman", "r"]
    assert rho == pytest.approx(stats.spearmanr(tokens, draws.of("peak_pss")[0]).statistic)


def test_a_coefficient_of_nothing_is_not_a_number():
    rising, other = np.arange(5.0), np.array([0.0, 3.0, 1.0, 2.0, 5.0])
    values = {"x": rising, "y": other, "same": 2 * rising, "flat": np.ones(5)}
    draws = Draws(tuple("abcde"), {name: np.tile(row, (3, 1)) for name, row in values.items()})
    for options in ({"y": "flat"}, {"y": "y", "given": "same"}, {"y": "same", "given": "y"}):
        for r in correlations(draws, x="x", **options)["r"]:
            assert np.isnan(r) or abs(r) <= 1 + 1e-9
    assert correlations(draws, x="x", y="flat")["r"].isna().all()


def test_half_way_is_where_a_curve_passes_its_middle():
    steps = [10, 100, 1000, 10000]
    curves = np.array(
        [
            [0.0, 0.0, 1.0, 1.0],  # half between 100 and 1000, in logarithms
            [0.0, 1.0, 1.0, 1.0],
            [0.0, 0.2, 0.1, 0.8],  # a dip on the way
            [0.5, 0.4, 0.3, 0.2],  # never rises
        ]
    )
    draws = Draws(("a", "b", "c", "d"), {"accuracy": curves})
    found = half_way(draws, ["a", "b", "c", "d"], steps, "accuracy")
    assert found[0] == pytest.approx(10**2.5)
    assert found[1] == pytest.approx(10**1.5)
    assert found[2] == pytest.approx(10 ** (3 + 0.2 / 0.6))
    assert found[3] == np.inf
    curves[0, 2] = np.nan
    unknown = half_way(draws, ["a", "b", "c", "d"], steps, "accuracy")
    assert np.isnan(unknown[0])
    assert list(unknown[1:]) == list(found[1:])


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
    table = percentiles(np.stack([later, np.ones(1000), np.full(1000, np.nan)], axis=1))
    assert np.isinf(table[1][0])
    assert table[0][1] == table[1][1] == 1
    assert np.isnan(table[0][2])
    assert np.isnan(table[1][2])


def test_where_half_of_the_resamples_never_rise_the_interval_has_no_end():
    rng = np.random.default_rng(0)
    rising = np.sort(rng.uniform(size=(1001, 4)), axis=1)
    rising[1::2] = rising[1::2, ::-1]
    draws = Draws(("a", "b", "c", "d"), {"peak_excess": rising})
    found = interval(half_way(draws, draws.models, [1, 10, 100, 1000], "peak_excess"))
    assert found["low"] < found["value"] < 1000
    assert found["high"] == np.inf


def about_of(*rows):
    columns = ["model", "family", "order", "parameters", "micro"]
    return pd.DataFrame([(*row, False)[:5] for row in rows], columns=columns)


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
    expected = {
        "a": ("a-middle", "a-new", 1.05),
        "b": (None, None, np.nan),
        "c": ("c-1", "c-3-alike", 1.01),
        "d": (None, None, np.nan),
    }
    for order in (rows, rows[::-1], rows[5:] + rows[:5]):
        ends = like_sized_ends(about_of(*order)).set_index("family")
        assert set(ends.index) == set(expected)
        for family, (old, new, times) in expected.items():
            row = ends.loc[family]
            assert (row["oldest"] == old and row["newest"] == new) or (
                old is new is None and pd.isna(row["oldest"]) and pd.isna(row["newest"])
            )
            assert row["times"] == pytest.approx(times, nan_ok=True)
    wider = like_sized_ends(about_of(*rows), factor=2).set_index("family")
    assert list(wider["oldest"].dropna()) == ["a-old", "b-old", "c-1"]
    assert like_sized_ends(about_of()).empty


def test_a_micro_model_is_no_generation_of_a_real_family():
    mixed = about_of(("old", "a", 1, 100, False), ("micro", "a", 2, 100, True))
    assert like_sized_ends(mixed)["newest"].isna().tolist() == [True, True]


def test_interval_and_mean_over(draws):
    values = np.concatenate([[7.0], np.arange(1001)])
    assert interval(values) == {"value": 7, "low": 25, "high": 975}
    mean = mean_over(draws, ["llama-1", "gemma-4"], "accuracy")
    assert mean == pytest.approx(
        (draws.of("accuracy")[:, 0] + draws.of("accuracy")[:, draws.index("gemma-4")]) / 2
    )


def test_balanced_tiers_hold_as_many_concepts_of_each_in_every_domain(pss):
    lopsided = pss[~((pss["domain"] == "city") & (pss["tier"] == "low"))]
    counts = (
        balance_tiers(pss).drop_duplicates("concept").groupby(["domain", "tier"]).size().unstack()
    )
    assert (counts.nunique(axis=1) == 1).all()
    assert counts.sum().sum() > 30
    kept = balance_tiers(lopsided)
    assert set(kept["domain"]) == {"country"}
    assert set(kept["model"]) == set(pss["model"])
    with pytest.raises(InputError, match="no domain has one of each tier"):
        balance_tiers(pss[pss["tier"] != "high"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: pd.concat([p, p.assign(protocol="holdout")]),
            "protocols .*give the rows of one",
        ),
        (
            lambda p: p[~((p["model"] == "gemma-1") & (p["concept"] == "concept 3"))],
            "'gemma-1': measured on other concepts than 'llama-1'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(pss, change, message):
    with pytest.raises(InputError, match=message):
        resample_models(change(pss), resamples=2)


def test_unknown_names_are_refused(draws):
    with pytest.raises(InputError, match="model 'gpt': not in this study"):
        contrast(draws, "gpt", "llama-1")
    with pytest.raises(InputError, match="measure 'pss': not in this study"):
        draws.of("pss")
    with pytest.raises(InputError, match="2 models: a correlation needs at least 3"):
        correlations(draws, models=["llama-1", "llama-2"])


def test_a_study_without_random_masks_has_no_null(pss):
    bare = resample_models(pss[pss["mask"] != "random"], resamples=5)
    assert "peak_null" not in bare.values
    assert "peak_excess" not in bare.values
    assert "peak_did" in model_table(bare)


def test_a_value_is_told_with_its_interval_and_never_broken():
    row = {"value": 0.125, "low": -1.0, "high": 1234.5, "did": 3.0, "did_low": 2.0, "did_high": 4.0}
    assert with_interval(row, form="+,.1f") == "+0.1\u00a0[-1.0,\u00a0+1,234.5]"
    assert with_interval(row, "did") == "3.00\u00a0[2.00,\u00a04.00]"
