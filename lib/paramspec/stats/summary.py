"""What a study's answers say: accuracies and PSS with their nulls, intervals and verdicts.

    summarize(pss)      # a row per (model, protocol, mask, ratio), with intervals
    peak_pss(pss)       # the maximum over the ratios, with intervals

Names are the paper's (section 3), see `method.pss`. Intervals resample concepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from paramspec.errors import InputError
from paramspec.tables import MASKS, TIERS


def accuracy_table(
    answers: pd.DataFrame, by: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """`accuracy_table(answers, by=["tier"])`: accuracy by group, with its 95 % interval.

    Args:
        answers: from `score_questions`; column `correct_norm` is averaged.
        by: columns that make the groups; none for all rows together.

    Returns:
        `by`, `group` (their names and values, joined by " / "), `accuracy`, `low` and `high` (a
        bootstrap over concepts; of a single concept, not a number), and `n`, the number of
        questions. Tiers come in their order, other groups by accuracy.
    """
    grouped = answers.groupby(list(by), sort=False) if by else [((), answers)]
    rows = []
    for values, part in grouped:
        right = part.groupby("concept")["correct_norm"].agg(["sum", "size"]).to_numpy().T

        def accuracy(sample: np.ndarray, axis: int, right=right) -> np.ndarray:
            return right[0][sample].sum(-1) / right[1][sample].sum(-1)

        low, high = _interval(accuracy, right.shape[1], resamples, seed)
        group = " / ".join(map(str, values))
        row = (" / ".join(by), group, float(part["correct_norm"].mean()), low, high, len(part))
        rows.append(row)
    table = pd.DataFrame(rows, columns=["by", "group", "accuracy", "low", "high", "n"])
    if list(by) == ["tier"]:
        return table.sort_values("group", key=lambda names: names.map(TIERS.index))
    return table.sort_values("accuracy", ascending=False)


def summarize(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`summarize(pss)`: accuracies and PSS at each ratio and mask, with 95 % intervals.

    Of several draws of a control, each gives its own value, and the mean of them is told: taken
    before the absolute value, it would shrink with the number of draws, and a control would not
    show what a single mask does. Intervals are percentiles of a bootstrap over concepts: a
    concept's questions, masks and draws stay together (`scipy.stats.bootstrap`).

    Returns:
        A row per (model, protocol, mask, ratio): `concepts`; then, each with `_low` and `_high`:
        `concept_accuracy` and `general_accuracy`, pooled over questions; `pss_pooled`,
        |G(k) - C(k)| / G(0); `pss_per_concept`, the mean over concepts of the same ratio with
        their own C(k) and G(k), over the pooled G(0); `did`, the difference in differences
        ((G(k) - C(k)) - (G(0) - C(0))) / G(0), signed; `general_change`, G(k) - G(0); and, with
        no interval, `floor_pooled` and `floor_per_concept`, what PSS would be if nothing but
        sampling parted C from G (see `sampling_floor`).

    Raises:
        InputError: if a mask lacks a row of a concept, or has two, or if there is no mask `none`.
    """
    rows = []
    for (model, protocol), part in pss.groupby(["model", "protocol"], sort=False):
        counts = ConceptCounts.of(part)
        for mask, ratio in counts.cells:
            row = {"model": model, "protocol": protocol, "mask": mask, "ratio": ratio}
            row["concepts"] = len(counts.names)
            row |= _with_intervals(counts, [(mask, ratio)], cell_statistics, resamples, seed)
            row |= _floors(counts, (mask, ratio))
            rows.append(row)
    return pd.DataFrame(rows)


