"""Verdicts found again: the second path agrees with the first, which it shares no code with."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from paramspec.errors import InputError
from paramspec.stats import recheck
from paramspec.stats.estimates import over_seeds, stack
from paramspec.stats.methods import run_means
from paramspec.stats.summary import general_change
from paramspec.stats.trends import contrast, delay, measure_models, trend
from paramspec.stats.verdicts import verdict


def answers(model, knows, effect, seed, concepts=60):
    """Answers of a model that loses more under a concept's own mask, at two ratios."""
    draw, rows = np.random.default_rng(seed), []
    ease = draw.normal(0, 0.1, concepts)
    for number in range(concepts):
        for mask, ratio in (("none", 0.0), ("concept", 0.05), ("concept", 0.5)):
            others = [(number + 1 + n) % concepts for n in range(4)]
            for place, about in enumerate([*[number] * 5, *others]):
                lost = (ratio + effect * (place < 5)) * ratio
                rows.append(
                    {"mask_concept": f"c{number}", "concept": f"c{about}", "mask": mask}
                    | {"ratio": ratio, "role": "concept" if place < 5 else "general"}
                    | {"question_id": f"{about}/{place}"}
                    | {
                        "option_logprobs": [0.0] * 4,
                        "correct_norm": float(draw.random() < knows + ease[about] - lost),
                    }
                )
    return pd.DataFrame(rows).assign(model=model, protocol="paper", seed=0)


NAMES = [f"m{place}" for place in range(6)]


@pytest.fixture(scope="module")
def details():
    knows = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85)
    return pd.concat(
        [
            answers(n, k, 3 * (k - 0.35), seed)
            for seed, (n, k) in enumerate(zip(NAMES, knows, strict=True))
        ]
    )


def alike(one, other):
    """Two intervals that differ by no more than a jackknife does from its linear part."""
    width = other["high"] - other["low"]
    assert one == pytest.approx((other["low"], other["high"]), abs=0.06 * width)


def test_intervals_of_the_second_path_are_those_of_the_first(details):
    measures = measure_models(details)
    about = pd.DataFrame({"model": NAMES, "measured": True, "above_chance": True, "run": "r"})
    about = about.assign(
        parameters=2.0 ** np.arange(6), step=2.0 ** np.arange(6), released=np.arange(6.0)
    )
    about["mmlu"] = about["released"] ** 2
    pairs = pd.DataFrame({"newest": NAMES[3:5], "oldest": NAMES[:2]})
    tables = {"answers": details, "models": about, "pairs": pairs}
    alike(recheck._c2(tables)["newer"], contrast(measures, NAMES[3:5], NAMES[:2]))
    by_size = trend(measures, x=list(np.arange(6.0)))
    slope = {"low": by_size["slope_low"], "high": by_size["slope_high"]}
    alike(recheck._c5(tables)["slope"], slope)
    alike(recheck._c3(tables)["released"], slope)
    late = [delay(measures.of(one), about["step"]) for one in ("did", "accuracy")]
    alike(recheck._c6(tables)["delay"], (late[0] - late[1]).interval())
    one = details[details["model"] == "m5"]
    alike(recheck._c7({"answers": one})["change"], general_change(one, [0.05]))
    # Noise flattens a slope by a little.
    found, free = recheck._c1(tables)["slope"], trend(measures)
    assert found == pytest.approx((free["slope_low"], free["slope_high"]), abs=0.1)


def test_tiers_are_compared_on_the_concepts_of_each(details):
    tiers = pd.DataFrame(
        {"concept": f"c{n}", "tier": ("high", "medium", "low")[n % 3]} for n in range(60)
    )
    able = pd.DataFrame({"model": NAMES[2:]})
    found = recheck._c4({"answers": details, "tiers": tiers, "able": able})
    high, low = (
        measure_models(details, list(tiers.loc[tiers["tier"] == tier, "concept"]))
        for tier in ("high", "low")
    )
    for name in ("accuracy", "did"):
        gap = high.of(name, NAMES[2:]).mean() - low.of(name, NAMES[2:]).mean()
        alike(found[f"{name}, high minus low"], gap.interval())


def test_ways_of_training_are_compared_over_concepts_and_seeds():
    draw, rows = np.random.default_rng(0), []
    for model, method, seed in (
        (m, k, s)
        for m, seeds in {"a": 3, "b": 2, "c": 1}.items()
        for k in ("FT-PV", "FT-FV", "FT-CV", "FT-RV")
        for s in range(seeds)
    ):
        right = draw.random((12, 6)) < (0.7 if method == "FT-PV" else 0.5)
        rows += [
            {"model": model, "method": method, "seed": seed, "run": f"{method}/{seed}"}
            | {"concept": f"c{concept}", "correct_norm": float(one), "option_logprobs": [0.0] * 4}
            for concept, each in enumerate(right)
            for one in each
        ]
    table = pd.DataFrame(rows)
    found = recheck._c8({"answers": table})
    each = []
    for _, part in table.groupby("model"):
        runs = run_means(part, "correct_norm")
        gaps = [runs[f"FT-PV/{s}"] - runs[f"FT-RV/{s}"] for s in sorted(set(part["seed"]))]
        each.append(stack(gaps))
    alike(found["minus FT-RV"], over_seeds(*each))


def test_both_paths_say_the_same_of_the_same_intervals():
    bounds = [(0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3), (np.nan, 0.3), (0.0, 0.2)]
    for one in bounds:
        for other in bounds:
            effects = [{"low": low, "high": high} for low, high in (one, other)]
            assert recheck._verdict({"one": one, "other": other}) == verdict(*effects)


def test_a_verdict_that_differs_from_the_chapters_is_shown(details, tmp_path, command):
    """C7 of a model that loses on unrelated questions, in a copy that says it gains."""
    (tmp_path / "3-masking.data").mkdir()
    losing = details[details["model"] == "m0"].copy()
    losing.loc[(losing["mask"] == "concept") & (losing.index % 2 == 0), "correct_norm"] = 0.0
    losing.to_parquet(tmp_path / "3-masking.data" / "answers.parquet")
    output = {
        "metadata": {"scrapbook": {"name": "c7-verdict"}},
        "data": {"text/plain": "'consistent'"},
    }
    copy = {"cells": [{"outputs": [output]}]}
    (tmp_path / "3-masking.ipynb").write_text(json.dumps(copy))
    status, out, error = command("verdicts", tmp_path)
    assert "opposite" in out
    assert (status, error) == (1, "paramspec: C7: another verdict than the chapter's\n")
    copy["cells"][0]["outputs"][0]["data"]["text/plain"] = "'opposite'"
    (tmp_path / "3-masking.ipynb").write_text(json.dumps(copy))
    assert command("verdicts", tmp_path)[0] == 0


def test_a_folder_without_tables_is_one_line(tmp_path, refused):
    assert "no executed chapter with its tables" in refused("verdicts", tmp_path)
    with pytest.raises(InputError, match="no executed chapter"):
        recheck.recheck(tmp_path / "missing")
