"""Trends over models, held against scipy, brute force, and values worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from paramspec.errors import InputError
from paramspec.stats.estimates import Estimates
from paramspec.stats.summary import peak_pss, summarize
from paramspec.stats.trends import (
    Measures,
    balanced_tiers,
    contrast,
    delay,
    half_way,
    like_sized_ends,
    measure_models,
    model_table,
    trend,
)
from paramspec.stats.verdicts import verdict

OWN, GENERAL, RATIOS = 5, 4, (0.1, 0.4)


def answers(model, knows, effect, concepts=40, seed=0):
    """Answers of a model that knows a share of all questions, and loses some under its masks."""
    rng, rows = np.random.default_rng(seed), []
    masked = [(mask, ratio) for mask in ("concept", "random") for ratio in RATIOS]
    for number in range(concepts):
        for mask, ratio in [("none", 0.0), *masked]:
            known = max(knows - effect * ratio, 0) if mask == "concept" else knows
            asked = [("concept", number, known)] * OWN
            asked += [("general", (number + 1 + n) % concepts, knows) for n in range(GENERAL)]
            rows += [
                {"mask_concept": f"concept {number}", "concept": f"concept {about}"}
                | {"question_id": f"{about}/{place}", "role": role, "mask": mask, "ratio": ratio}
                | {"option_logprobs": [0.0] * 4, "correct_norm": float(rng.random() < p)}
                for place, (role, about, p) in enumerate(asked)
            ]
    return pd.DataFrame(rows).assign(model=model, protocol="paper", seed=0)


@pytest.fixture(scope="module")
def details():
    """Eight models of two families; what is lost grows with what is known."""
    return pd.concat(
        [
            answers(f"{family}-{place}", 0.15 + 0.2 * place, 0.2 * place, seed=10 * place + shift)
            for shift, family in enumerate(("llama", "gemma"))
            for place in range(1, 5)
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def measures(details):
    return measure_models(details)


def known(names, **each):
    """Measures without any noise."""
    linear = {
        name: Estimates(np.array(values, float), np.zeros((9, len(names))), 9)
        for name, values in each.items()
    }
    return Measures(tuple(names), linear, {}, (100,) * len(names), (0.25,) * len(names))


def test_measures_are_those_of_summarize_and_peak_pss(details, measures):
    table = model_table(measures).set_index("model")
    summary = summarize(details).set_index(["model", "mask", "ratio"]).sort_index()
    peaks = peak_pss(details).set_index(["model", "mask"])
    assert set(table.index) == set(measures.models)
    for model in measures.models:
        row, bare = table.loc[model], summary.loc[(model, "none", 0.0)]
        cells = {
            mask: summary.loc[(model, mask)].select_dtypes("number").mean()
            for mask in ("concept", "random")
        }
        expected = {
            "accuracy": bare["concept_accuracy"],
            "ceiling": 1 - 0.25 / bare["general_accuracy"],
            "did": cells["concept"]["did"],
            "null_did": cells["random"]["did"],
            "excess_did": cells["concept"]["did"] - cells["random"]["did"],
            "per_concept": cells["concept"]["pss_per_concept"],
        }
        c0, g0 = bare["concept_accuracy"], bare["general_accuracy"]
        masked = summary.loc[(model, "concept")]
        opened = masked["general_accuracy"] - masked["concept_accuracy"] - (g0 - c0)
        expected["did_undivided"] = opened.mean()
        expected["did_over_own"] = opened.mean() / c0
        expected["did_over_masked"] = (opened / masked["general_accuracy"]).mean()
        for prefix, mask in (("", "concept"), ("null_", "random")):
            found = peaks.loc[(model, mask)]
            for name, peak in (("pss", "pooled"), ("did", "did"), ("per_concept", "per_concept")):
                for end in ("", "_low", "_high"):
                    expected[f"{prefix}peak_{name}{end}"] = found[f"peak_{peak}{end}"]
        expected["accuracy_low"] = bare["concept_accuracy_low"]
        expected["did_high"] = peaks.loc[(model, "concept"), "did_high"]
        assert row[list(expected)].to_dict() == pytest.approx(expected)


def test_models_are_compared_on_the_same_concepts(details, measures):
    """A model and its copy differ by nothing, whatever the order of its rows."""
    one = details[details["model"] == "llama-3"]
    copy = one.sample(frac=1, random_state=0).assign(model="copy")
    both = measure_models(pd.concat([one, copy]))
    for measure in ("accuracy", "did", "per_concept"):
        pair = both.of(measure, ["copy", "llama-3"])
        assert np.allclose((pair[0] - pair[1]).moves, 0)
        assert contrast(both, "copy", "llama-3", measure)["value"] == pytest.approx(0)
    assert contrast(measures, "llama-4", "llama-1", "accuracy")["low"] > 0
    same = contrast(measures, "llama-3", "gemma-3", "accuracy")
    assert same["low"] < 0 < same["high"]
    of_two = contrast(measures, ["llama-4", "gemma-4"], ["llama-1", "gemma-1"], "accuracy")
    each = [contrast(measures, f"{f}-4", f"{f}-1", "accuracy")["value"] for f in ("llama", "gemma")]
    assert of_two["value"] == pytest.approx(np.mean(each))
    peak = contrast(measures, "llama-4", "llama-1", "peak_pss")
    assert peak["low"] <= peak["value"] <= peak["high"]


def test_measures_of_some_concepts_can_be_subtracted_from_those_of_others(details):
    """Together they are those of all: each half of the concepts has half of the questions."""
    names = sorted(set(details["mask_concept"]))
    halves = [measure_models(details, names[side::2]).of("accuracy") for side in (0, 1)]
    whole = measure_models(details).of("accuracy")
    assert np.allclose(((halves[0] + halves[1]) / 2).values, whole.values)
    assert (halves[0] - halves[1]).count == len(names) // 2


def test_without_noise_a_trend_is_scipys():
    draw = np.random.default_rng(0)
    x, z = draw.random((2, 12))
    y = 0.3 * x - 0.2 * z + 0.1 * draw.random(12)
    names = [f"m{place}" for place in range(12)]
    measures = known(names, accuracy=x, did=y, ceiling=z)
    found = trend(measures)
    fit = stats.linregress(x, y)
    assert (found["slope"], found["pearson"]) == pytest.approx((fit.slope, fit.rvalue))
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(found["slope_low"])  # an interval of no noise says nothing
    by_number = trend(measures, x=list(x), models=names[::-1])
    assert by_number["slope"] == pytest.approx(stats.linregress(x, y[::-1]).slope)
    design = np.stack([x, z, np.ones(12)], axis=1)
    partial = np.linalg.lstsq(design, y, rcond=None)[0][0]
    assert trend(measures, given="ceiling")["slope"] == pytest.approx(partial)
    home = {name: "ab"[place % 2] for place, name in enumerate(names)}
    centred = [v - np.array([v[p % 2 :: 2].mean() for p in range(12)]) for v in (x, y)]
    within = stats.linregress(*centred).slope
    assert trend(measures, within=home)["slope"] == pytest.approx(within)


def test_moments_over_models_are_products_of_different_concepts(measures):
    """Against a loop over all pairs of concepts, and the jackknife against one anew."""
    x, y = (measures.of(name) for name in ("accuracy", "ceiling"))
    size = len(x.moves)
    said = [one.values + size * one.moves for one in (x, y)]
    said = [one - one.mean(axis=1, keepdims=True) for one in said]

    def slope_and_r(concepts):
        pairs = list(itertools.permutations(concepts, 2))
        xx, yy, xy = (
            np.mean([a[i] @ b[j] for i, j in pairs])
            for a, b in ((said[0], said[0]), (said[1], said[1]), (said[0], said[1]))
        )
        return xy / xx, xy / np.sqrt(xx * yy)

    found = trend(measures, y="ceiling")
    whole = slope_and_r(range(size))
    assert (found["slope"], found["r"]) == pytest.approx((whole[0], min(whole[1], 1)))
    left = [slope_and_r([i for i in range(size) if i != gone])[0] for gone in range(size)]
    reach = stats.t.isf(0.025, size - 1) * np.sqrt((size - 1) * np.var(left))
    assert found["slope_high"] - found["slope"] == pytest.approx(reach)


def test_r_is_missing_where_models_differ_by_no_more_than_noise(measures):
    null = trend(measures, y="null_did")
    assert np.isnan([null["r"], null["r_low"], null["r_high"]]).all()
    assert null["slope_low"] < 0 < null["slope_high"]
    peak = trend(measures, y="peak_pss")
    assert np.isnan([peak["slope"], peak["r"]]).all()
    assert peak["pearson"] > 0
    flat = known("abc", accuracy=[0.5, 0.5, 0.5], did=[0, 1, 2])
    assert np.isnan([*trend(flat).values()][1:]).all()


def test_models_that_differ_by_rounding_alone_have_no_trend():
    found = trend(known("abcd", accuracy=[0.1 + 0.2, 0.3, 0.3, 0.3], did=[0.0, 0.1, 0.3, 0.2]))
    assert np.isnan([found[name] for name in ("slope", "slope_low", "r", "pearson")]).all()


def test_a_rise_that_comes_later_has_a_longer_delay():
    """A step at 4 and one at 16, in steps that double: their mean steps differ by two doublings."""
    steps = [1, 2, 4, 8, 16, 32]
    moves = np.random.default_rng(0).normal(0, 1e-4, (20, 6))
    moves -= moves.mean(axis=0)
    names = [f"@{step}" for step in steps]

    def of(*values):
        return Estimates(np.array(values, float), moves, 20)

    linear = {"accuracy": of(0, 0, 1, 1, 1, 1), "did": of(0, 0, 0, 0, 2, 2), "flat": of(*[0.5] * 6)}
    measures = Measures(tuple(names), linear, {}, (1,) * 6, (0.25,) * 6)
    early, late = (delay(measures.of(name), steps) for name in ("accuracy", "did"))
    assert (late - early).values == pytest.approx(np.log(4), abs=1e-3)
    one = (late - early).interval()
    assert one["low"] < one["value"] < one["high"]
    assert np.isnan(delay(measures.of("flat"), steps).values)
    # Straight between 2 and 4, and between 8 and 16.
    assert half_way([0, 0, 1, 1, 1, 1], steps) == pytest.approx(2 * np.sqrt(2))
    assert half_way([0, 0, 0, 0, 2, 1], steps) == pytest.approx(8 * np.sqrt(2))
    assert np.isnan(half_way([1, 1, 0.5], [1, 2, 4]))


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


def test_balanced_tiers_hold_as_many_concepts_of_each_in_every_domain():
    pss = pd.DataFrame(
        {
            "concept": f"c{n}",
            "domain": ("city", "country")[n % 2],
            "tier": ("high", "medium", "low")[n % 3],
        }
        for n in range(40)
    )
    lopsided = pss[~((pss["domain"] == "city") & (pss["tier"] == "low"))]
    about = pss.set_index("concept")
    kept = balanced_tiers(pd.concat([pss, pss]))
    counts = {
        tier: about.loc[names, "domain"].value_counts().to_dict() for tier, names in kept.items()
    }
    assert counts["high"] == counts["medium"] == counts["low"]
    assert sum(counts["low"].values()) > 10
    assert all((about.loc[names, "tier"] == tier).all() for tier, names in kept.items())
    kept = balanced_tiers(lopsided).values()
    assert set(about.loc[list(itertools.chain(*kept)), "domain"]) == {"country"}
    with pytest.raises(InputError, match="no domain has one of each tier"):
        balanced_tiers(pss[pss["tier"] != "high"])


def test_what_cannot_be_compared_is_refused(details, measures):
    both = pd.concat([details, details.assign(protocol="holdout")])
    hole = (details["model"] == "gemma-1") & (details["mask_concept"] == "concept 3")
    for compare, message in (
        (lambda: measure_models(both), "protocols .*give the rows of one"),
        (lambda: measure_models(details[~hole]), "'gemma-1': measured on other concepts"),
        (lambda: trend(measures, models=["llama-1", "llama-2"]), "2 models: "),
    ):
        with pytest.raises(InputError, match=message):
            compare()


def test_a_study_without_random_masks_has_no_null(details):
    bare = measure_models(details[details["mask"] != "random"])
    assert not [name for name in (*bare.linear, *bare.peaks) if "null" in name or "excess" in name]
    assert "peak_did" in model_table(bare)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_models_that_know_all_or_nothing_show_nothing(details, right):
    """No number that looks like one: neither of a gap, nor of a trend, nor of a difference."""
    measures = measure_models(details.assign(correct_norm=right))
    table = model_table(measures)
    assert (table["accuracy"] == right).all()
    assert (table["accuracy_low"] <= right).all()
    assert (table["accuracy_low"] < table["accuracy_high"]).all()
    assert table[["did_low", "peak_pss_high", "null_did_low"]].isna().all(axis=None)
    found = trend(measures)
    assert np.isnan([found[name] for name in ("slope", "slope_low", "r", "pearson")]).all()
    for measure in ("did", "accuracy", "peak_pss"):
        assert verdict(contrast(measures, "llama-4", "llama-1", measure)) == "cannot tell"


@pytest.mark.filterwarnings("error")
def test_the_smallest_studies_have_values_and_no_intervals(details):
    """One concept; one ratio of one model; answers below chance."""
    one = details[(details["mask_concept"] == "concept 3") & (details["model"] == "llama-4")]
    alone = measure_models(one.assign(concept="concept 3"))
    assert np.isfinite(alone.of("did").values).all()
    assert verdict(alone.of("did")[0].interval()) == "cannot tell"
    narrow = details[details["ratio"].isin([0, 0.1])]
    few = measure_models(narrow[narrow["model"] == "llama-4"])
    assert few.of("did").values == pytest.approx(few.values("peak_did"))
    assert few.interval("did", "llama-4") == pytest.approx(few.interval("peak_did", "llama-4"))
    low = details.assign(correct_norm=details["correct_norm"] * (details.index % 5 == 0))
    ceiling = measure_models(low).of("ceiling").values
    assert (ceiling < 0).all()
