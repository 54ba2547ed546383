"""Studies of models whose truth is known: they show how often an interval covers it.

    coverage(studies=200, strength=1.5)     # a row per kind of estimate

A `World` says how often each model answers rightly in truth, and draws studies of it.

The log-odds of knowing an answer are a model's ability, plus the ease of the concept, plus the ease
of the concept for the model; who does not know guesses one of four options. A mask takes log-odds
from every question, from those on its own concept more, and from one mask to another not the same.
A question keeps its luck from one mask to the next with probability `KEEP`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from paramspec.stats.estimates import Estimates, interval_of, over_seeds, share
from paramspec.stats.summary import BARE, Cell, Cells
from paramspec.stats.trends import contrast, delay, lateness, measures_of, trend

CONCEPT_SD, BOTH_SD, MASK_SD = 0.8, 0.4, 0.3  # log-odds; of a mask, in units of what it takes
KEEP = 0.8
CHANCE = 0.25  # of a guess among four options, as SpecWiki has
# What a mask of 5, 15 and 40 % takes from any question, and more from its own concept's.
RATIOS, ANY, OWN = (0.05, 0.15, 0.4), np.array([0.3, 0.9, 2.0]), np.array([0.35, 0.8, 1.0])


@dataclass(frozen=True)
class World:
    """Models, and what masks do to them, in log-odds.

    Attributes:
        ability: `[models]`.
        taken, more: by a mask, from any question, and from its own concept's: `[ratios, models]`.
    """

    ability: np.ndarray
    taken: np.ndarray
    more: np.ndarray

    @classmethod
    def of(cls, strength: float, ability: ArrayLike | None = None, seed: int = 0) -> World:
        """Twenty models from near chance to 0.95; what is the concept's own rises with ability.

        With a `strength` of 0, masks are not specific at all; of 1.5, as in the best micro models.
        """
        draw = np.random.default_rng(seed)
        able = np.linspace(-1.5, 2.5, 20) + draw.normal(0, 0.2, 20)
        able = able if ability is None else np.asarray(ability, dtype=float)
        rise = 0.15 + (able - able.min()) / max(np.ptp(able), 1e-9)
        rise = strength * (rise + draw.normal(0, 0.1, len(able)))
        taken = ANY[:, None] * np.exp(draw.normal(0, 0.2, len(able)))
        return cls(able, taken, OWN[:, None] * rise)

    def truth(self) -> dict[str, np.ndarray]:
        """`[models]` of each measure of `measure_models`, over infinitely many concepts."""
        c0 = g0 = _mean_chance(self.ability, 0.0)
        g = _mean_chance(self.ability - self.taken, MASK_SD * self.taken)
        c = _mean_chance(self.ability - self.taken - self.more, MASK_SD * self.taken)
        gaps = (g - c) / g0
        return {
            "accuracy": c0,
            "did": gaps.mean(axis=0),
            "did_by_ratio": gaps,
            "change": g - g0,
            "peak_pss": abs(gaps).max(axis=0),
            "peak_did": gaps.max(axis=0),
        }

    def cells(self, seed: int, *, concepts: int = 72, own: int = 5, general: int = 5) -> Cells:
        """Answers to so many questions on each concept; every cell is `[draws = 1, models]`."""
        draw = np.random.default_rng(seed)
        models = len(self.ability)
        ease = draw.normal(0, CONCEPT_SD, concepts) + draw.normal(0, BOTH_SD, (models, concepts))
        odds = self.ability[:, None] + ease
        uneven = 1 + MASK_SD * draw.normal(size=concepts)
        luck = draw.random((models, concepts, own))
        # Unrelated questions of each mask: on other concepts, each at most once.
        about = np.argsort(draw.random((concepts, concepts)) + 9 * np.eye(concepts))[:, :general]
        item = draw.integers(own, size=about.shape)
        lucky = luck[:, about, item]
        found: dict[str, dict[Cell, Estimates]] = {"own": {}, "general": {}, "apart": {}}
        cells = [BARE, *(("concept", ratio) for ratio in RATIOS), *(("random", r) for r in RATIOS)]
        for cell in cells:
            taken, more, chosen = np.zeros((models, concepts)), 0.0, lucky
            if cell != BARE:
                taken = self.taken[RATIOS.index(cell[1])][:, None] * uneven
                more = self.more[RATIOS.index(cell[1])][:, None] * (cell[0] == "concept")
                kept = draw.random(lucky.shape) < KEEP
                chosen = np.where(kept, lucky, draw.random(lucky.shape))
            mine = luck < _chance(odds - taken - more)[..., None]
            others = chosen < _chance(odds[:, about] - taken[..., None])
            found["own"][cell] = _clustered(mine, np.repeat(np.arange(concepts)[:, None], own, 1))
            found["general"][cell] = _clustered(others, about)
            gap = abs(others.mean(-1) - mine.mean(-1))[..., None]
            found["apart"][cell] = _clustered(gap, np.arange(concepts)[:, None])
        asked = dict.fromkeys(cells, (concepts * own, concepts * general))
        sides = (found["own"], found["general"], found["apart"])
        return Cells(concepts, *sides, asked, CHANCE)


KINDS = {
    "accuracy": "accuracy",
    "did": "diff. in diff., mean over ratios",
    "null_did": "the same, random masks",
    "peak_pss": "peak PSS",
    "peak_did": "peak diff. in diff.",
}
Found = tuple[str, float, Mapping[str, float]]  # the kind of estimate, its truth, its interval


def coverage(
    studies: int,
    strength: float,
    *,
    others: Sequence[Callable[[Cells], Iterator[Found]]] = (),
    **sizes: int,
) -> pd.DataFrame:
    """`coverage(studies=200, strength=1.5)`: how often intervals cover the truth.

    Args:
        studies: how many are drawn, of one world.
        strength: of what is specific to a concept, see `World.of`.
        others: more ways to an interval, to compare with.
        sizes: `concepts`, and on each `own` and `general` questions.

    Returns:
        A row per kind of `estimate`: `covered`, the share of intervals that hold the truth;
        `holds_point`, of those that hold their own value; the mean `width`; and `intervals`, their
        number. An interval that is not a number counts as missing.
    """
    world, late = World.of(strength), World.of(strength, np.linspace(-3, 2, 9))
    truth, later = world.truth(), late.truth()
    rows: list[tuple] = []
    for seed in range(studies):
        cells = world.cells(seed, **sizes)
        found = [*_of_models(truth, cells), *_of_checkpoints(later, late.cells(seed, **sizes))]
        found += _of_seeds(seed)
        found += [one for other in others for one in other(cells)]
        for kind, known, one in found:
            holds = [
                one["low"] - 1e-12 <= value <= one["high"] + 1e-12
                for value in (known, one["value"])
            ]
            if not np.isnan([one["low"], one["high"]]).any():
                rows.append((kind, *holds, one["high"] - one["low"]))
    table = pd.DataFrame(rows, columns=["estimate", "covered", "holds_point", "width"])
    grouped = table.groupby("estimate", sort=False)
    return grouped.mean().assign(intervals=grouped.size()).reset_index()


def _of_models(truth: Mapping[str, np.ndarray], cells: Cells) -> Iterator[Found]:
    models = range(len(truth["accuracy"]))
    measures = measures_of([cells.model(place) for place in models])
    names = measures.models
    for name, place in zip(names, models, strict=True):
        for measure, kind in KINDS.items():
            known = truth[measure][place] if measure in truth else 0.0  # random masks open no gap
            yield kind, known, measures.interval(measure, name)
    for place, ratio in enumerate(RATIOS):
        change = (cells.general["concept", ratio] - cells.bare[1])[0]
        did = cells.gaps(("concept", ratio))["did"][0]
        for model in models:
            yield (
                "change on unrelated questions",
                truth["change"][place, model],
                change[model].interval(),
            )
            yield (
                "diff. in diff. at one ratio",
                truth["did_by_ratio"][place, model],
                did[model].interval(),
            )
    best = truth["did"][-1] - truth["did"][4]
    yield "contrast of models", best, contrast(measures, names[-1], names[4])
    yield from _of_trend("", truth["accuracy"], truth["did"], trend(measures))
    along = list(np.arange(len(names), dtype=float))
    yield from _of_trend(" over a known x", np.array(along), truth["did"], trend(measures, x=along))


def _of_trend(
    what: str, x: np.ndarray, y: np.ndarray, found: Mapping[str, float]
) -> Iterator[Found]:
    with np.errstate(invalid="ignore"):
        truths = {"slope": np.polyfit(x, y, 1)[0], "r": np.corrcoef(x, y)[0, 1]}
    for kind, truth in truths.items():
        if kind == "r" and np.ptp(y) < 1e-9:
            continue  # there is nothing to correlate
        yield f"{kind}{what}", float(truth), interval_of(found, kind)


def _of_checkpoints(truth: Mapping[str, np.ndarray], cells: Cells) -> Iterator[Found]:
    """How much later one measure rises than another, over nine checkpoints."""
    steps = 2.0 ** np.arange(len(truth["accuracy"]))
    measures = measures_of([cells.model(place) for place in range(len(steps))])
    late = [delay(measures.of(measure), steps) for measure in ("did", "accuracy")]
    if np.ptp(truth["did"]) > 1e-9:
        known = lateness(truth["did"], steps) - lateness(truth["accuracy"], steps)
        yield "delay", float(known), (late[0] - late[1]).interval()


SEEDS = (2, 3, 5)  # of three models


def _of_seeds(seed: int, concepts: int = 10, asked: int = 10) -> Iterator[Found]:
    """Two ways of training at the same seeds, on three models: an accuracy, and differences."""
    draw = np.random.default_rng(seed)
    truth = _mean_chance(np.array([0.9, 0.4]), 0.15)
    pairs = [_of_training(draw, seeds, concepts, asked) for seeds in SEEDS]
    one, other = pairs[1]
    ahead = float(truth[0] - truth[1])
    yield "mean over seeds", float(truth[0]), over_seeds(one)
    yield "difference over seeds", ahead, over_seeds(one - other)
    differences = [first - second for first, second in pairs]
    yield "difference over models and seeds", ahead, over_seeds(*differences)
    yield "accuracy of ten concepts", float(truth[0]), share(one[0], concepts * asked)


def _of_training(
    draw: np.random.Generator, seeds: int, concepts: int, asked: int
) -> tuple[Estimates, Estimates]:
    """Accuracies `[seeds]` of a model after either way of training."""
    ease = draw.normal(0, CONCEPT_SD, concepts) + draw.normal(0, BOTH_SD, (2, seeds, concepts))
    odds = np.array([0.9, 0.4])[:, None, None] + ease + draw.normal(0, 0.15, (2, seeds, 1))
    luck = draw.random((concepts, asked))
    right = np.where(draw.random((2, seeds, concepts, asked)) < KEEP, luck, draw.random(luck.shape))
    right = right < _chance(odds)[..., None]
    about = np.repeat(np.arange(concepts)[:, None], asked, 1)
    one, other = (_clustered(runs, about)[0] for runs in right)
    return one, other


def _chance(odds: np.ndarray) -> np.ndarray:
    """Of a right answer, guesses among them."""
    return CHANCE + (1 - CHANCE) / (1 + np.exp(-odds))


def _mean_chance(odds: np.ndarray, spread: np.ndarray | float) -> np.ndarray:
    """The mean over concepts, by Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    deviation = np.sqrt(CONCEPT_SD**2 + BOTH_SD**2 + np.square(spread))
    at = np.asarray(odds)[..., None] + np.asarray(deviation)[..., None] * nodes
    return (_chance(at) * weights).sum(-1) / weights.sum()


def _clustered(right: np.ndarray, about: np.ndarray) -> Estimates:
    """The mean over answers `[models, masks, answers]`, moved by the concepts they are about."""
    mean = right.mean(axis=(1, 2))
    member = np.zeros((len(about), about.size))
    member[about.ravel(), np.arange(about.size)] = 1 / about.size
    residuals = (right - mean[:, None, None]).reshape(len(right), -1)
    return Estimates(mean[None], (member @ residuals.T)[:, None], len(member))
