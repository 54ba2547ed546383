"""Estimates that know how far each concept moves them, and their 95 % intervals.

    index, accuracy = means(answers, "correct_norm", ["mask", "ratio"])   # a mean per cell
    rise = accuracy[1] - accuracy[0]                                      # paired, as all are
    rise.interval()                                                       # {"value", "low", "high"}

Concepts are the sample: an answer belongs to the concept that its question is about, whatever mask
it was given under, and answers to questions on one concept are not independent. So a mean comes
with its *moves*: how far the answers on each concept move it from the mean of all (its influence
values, or empirical influence function). A function of means moves by the chain rule, which is what
the operators below do. The variance is the sum of the squared moves, times n / (n - 1): the
cluster-robust variance of the delta method (Liang and Zeger 1986; Cameron and Miller 2015).
Quantiles are Student's with n - 1 degrees of freedom, n the concepts of the cell that has fewest.

The appendix *How sure* of the book shows, by simulation, how often each kind covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

TAIL = 0.025  # of a 95 % interval
LONG = 1e6  # numbers from here on are written with their power of ten
Interval = dict[str, float]


@dataclass(frozen=True)
class Estimates:
    """Values and their moves; arithmetic on them is element by element, and paired by concept.

    Attributes:
        values: of any shape, `[...]`.
        moves: of each by each concept, `[concepts, ...]`; they add up to zero.
        count: the concepts behind a value; the fewest, if they differ.
    """

    values: np.ndarray
    moves: np.ndarray
    count: int

    def __getitem__(self, place: object) -> Estimates:
        """`estimates[2]`, `estimates[[0, 3]]`, `estimates[:, 1]`: as numpy does."""
        at = place if isinstance(place, tuple) else (place,)
        return Estimates(self.values[at], self.moves[(slice(None), *at)], self.count)

    def __add__(self, other: Estimates | ArrayLike) -> Estimates:
        a, b, da, db, count = self._with(other)
        return Estimates(a + b, da + db, count)

    def __mul__(self, other: Estimates | ArrayLike) -> Estimates:
        a, b, da, db, count = self._with(other)
        return Estimates(a * b, da * b + a * db, count)

    def __truediv__(self, other: Estimates | ArrayLike) -> Estimates:
        """Of a division by zero, the value and its bounds are not numbers."""
        a, b, da, db, count = self._with(other)
        b = np.where(b == 0, np.nan, b)
        return Estimates(a / b, (da - a / b * db) / b, count)

    def __neg__(self) -> Estimates:
        return self * -1.0

    def __sub__(self, other: Estimates | ArrayLike) -> Estimates:
        return self + (-other if isinstance(other, Estimates) else -np.asarray(other))

    def _with(
        self, other: Estimates | ArrayLike
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Values and moves of both, with as many axes; a plain number has no moves."""
        if not isinstance(other, Estimates):
            plain = np.asarray(other, dtype=float)
            other = Estimates(plain, np.zeros((1, *plain.shape)), self.count)
        axes = max(self.values.ndim, other.values.ndim)
        mine, theirs = (
            one.moves.reshape(-1, *[1] * (axes - one.values.ndim), *one.values.shape)
            for one in (self, other)
        )
        return self.values, other.values, mine, theirs, min(self.count, other.count)

    def mean(self, axis: int = 0) -> Estimates:
        """The mean over an axis of the values."""
        return Estimates(self.values.mean(axis), self.moves.mean(axis + 1), self.count)

    def errors(self) -> np.ndarray:
        """Standard errors; not numbers, where a single concept or no variation shows none."""
        spread = np.sqrt((self.moves**2).sum(axis=0))
        scale = math.sqrt(self.count / (self.count - 1)) if self.count > 1 else np.nan
        return np.where(spread > 1e-12, spread * scale, np.nan)

    def bounds(self, tail: float = TAIL) -> tuple[np.ndarray, np.ndarray]:
        """`low, high`, each with a chance of `tail` to be on the wrong side of the truth."""
        reach = self.errors() * quantile(self.count, tail)
        return self.values - reach, self.values + reach

    def interval(self) -> Interval:
        """`{"value": ..., "low": ..., "high": ...}` of a single value."""
        return _interval(self.values, *self.bounds())


