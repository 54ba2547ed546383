"""Results of a study: accuracies and PSS with their nulls, intervals and verdicts.

    summarize(pss)      # a row per (model, protocol, mask, ratio), with intervals
    peak_pss(pss)       # the maximum over the ratios, with intervals

Names are the paper's (section 3), see `method.pss`. Intervals resample concepts: a concept's
questions, masks and draws stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from paramspec.errors import InputError
from paramspec.stats.bootstrap import resample
from paramspec.tables import MASKS, TIERS

# The concepts of a statistic: indices `[..., concepts]`, or all in their order.
Samples = np.ndarray | slice
ALL = slice(None)
PEAKS = {"peak_pooled": "pss_pooled", "peak_per_concept": "pss_per_concept", "peak_did": "did"}
FLOOR_DRAWS = 4000  # of answers that chance alone decides
COUNTS = ["right_own", "n_concept", "right_general", "n_general"]


def accuracy_table(
    answers: pd.DataFrame, by: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Accuracy by group, with its 95 % interval over concepts.

    >>> answers = pd.DataFrame({"concept": list("aabb"), "tier": ["high"] * 2 + ["low"] * 2,
    ...                         "correct_norm": [1.0, 0.0, 1.0, 1.0]})
    >>> accuracy_table(answers, by=["tier"])[["group", "accuracy", "n"]].values.tolist()
    [['high', 0.5, 2], ['low', 1.0, 2]]

    Args:
        answers: from `score_questions`; column `correct_norm` is averaged.
        by: columns that make the groups; none for all rows together.

    Returns:
        `by`, `group` (their names and values, joined by " / "), `accuracy`, `low` and `high` (of a
        single concept, not a number), and `n`, the number of questions. Tiers come in their order,
        other groups by accuracy.
    """
    rows = []
    for values, part in answers.groupby(list(by), sort=False) if by else [((), answers)]:
        right, asked = part.groupby("concept")["correct_norm"].agg(["sum", "size"]).to_numpy().T
        samples = resample(len(right), resamples, seed)[1:]
        low, high = _bounds(right[samples].sum(-1) / asked[samples].sum(-1), len(right))
        group = " / ".join(map(str, values))
        row = (" / ".join(by), group, float(part["correct_norm"].mean()), low, high, len(part))
        rows.append(row)
    table = pd.DataFrame(rows, columns=["by", "group", "accuracy", "low", "high", "n"])
    if list(by) == ["tier"]:
        return table.sort_values("group", key=lambda names: names.map(TIERS.index))
    return table.sort_values("accuracy", ascending=False)


