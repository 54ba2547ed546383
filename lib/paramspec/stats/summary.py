"""Accuracies and PSS of each mask, from the answers of a study.

    summarize(study.details)      # a row per (model, protocol, mask, ratio), with intervals
    peak_pss(study.details)       # a row per (model, protocol, mask): over the ratios

Names are the paper's (section 3), see `method.pss`. Intervals are those of `stats.estimates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from paramspec.errors import InputError
from paramspec.stats import estimates
from paramspec.stats.estimates import Estimates, Interval, means, share, stack, told
from paramspec.tables import MASKS, ONE, TIERS

Cell = tuple[str, float]  # a mask and its ratio
BARE: Cell = ("none", 0.0)


def accuracy_table(answers: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Accuracy by group, with its 95 % interval over concepts.

    >>> answers = pd.DataFrame({"concept": list("aabb"), "tier": ["high"] * 2 + ["low"] * 2,
    ...                         "correct_norm": [1.0, 0.0, 1.0, 1.0],
    ...                         "option_logprobs": [[-1.0, -2.0, -3.0]] * 4})
    >>> accuracy_table(answers, by=["tier"])[["group", "accuracy", "n"]].values.tolist()
    [['high', 0.5, 2], ['low', 1.0, 2]]

    Args:
        answers: from `score_questions`; column `correct_norm` is averaged.
        by: columns that make the groups; none for all rows together.

    Returns:
        `by`, `group` (their names and values, joined by " / "), `accuracy`, `low` and `high` (see
        `estimates.share`; the group's questions if it has one concept), `n`, the number of
        questions, and `chance`, see `chance_of`. Tiers come in their order, other groups by
        accuracy.
    """
    rows = []
    for values, part in answers.groupby(list(by), sort=False) if by else [((), answers)]:
        _, accuracy = means(part.assign(all=0), "correct_norm", ["all"])
        found = share(accuracy[0], len(part))
        group = " / ".join(map(str, values))
        rows.append((" / ".join(by), group, *found.values(), len(part), chance_of(part)))
    columns = ["by", "group", "accuracy", "low", "high", "n", "chance"]
    table = pd.DataFrame(rows, columns=columns)
    if list(by) == ["tier"]:
        return table.sort_values("group", key=lambda names: names.map((*TIERS, ONE).index))
    return table.sort_values("accuracy", ascending=False)


def chance_of(answers: pd.DataFrame) -> float:
    """How often a guess is right: the mean over answers of one over the number of options."""
    return float((1 / answers["option_logprobs"].map(len)).mean())


def summarize(details: pd.DataFrame) -> pd.DataFrame:
    """Accuracies and PSS at each ratio and mask, with 95 % intervals.

    >>> table = summarize(study.details)
    >>> table.loc[table["model"] == "new", ["mask", "ratio"]].values.tolist()
    [['none', 0.0], ['concept', 0.3], ['random', 0.3]]

    A control of several draws is reported by the mean of their values: a mean taken before the
    absolute value would shrink with the number of draws, and a control would not show the effect
    of a single mask.

    Returns:
        A row per (model, protocol, mask, ratio): `concepts`, and `chance` without a mask; then,
        each with `_low` and `_high`: `concept_accuracy` and `general_accuracy`, pooled over
        questions; `pss_pooled`, |G(k) - C(k)| / G(0); `pss_per_concept`, the mean over concepts of
        the same ratio with their own C(k) and G(k), over the pooled G(0); `did`, the difference in
        differences ((G(k) - C(k)) - (G(0) - C(0))) / G(0), signed; and `general_change`,
        G(k) - G(0).

    Raises:
        InputError: if a mask lacks answers on a concept, if there is no mask `none`, or if a
            question was answered twice.
    """
    rows = []
    for home, cells in _each_model(details):
        for cell in cells.own:
            row = home | {"mask": cell[0], "ratio": cell[1], "concepts": cells.concepts}
            row["chance"] = cells.chance
            for name, one in cells.intervals(cell).items():
                row |= told(name, one)
            rows.append(row)
    return pd.DataFrame(rows)