def stack(estimates: Sequence[Estimates]) -> Estimates:
    """`stack([one, other])`: of one shape and the same concepts, along a new first axis."""
    values = np.stack([one.values for one in estimates])
    moves = np.stack([one.moves for one in estimates], axis=1)
    return Estimates(values, moves, min(one.count for one in estimates))


def means(
    table: pd.DataFrame,
    value: str,
    by: Sequence[str],
    *,
    unit: str = "concept",
    weight: str | None = None,
    units: Sequence[str] | None = None,
) -> tuple[pd.MultiIndex, Estimates]:
    """`cells, estimates = means(answers, "correct_norm", ["mask", "ratio"])`.

    Args:
        table: a row per answer.
        value: the column to average; with `weight`, its sum over the sum of that column.
        by: columns that make the cells; values are in the order of the cells, sorted.
        unit: the column of what is sampled.
        units: its values, in an order of which all estimates that are compared need the same;
            those of the table, sorted, if not given.
    """
    weighted = table.assign(weight=table[weight] if weight else 1.0, value=table[value])
    sums = weighted.groupby([*by, unit], sort=True)[["value", "weight"]].sum().unstack(unit)
    count = int(sums["weight"].notna().sum(axis=1).min())
    named = sorted(set(table[unit])) if units is None else list(units)
    top, bottom = (
        sums[part].reindex(columns=named).fillna(0.0).to_numpy() for part in ("value", "weight")
    )
    whole = bottom.sum(axis=1, keepdims=True)
    values = top.sum(axis=1, keepdims=True) / whole
    moves = (top - values * bottom) / whole
    index = pd.MultiIndex.from_frame(sums.index.to_frame(index=False))
    return index, Estimates(values[:, 0], moves.T, count)


def quantile(count: int, tail: float = TAIL) -> float:
    """The quantile of Student's t with `count` - 1 degrees of freedom."""
    from scipy import stats  # takes half a second, and workers do without it

    return float(stats.t.isf(tail, count - 1)) if count > 1 else float("nan")


def share(estimate: Estimates, asked: int) -> Interval:
    """`share(accuracy, len(answers))`: Wilson's interval, of a mean of rights and wrongs.

    Near 0 and 1 an interval that is symmetric covers too little. Wilson's is given the number of
    independent answers that have this variance, p (1 - p) / variance (Korn and Graubard 1998): at
    most those `asked`; the number of concepts, if all are right or all wrong. Of one concept it is
    the number asked, and the interval speaks of that concept alone.
    """
    p, error = float(estimate.values), float(estimate.errors())
    many: float = estimate.count if estimate.count > 1 else asked
    if not math.isnan(error):
        many = min(p * (1 - p) / error**2, asked)
    t = quantile(estimate.count if estimate.count > 1 else asked)
    middle, scale = (p + t**2 / (2 * many)) / (1 + t**2 / many), t / (1 + t**2 / many)
    reach = scale * math.sqrt(max(p * (1 - p), 0) / many + t**2 / (4 * many**2))
    return _interval(p, max(middle - reach, 0.0), min(middle + reach, 1.0))


