"""What ways of training do to a model: means over runs and seeds, in resamples.

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

# What is told of a way of training, and how the book calls it.
MEASURES = {
    "multiple choice": "accuracy (acc_norm) on the concepts trained on",
    "open-ended": "exact match with an alias, on the concepts trained on",
    "PSS pooled": "peak over the ratios of |G(k) - C(k)| / G(0), pooled over concepts",
    "PSS, random masks": "the same under random masks of the same size",
    "PSS per concept": "peak of the mean over concepts of |G(k) - C(k)| / G(0)",
    "diff. in diff.": "peak of ((G(k) - C(k)) - (G(0) - C(0))) / G(0), pooled",
    "other concepts": "accuracy (acc_norm) on concepts not trained on",
    "statements": "nats a token of statements on concepts not trained on",
    "prose": "nats a token of English prose",
}

PEAKS = {
    "PSS pooled": "peak_pss",
    "PSS, random masks": "peak_null",
    "PSS per concept": "peak_per_concept",
    "diff. in diff.": "peak_did",
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

    All runs are asked the same, so a resample draws units once for all of them, and differences
    between runs are paired.

    Args:
        table: rows of one run each (`run`), all runs having the same units.
        value: the column that is averaged, over rows; with `weight`, its sum over that of `weight`.
        unit: what stays together in a resample.

    Returns:
        Draws whose `models` are the runs, with the one measure `value`.

    Raises:
        InputError: if a run lacks a unit that another has.
    """
    weights = table[weight] if weight else pd.Series(1.0, index=table.index)
    frame = pd.DataFrame(
        {"run": table["run"], "unit": table[unit], "value": table[value], "weight": weights}
    )
    sums = frame.groupby(["run", "unit"], sort=False).sum()
    wide = sums.unstack("run")
    if wide.isna().any(axis=None):
        run = wide.columns[wide.isna().any()][0][1]
        raise InputError(f"run {run!r}: lacks a {unit} that another run has; ask all the same")
    names = tuple(dict.fromkeys(table["run"]))
    top = wide["value"][list(names)].to_numpy(dtype=float)
    bottom = wide["weight"][list(names)].to_numpy(dtype=float)
    samples = resample(len(top), resamples, seed)
    return Draws(names, {value: top[samples].sum(1) / bottom[samples].sum(1)})


def over_seeds(draws: Draws, runs: Sequence[str], measure: str, *, seed: int = 0) -> np.ndarray:
    """`over_seeds(draws, ["FT-PV/0", "FT-PV/1"], "correct_norm")`: `[1 + resamples]`.

    The mean over the seeds of a method; in each resample of units, seeds are drawn anew as well,
    the same ones for any list of as many runs, so that differences stay paired. With one seed
    only, what seeds do is not in the interval.
    """
    values = draws.of(measure)[:, [draws.index(run) for run in runs]]
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

    `interval(measures["open-ended"]["FT-PV"] - measures["open-ended"]["FT-RV"])` is a paired
    difference: both have the same resampled concepts (or texts), and the same resampled seeds.

    Args:
        study: what `measure_runs` gives, a `CausalStudy`.
        names: of the runs: the original, and each method at the same seeds.

    Returns:
        For each of `MEASURES` that was taken, and each method, `[1 + resamples]`.
    """
    method_of = study.runs.set_index("run").loc[list(names), "method"].to_dict()
    trained, tokens = study.answers["trained"], {"weight": "tokens", "unit": "text"}
    texts = dict(iter(study.texts.groupby("kind"))) if len(study.texts) else {}
    none = study.texts.iloc[:0]
    tables = {
        "multiple choice": (study.answers[trained], "correct_norm", {}),
        "other concepts": (study.answers[~trained], "correct_norm", {}),
        "open-ended": (study.generated, "correct", {}),
        "statements": (texts.get("statements", none), "nats", tokens),
        "prose": (texts.get("prose", none), "nats", tokens),
    }
    drawn: dict[str, tuple[Draws, str]] = {}
    for title, (table, value, options) in tables.items():
        if len(table) and table["run"].isin(method_of).any():
            table = table[table["run"].isin(method_of)]
            draws = resample_runs(table, value, resamples=resamples, seed=seed, **options)
            drawn[title] = draws, value
    if len(study.pss):
        masked = study.pss[study.pss["model"].isin(method_of)]
        draws = resample_models(masked, resamples=resamples, seed=seed)
        drawn |= {title: (draws, measure) for title, measure in PEAKS.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for title, (draws, measure) in drawn.items():
        methods: dict[str, list[str]] = {}
        for name in draws.models:
            methods.setdefault(method_of[name], []).append(name)
        found[title] = {
            method: over_seeds(draws, runs, measure, seed=seed) for method, runs in methods.items()
        }
    return {name: found[name] for name in MEASURES if name in found}