def summarize(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Accuracies and PSS at each ratio and mask, with 95 % intervals.

    >>> table = summarize(study.pss)
    >>> table.loc[table["model"] == "new", ["mask", "ratio"]].values.tolist()
    [['none', 0.0], ['concept', 0.3], ['random', 0.3]]

    A control of several draws is reported by the mean of their values: a mean taken before the
    absolute value would shrink with the number of draws, and a control would not show the effect
    of a single mask.

    Returns:
        A row per (model, protocol, mask, ratio): `concepts`; then, each with `_low` and `_high`:
        `concept_accuracy` and `general_accuracy`, pooled over questions; `pss_pooled`,
        |G(k) - C(k)| / G(0); `pss_per_concept`, the mean over concepts of the same ratio with
        their own C(k) and G(k), over the pooled G(0); `did`, the difference in differences
        ((G(k) - C(k)) - (G(0) - C(0))) / G(0), signed; `general_change`, G(k) - G(0); and, with
        no interval, `floor_pooled` and `floor_per_concept`, the PSS that sampling alone gives if
        every question is answered rightly with the same probability.

    Raises:
        InputError: if a mask lacks a row of a concept, or if there is no mask `none`.
    """
    rows = []
    for home, counts in _each_model(pss):
        samples = resample(len(counts.names), resamples, seed)[1:]
        for cell in counts.values:
            row = home | {"mask": cell[0], "ratio": cell[1], "concepts": len(counts.names)}
            row |= _with_intervals(counts.statistics, cell, samples)
            rows.append(row | _floors(counts, cell))
    return pd.DataFrame(rows)


def peak_pss(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The maximum of PSS over the ratios, with 95 % intervals.

    >>> peaks = peak_pss(study.pss)
    >>> bool((peaks["peak_pooled_low"] <= peaks["peak_pooled_high"]).all())
    True

    The maximum is taken anew in every resample of concepts and for every draw of a control. A
    maximum of noisy values is biased upwards: compare a mask's peak with those of its controls.

    Returns:
        A row per (model, protocol, mask): `peak_pooled`, `peak_per_concept` and `peak_did`, each
        with `_low` and `_high`, and `ratio`, where the pooled PSS peaks.
    """
    rows = []
    for home, counts in _each_model(pss):
        samples = resample(len(counts.names), resamples, seed)[1:]
        for mask in dict.fromkeys(mask for mask, _ in counts.values if mask != "none"):
            row = home | {"mask": mask} | _with_intervals(counts.peaks, mask, samples)
            cells = [cell for cell in counts.values if cell[0] == mask]
            pooled = [counts.statistics(cell)["pss_pooled"].mean() for cell in cells]
            rows.append(row | {"ratio": cells[int(np.argmax(pooled))][1]})
    return pd.DataFrame(rows)


def verdict(*lows: float, measured: bool = True) -> str:
    """Whether a claim that something rises holds in this run, by the lower bounds of intervals.

    >>> verdict(0.2, 0.01), verdict(0.2, -0.01), verdict(0.2, float("nan"))
    ('reproduced', 'not reproduced', 'not run here')

    Args:
        lows: the lower bounds of the 95 % intervals of all values that must rise. A missing one
            (not a number) is a condition that this run did not measure: without it, the claim is
            neither reproduced nor not.
        measured: False if the run did not measure the subject of the claim.
    """
    if not measured or not lows or np.isnan(lows).any():
        return "not run here"
    return "reproduced" if min(lows) > 0 else "not reproduced"


def best_general_change(
    pss: pd.DataFrame, ratios: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """The largest G(k) - G(0) over these ratios of the concepts' own masks, with its interval.

    The best of several ratios is the best by luck, too, which its own interval leaves out. So each
    resample of concepts gives the maximum and the minimum over the ratios of (change - measured
    change). The interval reaches down by the 97.5th percentile of the maxima, and up by the 2.5th
    of the minima. If no ratio changes anything, it lies above zero in 2.5 % of all studies, for any
    number of ratios. With a single concept, its bounds are not numbers.
    """
    counts = ConceptCounts.of(pss)
    samples = resample(len(counts.names), resamples, seed)
    cells = [counts.statistics(("concept", ratio), samples) for ratio in ratios]
    changes = np.stack([cell["general_change"].mean(axis=0) for cell in cells])
    best = int(changes[:, 0].argmax())
    value = float(changes[best, 0])
    row = {"ratio": float(ratios[best]), "value": value, "low": np.nan, "high": np.nan}
    if len(counts.names) > 1:
        luck = changes[:, 1:] - changes[:, :1]
        row["low"] = value - float(np.percentile(luck.max(axis=0), 97.5))
        row["high"] = value - float(np.percentile(luck.min(axis=0), 2.5))
    return row


@dataclass(frozen=True)
class ConceptCounts:
    """Right answers and questions of one model and protocol, per concept.

    `values[mask, ratio]` is `[4, draws, concepts]`. The four are right own, own, right general,
    general; a draw is a seed. `none` is `values["none", 0]`, its draws summed.
    """

    names: list[str]
    values: dict[tuple[str, float], np.ndarray]
    none: np.ndarray

    @classmethod
    def of(cls, part: pd.DataFrame) -> ConceptCounts:
        names = list(dict.fromkeys(part["concept"]))
        table = part.assign(
            right_own=part["concept_accuracy"] * part["n_concept"],
            right_general=part["general_accuracy"] * part["n_general"],
        ).set_index(["mask", "ratio", "seed", "concept"])[COUNTS]
        wide = table.unstack("concept")
        missing = wide["n_concept"].isna().stack()
        for mask, ratio, seed, concept in missing.index[missing]:
            place = f"mask {mask!r}, ratio {ratio}, seed {seed}"
            raise InputError(f"{place}: no row for {concept!r}; measure it, or leave it out")
        found = {
            cell: np.stack([rows[column][names].to_numpy(dtype=float) for column in COUNTS])
            for cell, rows in wide.groupby(level=["mask", "ratio"])
        }
        if ("none", 0.0) not in found:
            raise InputError("mask 'none': no row; PSS is relative to the accuracy without a mask")
        values = {cell: found[cell] for cell in sorted(found, key=lambda c: (MASKS.index(c[0]), c))}
        return cls(names, values, values["none", 0.0].sum(axis=1, keepdims=True))

    def statistics(self, cell: tuple[str, float], samples: Samples = ALL) -> dict[str, np.ndarray]:
        """The statistics of `summarize` for a mask and ratio, `[draws, ...]`."""
        none, counts = self.none[..., samples], self.values[cell][..., samples]
        (c0, g0), (c, g) = _pooled(none), _pooled(counts)
        gaps = abs(counts[2] / counts[3] - counts[0] / counts[1]).mean(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "concept_accuracy": c,
                "general_accuracy": g,
                "pss_pooled": abs(g - c) / g0,
                "pss_per_concept": gaps / g0,
                "did": ((g - c) - (g0 - c0)) / g0,
                "general_change": g - g0,
            }

    def peaks(self, mask: str, samples: Samples = ALL) -> dict[str, np.ndarray]:
        """Maxima over the ratios of a mask, `[draws, ...]`; empty if it was not measured."""
        each = [self.statistics(cell, samples) for cell in self.values if cell[0] == mask]
        return {
            peak: np.max([one[statistic] for one in each], axis=0)
            for peak, statistic in PEAKS.items()
            if each
        }


def _each_model(pss: pd.DataFrame) -> Iterator[tuple[dict[str, Any], ConceptCounts]]:
    for (model, protocol), part in pss.groupby(["model", "protocol"], sort=False):
        yield {"model": model, "protocol": protocol}, ConceptCounts.of(part)


def _pooled(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C and G pooled over the last axis, concepts."""
    total = counts.sum(-1)
    return total[0] / total[1], total[2] / total[3]


def _with_intervals(
    compute: Callable[..., dict[str, np.ndarray]], of: Any, samples: np.ndarray
) -> dict[str, float]:
    """Each statistic `of` a mask, the mean over draws, and its interval over `samples`."""
    row, resampled = {}, compute(of, samples)
    for name, values in compute(of).items():
        row[name] = float(values.mean(axis=0))
        bounds = _bounds(resampled[name].mean(axis=0), samples.shape[1])
        row[f"{name}_low"], row[f"{name}_high"] = bounds
    return row


def _bounds(values: np.ndarray, concepts: int) -> tuple[float, float]:
    """The 95 % interval of `[resamples]`; nan if a resample is nan, as with G(0) = 0."""
    from scipy import stats  # takes half a second, and workers do without it

    if concepts < 2:
        return float("nan"), float("nan")
    tail = (1 - 0.95) / 2
    low, high = stats.quantile(values, np.array([tail, 1 - tail]))
    return float(low), float(high)


def _floors(counts: ConceptCounts, cell: tuple[str, float]) -> dict[str, float]:
    """The mean of |G - C| / G(0), pooled and per concept, that sampling alone gives.

    Every question, own or general, is then answered rightly with the same probability, the accuracy
    under the mask.
    """
    own_right, own, general_right, general = counts.values[cell]
    accuracy = (own_right.sum() + general_right.sum()) / (own.sum() + general.sum())
    base = float(_pooled(counts.none)[1].item())
    if accuracy <= 0 or base <= 0:
        return {"floor_pooled": np.nan, "floor_per_concept": np.nan}
    # All draws of a control meet the same questions: the floor is that of one.
    n_own, n_general = own[0].astype(int), general[0].astype(int)
    draw = np.random.default_rng(0)
    drawn = draw.binomial(n_own, accuracy, (FLOOR_DRAWS, len(n_own)))
    others = draw.binomial(n_general, accuracy, (FLOOR_DRAWS, len(n_general)))
    pooled = abs(others.sum(1) / n_general.sum() - drawn.sum(1) / n_own.sum()).mean()
    per_concept = abs(others / n_general - drawn / n_own).mean()
    scale = accuracy / base
    return {
        "floor_pooled": float(pooled / accuracy) * scale,
        "floor_per_concept": float(per_concept / accuracy) * scale,
    }
