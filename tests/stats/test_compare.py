"""Two runs compared question by question, against numbers made by hand and by another way."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from paramspec.errors import InputError
from paramspec.stats.compare import compare

CONCEPTS, OWN = 12, 5


def run(model: str, knows: float, loses: float, seed: int) -> pd.DataFrame:
    """Answers of a model that loses a share under its own masks, in 5 own and 5 other questions."""
    draw, rows = np.random.default_rng(seed), []
    masks = [("none", 0.0), ("concept", 0.1), ("random", 0.1)]
    for number, (mask, ratio) in itertools.product(range(CONCEPTS), masks):
        for role, about in (("concept", number), ("general", (number + 1) % CONCEPTS)):
            lost = loses if (mask, role) == ("concept", "concept") else 0
            rows += [
                {"mask_concept": f"c{number}", "concept": f"c{about}", "role": role}
                | {"question_id": f"c{about}/{place}", "mask": mask, "ratio": ratio}
                | {"correct_norm": float(draw.random() < knows - lost)}
                for place in range(OWN)
            ]
    table = pd.DataFrame(rows).assign(model=model, protocol="paper", seed=0)
    return table.assign(option_logprobs=[[0.0] * 4] * len(table))


def test_differences_are_paired_by_concept():
    one, other = run("before", 0.8, 0.1, 0), run("after", 0.6, 0.4, 1)
    table = compare(one, other).set_index("measure")
    each = [
        run[(run["mask"] == "none") & (run["role"] == "concept")]
        .groupby("mask_concept")["correct_norm"]
        .mean()
        for run in (one, other)
    ]
    gap = each[1] - each[0]
    reach = stats.t.ppf(0.975, CONCEPTS - 1) * gap.std(ddof=1) / CONCEPTS**0.5
    row = table.loc["accuracy"]
    assert row[["first", "second"]].tolist() == pytest.approx([one_.mean() for one_ in each])
    assert row[["difference", "difference_low", "difference_high"]].tolist() == pytest.approx(
        [gap.mean(), gap.mean() - reach, gap.mean() + reach]
    )
    assert (row["questions"], row["concepts"]) == (CONCEPTS * OWN, CONCEPTS)
    assert set(table.index) == {
        "accuracy",
        "C(0.1)",
        "G(0.1)",
        "diff. in diff.",
        "the same, random masks",
    }


def test_a_run_against_itself_shows_nothing():
    one = run("before", 0.8, 0.1, 0)
    table = compare(one, one.assign(model="again"))
    assert (table["difference"] == 0).all()
    assert (table["first"] == table["second"]).all()


def test_only_what_both_were_asked_counts():
    one, other = run("before", 0.8, 0.1, 0), run("after", 0.6, 0.4, 1)
    fewer = other[~other["question_id"].str.endswith("/0")]
    expected = compare(one[~one["question_id"].str.endswith("/0")], fewer)
    pd.testing.assert_frame_equal(compare(one, fewer), expected)
    named = sorted(set(fewer["question_id"]))
    pd.testing.assert_frame_equal(compare(one, other, named), expected)


def test_runs_that_cannot_be_compared_are_refused():
    one = run("before", 0.8, 0.1, 0)
    elsewhere = one.assign(question_id="x" + one["question_id"])
    with pytest.raises(InputError, match="no question in common"):
        compare(one, elsewhere)
    with pytest.raises(InputError, match=r"models \['a', 'before'\]: compare one with one"):
        compare(pd.concat([one, one.assign(model="a")]), one)