def absolute(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of |x|, from that of x: above zero only where that of x leaves zero out."""
    return np.maximum(np.maximum(low, -high), 0 * low), np.maximum(abs(low), abs(high))


def largest(estimates: Estimates, *, signed: bool = False) -> Interval:
    """`largest(gaps)`: the interval of the maximum of [n] absolute values, or of signed ones.

    A maximum of noisy values is too high. The interval allows for it: its low bound is the highest
    of the values' low bounds when all of them hold together (Sidak), and its high bound the highest
    of the high bounds.
    """
    lows, _ = _folded(estimates, 1 - (1 - TAIL) ** (1 / len(estimates.values)), signed)
    _, highs = _folded(estimates, TAIL, signed)
    values = estimates.values if signed else abs(estimates.values)
    return _interval(values.max(), lows.max(), highs.max())


def _folded(estimates: Estimates, tail: float, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    bounds = estimates.bounds(tail)
    return bounds if signed else absolute(*bounds)


def mean_of(intervals: Sequence[Mapping[str, float]]) -> Interval:
    """The mean of values that go together, as the draws of a control: its bounds are the means."""
    return _interval(
        *(np.mean([one[key] for one in intervals]) for key in ("value", "low", "high"))
    )


def pooled(intervals: Sequence[Mapping[str, float]]) -> Interval:
    """The mean of independent values, as of models that are asked about different concepts."""
    mean = mean_of(intervals)
    below, above = (
        math.hypot(*(one[end] - one["value"] for one in intervals)) / len(intervals)
        for end in ("low", "high")
    )
    return _interval(mean["value"], mean["value"] - below, mean["value"] + above)


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Interval:
    """`difference(peak, null)`: of two values of which only intervals are known.

    As if they were independent (MOVER: Zou and Donner 2008), which is too wide for paired ones.
    """
    value = one["value"] - other["value"]
    below = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return _interval(value, value - below, value + above)


def over_seeds(*models: Estimates) -> Interval:
    """`over_seeds(runs)`: the mean of [seeds] runs on the same concepts, a sample of seeds.

    Of several models, each with its own runs, it is the mean of their means. Its variance is made
    of those over concepts and over seeds of each model, with Satterthwaite's degrees of freedom.
    With one seed, the interval leaves out the variance of seeds.
    """
    means, parts, freedoms = [runs.mean() for runs in models], [], []
    for runs, mean in zip(models, means, strict=True):
        parts.append(float(np.nan_to_num(mean.errors() ** 2)))  # without variation over concepts, 0
        freedoms.append(max(mean.count - 1, 1))
        if (seeds := len(runs.values)) > 1:
            parts.append(runs.values.var(ddof=1) / seeds)
            freedoms.append(seeds - 1)
    value, total = np.mean([mean.values for mean in means]), sum(parts)
    if not total > 0:
        return _interval(value, np.nan, np.nan)
    freedom = total**2 / (np.square(parts) / freedoms).sum()
    from scipy import stats  # takes half a second, and workers do without it

    reach = stats.t.isf(TAIL, freedom) * math.sqrt(total) / len(models)
    return _interval(value, value - reach, value + reach)


def told(name: str, interval: Interval) -> dict[str, float]:
    """`told("did", interval)`: its numbers as the columns `did`, `did_low` and `did_high`."""
    return {
        name: interval["value"],
        f"{name}_low": interval["low"],
        f"{name}_high": interval["high"],
    }


def interval_of(row: Mapping[str, float], name: str = "value") -> Interval:
    """`interval_of(row, "did")`: back from such columns, or from `value`, `low` and `high`."""
    before = "" if name == "value" else f"{name}_"
    return _interval(row[name], row[f"{before}low"], row[f"{before}high"])


def with_interval(row: Mapping[str, float], measure: str = "value", form: str = ".2f") -> str:
    """A value with its interval, as `+0.12 [+0.03, +0.20]`, with no-break spaces.

    >>> with_interval({"value": 0.123, "low": 0.03, "high": 0.2}, form="+.2f")
    '+0.12\\xa0[+0.03,\\xa0+0.20]'

    Args:
        row: `measure`, `measure_low` and `measure_high`; or `value`, `low` and `high`.
        form: of each number.
    """
    numbers = interval_of(row, measure).values()
    value, low, high = (format(one, form if abs(one) < LONG else ".1e") for one in numbers)
    if "nan" in (low, high):
        return value if value == "nan" else f"{value}\u00a0[no\u00a0interval]"
    return f"{value}\u00a0[{low},\u00a0{high}]"


def _interval(value: Any, low: Any, high: Any) -> Interval:
    return {"value": float(value), "low": float(low), "high": float(high)}
