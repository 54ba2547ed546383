"""The bootstrap: resamples, values in each resample, and the intervals of these values.

samples = resample(len(concepts), 1000, seed)     # [1 + resamples, concepts], row 0 as measured
interval(values[samples].mean(axis=1))            # {"value": ..., "low": ..., "high": ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def resample(count: int, resamples: int, seed: int) -> np.ndarray:
    """Indices of concepts, texts or runs, `[1 + resamples, count]`: row 0 is the sample itself."""
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    return np.concatenate([np.arange(count)[None], drawn])


@dataclass(frozen=True)
class Draws:
    """Values of every model (or run): `values[measure]` is `[1 + resamples, models]`.

    The first row is the measured one. A measure whose masks the study lacks is absent.
    """

    models: tuple[str, ...]
    values: Mapping[str, np.ndarray]

    def of(self, measure: str, models: Sequence[str] | None = None) -> np.ndarray:
        """`draws.of("accuracy", ["zoo-llama-1"])`: `[1 + resamples, models]`, by default all."""
        values, places = self.values[measure], {name: n for n, name in enumerate(self.models)}
        return values if models is None else values[:, [places[name] for name in models]]


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`low, high = percentiles(resamples)`: the bounds that hold 95 % of `[resamples, ...]`.

    A resample without a value (not a number) is not left out, because the others are not a fair
    sample of all: it counts as lower than all others for `low`, and as higher for `high`. A bound
    that falls among such resamples is not a number. Infinite values are values.
    """
    if not len(values):
        return np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)

    def upper(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(values, axis=0)  # missing values come last
        place = 0.975 * (len(ordered) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        share = place - math.floor(place)
        with np.errstate(invalid="ignore"):
            between = below + share * (above - below)
        return np.where(below == above, below, between) if share else below

    return -upper(-values), upper(values)


def interval(values: np.ndarray) -> dict[str, float]:
    """The first of `[1 + resamples]` values, and the 95 % interval of the others.

    >>> interval(np.concatenate([[7.0], np.arange(1001)]))
    {'value': 7.0, 'low': 25.0, 'high': 975.0}
    """
    low, high = percentiles(values[1:])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def with_interval(row: Mapping[str, float], measure: str = "value", form: str = ".2f") -> str:
    """A value with its interval, as `+0.12 [+0.03, +0.20]`, with no-break spaces.

    >>> with_interval({"value": 0.123, "low": 0.03, "high": 0.2}, form="+.2f")
    '+0.12\\xa0[+0.03,\\xa0+0.20]'

    Args:
        row: `measure`, `measure_low` and `measure_high`; or `value`, `low` and `high`.
        form: of each number.
    """
    bounds = ("low", "high") if measure == "value" else (f"{measure}_low", f"{measure}_high")
    value, low, high = (format(row[key], form) for key in (measure, *bounds))
    return f"{value}\u00a0[{low},\u00a0{high}]"