def peak_pss(details: pd.DataFrame) -> pd.DataFrame:
    """PSS over all mask ratios: its maximum, as the paper takes it, and a mean that is unbiased.

    >>> peaks = peak_pss(study.details)
    >>> bool((peaks["peak_pooled_low"] <= peaks["peak_pooled"]).all())
    True

    A maximum of noisy values is too high; its interval allows for that, see `estimates.largest`.

    Returns:
        A row per (model, protocol, mask): `did`, the mean over the ratios of the difference in
        differences; `peak_pooled`, `peak_per_concept` and `peak_did`, maxima; each with `_low` and
        `_high`; and `ratio`, where the pooled PSS peaks.
    """
    rows = []
    for home, cells in _each_model(details):
        for mask in dict.fromkeys(mask for mask, _ in cells.own if mask != "none"):
            row = home | {"mask": mask} | told("did", cells.over_ratios(mask)["did"].interval())
            for name, one in cells.peaks(mask).items():
                row |= told(f"peak_{name}", one)
            rows.append(row | {"ratio": cells.peak_ratio(mask)})
    return pd.DataFrame(rows)


def general_change(details: pd.DataFrame, ratios: Sequence[float]) -> Interval:
    """`general_change(study.details, [0.05, 0.1])`: G(k) - G(0), the mean over these ratios of the
    concepts' own masks, of one model and protocol.
    """
    cells = Cells.of(details)
    each = [cells.general["concept", ratio].mean() for ratio in ratios]
    return (stack(each).mean() - cells.bare[1]).interval()


@dataclass(frozen=True)
class Cells:
    """Accuracies of one model and protocol, by mask and ratio; each `[draws]` of the mask.

    Attributes:
        concepts: the number of those that were masked.
        own, general: C(k) and G(k), pooled over questions.
        apart: the mean over concepts of |G(k) - C(k)|, each concept's own.
        asked: the numbers of questions, own and general, of a draw.
        chance: see `chance_of`, of the answers without a mask.
    """

    concepts: int
    own: dict[Cell, Estimates]
    general: dict[Cell, Estimates]
    apart: dict[Cell, Estimates]
    asked: dict[Cell, tuple[int, int]]
    chance: float

    @classmethod
    def of(cls, answers: pd.DataFrame, units: Sequence[str] | None = None) -> Cells:
        """`Cells.of(details)`: of `DETAIL_COLUMNS`; `units`, see `estimates.means`."""
        require_whole(answers)
        units = (
            sorted(set(answers["concept"]) | set(answers["mask_concept"]))
            if units is None
            else units
        )
        cell = ["mask", "ratio", "seed"]
        of_concept = answers.groupby([*cell, "mask_concept", "role"])["correct_norm"].mean()
        sides = of_concept.unstack("role")
        gaps = (sides["general"] - sides["concept"]).abs().rename("gap").reset_index()
        about: dict[str, Any] = {"units": units}
        found = {}
        for role in ("concept", "general"):
            part = answers[answers["role"] == role]
            found[role] = _by_mask(*means(part, "correct_norm", cell, **about))
        apart = _by_mask(*means(gaps, "gap", cell, unit="mask_concept", **about))
        many = answers.groupby(["mask", "ratio", "seed", "role"]).size().unstack("role")
        asked = {
            (mask, ratio): (row["concept"], row["general"])
            for (mask, ratio, _), row in many.iterrows()
        }
        chance = chance_of(answers[answers["mask"] == "none"])
        concepts = len(set(answers["mask_concept"]))
        return cls(concepts, found["concept"], found["general"], apart, asked, chance)

    def model(self, place: int) -> Cells:
        """One of the models, of cells that are `[draws, models]`."""
        parts = (self.own, self.general, self.apart)
        own, general, apart = (
            {cell: one[:, place] for cell, one in part.items()} for part in parts
        )
        return Cells(self.concepts, own, general, apart, self.asked, self.chance)

    @property
    def bare(self) -> tuple[Estimates, Estimates]:
        """C(0) and G(0)."""
        return self.own[BARE][0], self.general[BARE][0]

    def gaps(self, cell: Cell) -> dict[str, Estimates]:
        """What PSS is made of, `[draws]`: PSS before the absolute value, and its kin."""
        (c0, g0), c, g = self.bare, self.own[cell], self.general[cell]
        opened = g - c - (g0 - c0)
        return {
            "pooled": (g - c) / g0,
            "per_concept": self.apart[cell] / g0,
            "did": opened / g0,
            "did_undivided": opened,
            "did_over_own": opened / c0,
            "did_over_masked": opened / g,
        }

    def intervals(self, cell: Cell) -> dict[str, Interval]:
        """The columns of `summarize` for a mask and ratio."""
        gaps, (own, general) = self.gaps(cell), self.asked[cell]
        return {
            "concept_accuracy": share(self.own[cell].mean(), own),
            "general_accuracy": share(self.general[cell].mean(), general),
            "pss_pooled": _over_draws(gaps["pooled"][None]),
            "pss_per_concept": _over_draws(gaps["per_concept"][None]),
            "did": gaps["did"].mean().interval(),
            "general_change": (self.general[cell] - self.bare[1]).mean().interval(),
        }

    def _of_mask(self, mask: str) -> dict[str, Estimates]:
        """`gaps` at all ratios of a mask, `[ratios, draws]`; empty if it was not measured."""
        each = [self.gaps(cell) for cell in self.own if cell[0] == mask]
        return {name: stack([one[name] for one in each]) for name in (each[0] if each else ())}

    def over_ratios(self, mask: str) -> dict[str, Estimates]:
        """The mean of each of `gaps` over the ratios and draws of a mask."""
        return {name: gap.mean(1).mean() for name, gap in self._of_mask(mask).items()}

    def peaks(self, mask: str) -> dict[str, Interval]:
        """Maxima over the ratios, of `did` with its sign, else of |gap|; means over the draws."""
        gaps = self._of_mask(mask)
        names = [name for name in ("pooled", "per_concept", "did") if name in gaps]
        return {name: _over_draws(gaps[name], signed=name == "did") for name in names}

    def peak_ratio(self, mask: str) -> float:
        """The ratio at which PSS, pooled over concepts, is highest."""
        ratios = [ratio for name, ratio in self.own if name == mask]
        return ratios[int(abs(self._of_mask(mask)["pooled"].values).mean(1).argmax())]