def peak_pss(pss: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`peak_pss(pss)`: the maximum of PSS over the ratios, with 95 % intervals.

    The maximum is taken anew in every resample of concepts and for every draw of a control. A
    maximum of noisy values is biased upwards: read a mask's peak beside those of its controls.

    Returns:
        A row per (model, protocol, mask): `peak_pooled` and `peak_per_concept`, each with `_low`
        and `_high`, and `ratio`, where the pooled PSS peaks.
    """
    rows = []
    for (model, protocol), part in pss.groupby(["model", "protocol"], sort=False):
        counts = ConceptCounts.of(part)
        for mask in dict.fromkeys(mask for mask, _ in counts.cells if mask != "none"):
            cells = [cell for cell in counts.cells if cell[0] == mask]
            row = {"model": model, "protocol": protocol, "mask": mask}
            row |= _with_intervals(counts, cells, _peak_statistics, resamples, seed)
            pooled = [
                cell_statistics(counts.none, counts.values[cell])["pss_pooled"].mean()
                for cell in cells
            ]
            row["ratio"] = cells[int(np.argmax(pooled))][1]
            rows.append(row)
    return pd.DataFrame(rows)


def sampling_floor(
    n_concept: np.ndarray, n_general: np.ndarray, accuracy: float, *, draws: int = 4000
) -> tuple[float, float]:
    """`pooled, per_concept = sampling_floor(n_concept, n_general, 0.7)`: PSS of no effect.

    The mean of |G - C| / accuracy when every question, own or general, is answered rightly with
    the same probability: what an absolute difference shows of sampling alone.

    Args:
        n_concept, n_general: questions of each concept, `[concepts]`.
        accuracy: that probability, above 0.
    """
    if accuracy <= 0:
        return float("nan"), float("nan")
    draw = np.random.default_rng(0)
    own = draw.binomial(n_concept, accuracy, (draws, len(n_concept)))
    general = draw.binomial(n_general, accuracy, (draws, len(n_general)))
    pooled = abs(general.sum(1) / n_general.sum() - own.sum(1) / n_concept.sum()).mean()
    per_concept = abs(general / n_general - own / n_concept).mean()
    return float(pooled / accuracy), float(per_concept / accuracy)


@dataclass(frozen=True)
class ConceptCounts:
    """Right answers and questions, per concept: `[4, draws, concepts]` for each (mask, ratio).

    The four are right own, own, right general, general; a draw is a seed.
    """

    names: list[str]
    cells: list[tuple[str, float]]
    values: dict[tuple[str, float], np.ndarray]

    @classmethod
    def of(cls, part: pd.DataFrame) -> ConceptCounts:
        names = list(dict.fromkeys(part["concept"]))
        table = part.assign(
            right_own=part["concept_accuracy"] * part["n_concept"],
            right_general=part["general_accuracy"] * part["n_general"],
        )
        values = {
            cell: np.stack([_draw(draw, names) for _, draw in rows.groupby("seed")], axis=1)
            for cell, rows in table.groupby(["mask", "ratio"], sort=False)
        }
        if ("none", 0.0) not in values:
            raise InputError("mask 'none': no row; PSS is relative to the accuracy without a mask")
        order = sorted(values, key=lambda cell: (MASKS.index(cell[0]), cell[1]))
        draws = {mask: values[mask, ratio].shape[1] for mask, ratio in order}
        for mask, ratio in order:
            if values[mask, ratio].shape[1] != draws[mask]:
                raise InputError(f"mask {mask!r}, ratio {ratio}: not as many draws as other ratios")
        return cls(names, order, values)

    @property
    def none(self) -> np.ndarray:
        return self.values["none", 0.0].sum(axis=1, keepdims=True)


def _draw(rows: pd.DataFrame, names: list[str]) -> np.ndarray:
    """The counts of one mask, ratio and seed, `[4, concepts]`, a row for each concept."""
    place = "mask {mask!r}, ratio {ratio}, seed {seed}".format(**rows.iloc[0])
    twice = rows["concept"][rows["concept"].duplicated()]
    if len(twice):
        raise InputError(f"{place}: more than one row for {twice.iloc[0]!r}; keep one")
    missing = [name for name in names if name not in set(rows["concept"])]
    if missing:
        raise InputError(f"{place}: no row for {missing[0]!r}; measure it, or leave it out")
    columns = ["right_own", "n_concept", "right_general", "n_general"]
    return rows.set_index("concept").loc[names, columns].to_numpy(dtype=float).T


def _pooled(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C and G pooled over the last axis, concepts."""
    total = counts.sum(-1)
    return total[0] / total[1], total[2] / total[3]


def cell_statistics(none: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """`cell_statistics(counts.none, counts.values["concept", 0.05])["pss_pooled"]`.

    Args:
        none, counts: right answers and questions without and with a mask, `[4, draws, ...,
            concepts]`, as in `ConceptCounts`.

    Returns:
        Each statistic that `summarize` tells, `[draws, ...]`.
    """
    c0, g0 = _pooled(none)
    c, g = _pooled(counts)
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


def _peak_statistics(none: np.ndarray, *cells: np.ndarray) -> dict[str, np.ndarray]:
    each = [cell_statistics(none, counts) for counts in cells]
    return {
        "peak_pooled": np.max([one["pss_pooled"] for one in each], axis=0),
        "peak_per_concept": np.max([one["pss_per_concept"] for one in each], axis=0),
    }


def _with_intervals(
    counts: ConceptCounts,
    cells: list[tuple[str, float]],
    statistics: Callable[..., dict[str, np.ndarray]],
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """Each statistic, the mean over draws, and its 95 % interval over resampled concepts."""
    tables = [counts.none, *(counts.values[cell] for cell in cells)]
    point = {name: values.mean(axis=0) for name, values in statistics(*tables).items()}

    def resampled(sample: np.ndarray, axis: int) -> np.ndarray:
        values = statistics(*(table[..., sample] for table in tables)).values()
        return np.stack([value.mean(axis=0) for value in values])

    row = {name: float(value) for name, value in point.items()}
    bounds = _interval(resampled, len(counts.names), resamples, seed)
    low, high = (np.broadcast_to(bound, len(point)).tolist() for bound in bounds)
    row |= {f"{name}_low": value for name, value in zip(point, low, strict=True)}
    row |= {f"{name}_high": value for name, value in zip(point, high, strict=True)}
    return row


def _interval(
    statistic: Callable[..., np.ndarray], concepts: int, resamples: int, seed: int
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Bounds of the 95 % bootstrap interval of a statistic of concept indices `[..., concepts]`."""
    from scipy import stats  # half a second, of which workers have no use

    if concepts < 2:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        # Where G(0) is 0 a ratio is not a number, and so are its bounds.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (np.arange(concepts),),
            statistic,
            n_resamples=resamples,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return interval.low, interval.high


def _floors(counts: ConceptCounts, cell: tuple[str, float]) -> dict[str, float]:
    own_right, own, general_right, general = counts.values[cell]
    accuracy = (own_right.sum() + general_right.sum()) / (own.sum() + general.sum())
    base = float(_pooled(counts.none)[1].item())
    # All draws of a control meet the same questions: the floor is that of one.
    pooled, per_concept = sampling_floor(own[0].astype(int), general[0].astype(int), accuracy)
    # sampling_floor divides by the accuracy under the mask; PSS divides by G(0).
    scale = accuracy / base if base > 0 else float("nan")
    return {"floor_pooled": pooled * scale, "floor_per_concept": per_concept * scale}


def verdict(*lows: float, measured: bool = True) -> str:
    """`verdict(interval_low, other_low)`: whether a claim that something rises holds in this run.

    Args:
        lows: the lower bounds of the 95 % intervals of all that the claim says rises. One that is
            missing (not a number) is a condition that this run did not measure: it supports
            nothing, and without it the claim is neither reproduced nor not.
        measured: False if the run did not measure what the claim is about.
    """
    if not measured or not lows or np.isnan(lows).any():
        return "not run here"
    return "reproduced" if min(lows) > 0 else "not reproduced"


def best_general_change(
    pss: pd.DataFrame, ratios: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """`best_general_change(study.pss, [0.05, 0.1])`: the largest G(k) - G(0), with its interval.

    The best of several ratios is the best by luck, too, and its own interval knows nothing of
    that. So in each resample of concepts the maximum over the ratios is taken of how far a change
    lies from its measured value; the interval reaches down by the 97.5th percentile of these
    maxima, and up by that of the minima. If no ratio changes anything, it lies above zero in 2.5 %
    of all studies, however many ratios there are.

    Args:
        pss: rows of one model and protocol.
        ratios: those among which the best is chosen, of the concepts' own masks.

    Returns:
        `ratio`, `value`, `low` and `high`; the bounds are not numbers with a single concept.
    """
    counts = ConceptCounts.of(pss)
    concepts = len(counts.names)
    draw = np.random.default_rng(seed)
    samples = draw.integers(concepts, size=(resamples, concepts))
    samples = np.concatenate([np.arange(concepts)[None], samples])
    changes = np.stack(
        [
            cell_statistics(
                counts.none[..., samples], counts.values["concept", ratio][..., samples]
            )["general_change"].mean(axis=0)
            for ratio in ratios
        ]
    )
    best = int(changes[:, 0].argmax())
    value = float(changes[best, 0])
    row = {"ratio": float(ratios[best]), "value": value, "low": np.nan, "high": np.nan}
    if concepts > 1:
        luck = changes[:, 1:] - changes[:, :1]
        row["low"] = value - float(np.percentile(luck.max(axis=0), 97.5))
        row["high"] = value - float(np.percentile(luck.min(axis=0), 2.5))
    return row
