"""How often intervals cover the truth, in simulated studies of this book's size."""

from __future__ import annotations

import numpy as np
import pytest

from paramspec.stats.simulation import CHANCE, KINDS, RATIOS, World, coverage


def test_the_truth_of_a_world_is_the_mean_of_many_studies():
    world = World.of(1.5)
    truth = world.truth()
    cells = world.cells(0, concepts=4000, own=3, general=3)
    (accuracy, general), error = cells.bare, cells.bare[0].errors()
    assert np.all(abs(accuracy.values - truth["accuracy"]) < 4 * error)
    assert np.all(abs(general.values - truth["accuracy"]) < 4 * general.errors())
    for place, ratio in enumerate(RATIOS):
        did = cells.gaps(("concept", ratio))["did"][0]
        assert np.all(abs(did.values - truth["did_by_ratio"][place]) < 4 * did.errors())
        null = cells.gaps(("random", ratio))["did"][0]
        assert np.all(abs(null.values) < 4 * null.errors())
        change = (cells.general["concept", ratio] - cells.bare[1])[0]
        assert np.all(abs(change.values - truth["change"][place]) < 4 * change.errors())
    assert truth["accuracy"].min() < CHANCE + 0.2
    assert truth["accuracy"].max() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_intervals_cover_the_truth_about_95_times_in_100(strength):
    """Studies are drawn from fixed seeds. Peaks must hold at all ratios, and cover more."""
    found = coverage(150, strength).set_index("estimate")
    found = found[found["intervals"] > 50]  # r has none without an effect
    expected = {*KINDS.values(), "change on unrelated questions", "diff. in diff. at one ratio"}
    expected |= {"slope", "contrast of models", "mean over seeds"}
    assert expected <= set(found.index)
    assert (found["holds_point"] == 1).all()
    # Of kinds with one interval a study, 150 studies know the share to 1.8 points.
    exact = found["intervals"] >= 3000
    assert found.loc[exact, "covered"].between(0.935, 0.99).all(), found["covered"]
    assert found["covered"].between(0.90, 1).all(), found["covered"]