def _over_draws(gaps: Estimates, *, signed: bool = False) -> Interval:
    draws = range(gaps.values.shape[1])
    return estimates.mean_of([estimates.largest(gaps[:, draw], signed=signed) for draw in draws])


def _by_mask(index: pd.MultiIndex, found: Estimates) -> dict[Cell, Estimates]:
    """Estimates of (mask, ratio, seed), by mask and ratio; masks in the order of `MASKS`."""
    places: dict[Cell, list[int]] = {}
    for place, (mask, ratio, _) in enumerate(index):
        places.setdefault((mask, ratio), []).append(place)
    order = sorted(places, key=lambda cell: (MASKS.index(cell[0]), cell))
    return {cell: found[places[cell]] for cell in order}


def _each_model(details: pd.DataFrame) -> Iterator[tuple[dict[str, Any], Cells]]:
    for (model, protocol), part in details.groupby(["model", "protocol"], sort=False):
        yield {"model": model, "protocol": protocol}, Cells.of(part)


def require_whole(answers: pd.DataFrame) -> None:
    """Refuse the answers of a model if a mask lacks a concept, or a question is answered twice."""
    cell = ["mask", "ratio", "seed"]
    if not (answers["mask"] == "none").any():
        raise InputError("mask 'none': no row; PSS is relative to the accuracy without a mask")
    counts = answers.groupby([*cell, "role", "mask_concept"]).size().unstack("mask_concept")
    for row, column in np.argwhere(counts.isna().to_numpy()):
        (mask, ratio, seed, role), concept = counts.index[row], counts.columns[column]
        place = f"mask {mask!r}, ratio {ratio}, seed {seed}"
        message = f"{place}: no answer ({role}) for {concept!r}; measure it, or leave it out"
        raise InputError(message)
    twice = answers.duplicated([*cell, "role", "mask_concept", "question_id"])
    if twice.any():
        row = answers[twice].iloc[0]
        raise InputError(
            f"{row['question_id']!r}: answered twice under mask {row['mask']!r} of "
            f"{row['mask_concept']!r}; give the answers of one measurement"
        )
