"""Effects of ways of training on a model: means over runs and seeds, in resamples.

measures = measure_methods(study, names)
interval(measures["open-ended"]["FT-PV"] - measures["open-ended"]["FT-RV"])    # paired
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from paramspec.errors import InputError
from paramspec.stats.bootstrap import Draws, resample
from paramspec.stats.trends import resample_models

# The table, the column and the rows of each measure. Peaks are over the ratios.
MEASURES: dict[str, tuple[str, str, dict[str, object]]] = {
    "multiple choice": ("answers", "correct_norm", {"trained": True}),
    "open-ended": ("generated", "correct", {}),  # exact match with an alias
    "PSS pooled": ("pss", "peak_pss", {}),
    "PSS, random masks": ("pss", "peak_null", {}),
    "PSS per concept": ("pss", "peak_per_concept", {}),
    "diff. in diff.": ("pss", "peak_did", {}),
    "other concepts": ("answers", "correct_norm", {"trained": False}),
    "statements": ("texts", "nats", {"kind": "statements"}),  # nats per token; other concepts
    "prose": ("texts", "nats", {"kind": "prose"}),
}


def resample_runs(
    table: pd.DataFrame,
    value: str,
    *,
    weight: str | None = None,
    unit: str = "concept",
    resamples: int = 1000,
    seed: int = 0,
) -> Draws:
    """`draws = resample_runs(study.answers, "correct_norm")`: each run's mean, in resamples.

    A resample draws units once for all runs, so that differences between runs are paired. The mean
    is over rows; with `weight`, the sum of `value` over the sum of `weight`.
    """
    weights = table[weight] if weight else 1.0
    each = table.assign(weights=weights).groupby(["run", unit], sort=False)[[value, "weights"]]
    wide = each.sum().unstack("run")
    if wide.isna().any(axis=None):
        run = wide.columns[wide.isna().any()][0][1]
        raise InputError(f"run {run!r}: lacks a {unit} that another run has; ask all the same")
    names = tuple(dict.fromkeys(table["run"]))
    top, bottom = (wide[part][list(names)].to_numpy(dtype=float) for part in (value, "weights"))
    samples = resample(len(top), resamples, seed)
    return Draws(names, {value: top[samples].sum(1) / bottom[samples].sum(1)})


def over_seeds(draws: Draws, runs: Sequence[str], measure: str, *, seed: int = 0) -> np.ndarray:
    """`over_seeds(draws, ["FT-PV/0", "FT-PV/1"], "correct_norm")`: the mean, `[1 + resamples]`.

    Each resample of units draws seeds anew as well, the same ones for any list of as many runs, so
    that differences stay paired. With one seed, the interval leaves out the variance of seeds.
    """
    values = draws.of(measure, runs)
    chosen = resample(len(runs), len(values), seed)[1:]
    chosen[0] = np.arange(len(runs))
    return np.take_along_axis(values, chosen, axis=1).mean(axis=1)


def measure_methods(
    study: Any, names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """`measures = measure_methods(study, names)`: by measure and method, in resamples.

    >>> training = Training(method="FT-PV", concepts=("alpha",), epochs=1)
    >>> runs = causal_runs(training, Evaluation(others=5), seeds=1)
    >>> study = measure_runs("my-checkpoint/", questions, runs, store=Store("results/store"))
    >>> measures = measure_methods(study, [run.name for run in runs])
    >>> gain = measures["multiple choice"]["FT-PV"] - measures["multiple choice"]["original"]
    >>> sorted(interval(gain))
    ['high', 'low', 'value']

    Differences are paired: all have the same resampled concepts (or texts), and the same
    resampled seeds.

    Args:
        study: a `CausalStudy`, from `measure_runs`.
        names: of the runs: the original, and each method at the same seeds.

    Returns:
        For each measure of `MEASURES` that the study has, and each method, `[1 + resamples]`.
    """
    method_of = study.runs.set_index("run")["method"]
    given: dict[str, Any] = {"resamples": resamples, "seed": seed}
    peaks: Draws | None = None
    found = {}
    for title, (source, value, wanted) in MEASURES.items():
        table = getattr(study, source)
        for column, one in wanted.items() if len(table) else ():  # one not taken has no columns
            table = table[table[column] == one]
        table = table[table["run"].isin(names)] if len(table) else table
        if not len(table):
            continue
        if source == "pss":
            draws = peaks = peaks or resample_models(table, **given)
        else:
            by_token = {"weight": "tokens", "unit": "text"} if source == "texts" else {}
            draws = resample_runs(table, value, **given | by_token)
        seeds: dict[str, list[str]] = {}
        for run in draws.models:
            seeds.setdefault(method_of[run], []).append(run)
        found[title] = {
            method: over_seeds(draws, runs, value, seed=seed) for method, runs in seeds.items()
        }
    return found
