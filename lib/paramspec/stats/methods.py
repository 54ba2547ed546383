"""Effects of ways of training on a model: means over seeds, and paired differences.

measure_methods(study, names)                       # a row per measure and method
measure_methods(study, names, minuend="FT-PV")      # FT-PV minus each other one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from paramspec.errors import InputError
from paramspec.stats.estimates import Estimates, Interval, mean_of, means, over_seeds, stack
from paramspec.stats.trends import Measures, measure_models

# The table, the column and the rows of each measure.
MEASURES: dict[str, tuple[str, str, dict[str, object]]] = {
    "multiple choice": ("answers", "correct_norm", {"trained": True}),
    "open-ended": ("generated", "correct", {}),  # exact match with an alias
    "diff. in diff.": ("details", "did", {}),  # the mean over the ratios
    "the same, random masks": ("details", "null_did", {}),
    "PSS pooled": ("details", "peak_pss", {}),  # a peak over the ratios, as are those below
    "PSS, random masks": ("details", "null_peak_pss", {}),
    "PSS per concept": ("details", "peak_per_concept", {}),
    "other concepts": ("answers", "correct_norm", {"trained": False}),
    "statements": ("texts", "nats", {"kind": "statements"}),  # nats per token; other concepts
    "prose": ("texts", "nats", {"kind": "prose"}),
}


def run_means(
    table: pd.DataFrame, value: str, *, weight: str | None = None, unit: str = "concept"
) -> dict[str, Estimates]:
    """`run_means(study.answers, "correct_norm")["FT-PV/0"]`: each run's mean, paired by concept.

    With `weight`, the sum of `value` over the sum of `weight`. `unit` is what was sampled.

    Raises:
        InputError: if a run lacks a unit that another run has.
    """
    asked = table.groupby(["run", unit]).size().unstack()
    if asked.isna().any(axis=None):
        run = asked.index[asked.isna().any(axis=1)][0]
        raise InputError(f"run {run!r}: lacks a {unit} that another run has; ask all the same")
    index, found = means(table, value, ["run"], unit=unit, weight=weight)
    return {run: found[place] for place, (run,) in enumerate(index)}


def best_rates(study: Any) -> dict[str, float]:
    """`best_rates(study)["FT-PV"]`: of each method the learning rate, of those in the study, at
    which the statements that were left out of the training lose the fewest nats per token.
    """
    texts = study.texts[study.texts["kind"] == "left out"]
    sums = texts.groupby("run")[["nats", "tokens"]].sum()
    losses = sums["nats"] / sums["tokens"]
    runs = study.runs.set_index("run").assign(loss=losses).dropna(subset=["loss"])
    best = runs.loc[runs.groupby("method")["loss"].idxmin()]
    return dict(zip(best["method"], best["learning_rate"], strict=True))


def measure_methods(
    study: Any, names: Sequence[str], *, minuend: str | None = None
) -> pd.DataFrame:
    """`measure_methods(study, names)`: a row per measure and method, with its interval.

    >>> training = Training(method="FT-PV", concepts=("alpha",), epochs=1)
    >>> runs = causal_runs(training, Evaluation(others=5), seeds=1)
    >>> study = measure_runs("my-checkpoint/", questions, runs, store=Store("results/store"))
    >>> gains = measure_methods(study, [run.name for run in runs], minuend="FT-PV")
    >>> list(gains.columns)
    ['measure', 'method', 'value', 'low', 'high']

    Args:
        study: a `CausalStudy`, from `measure_runs`.
        names: of the runs: the original, and each method at the same seeds.
        minuend: a method: each other one is subtracted from it, on the same concepts (or texts) and
            at the same seeds. Peaks have no differences.

    Returns:
        The measures of `MEASURES` that the study has: means over seeds. Intervals are over concepts
        (or texts) and seeds, see `estimates.over_seeds`; of a peak, over concepts.
    """
    runs_of, rows = _runs_of(study, names), []
    for measure, found in _measures(study, names).items():
        for method, interval in _by_method(found, runs_of, minuend).items():
            rows.append({"measure": measure, "method": method, **interval})
    return pd.DataFrame(rows, columns=["measure", "method", "value", "low", "high"])


def ahead_over_models(
    studies: Mapping[str, tuple[Any, Sequence[str]]], measure: str, minuend: str
) -> dict[str, Interval]:
    """`ahead_over_models({"a": (study, names)}, "multiple choice", "FT-PV")["FT-RV"]`: how far a
    method is above each other one, in the mean over models and seeds.
    """
    gaps = [
        _seeds(_measures(study, names)[measure], _runs_of(study, names), minuend)
        for study, names in studies.values()
    ]
    return {method: over_seeds(*(each[method] for each in gaps)) for method in gaps[0]}


Found = Mapping[str, Estimates] | Mapping[str, Interval]  # by run


def _measures(study: Any, names: Sequence[str]) -> dict[str, Found]:
    """Each of `MEASURES` that the study has, by run."""
    specialized: Measures | None = None
    found: dict[str, Found] = {}
    for measure, (source, value, wanted) in MEASURES.items():
        table = getattr(study, source)
        for column, one in wanted.items() if len(table) else ():  # one not taken has no columns
            table = table[table[column] == one]
        table = table[table["run"].isin(names)] if len(table) else table
        if not len(table):
            continue
        if source != "details":
            by_token: dict[str, Any] = {"weight": "tokens", "unit": "text"}
            found[measure] = run_means(table, value, **(by_token if source == "texts" else {}))
            continue
        specialized = specialized or measure_models(table.assign(model=table["run"]))
        if value in specialized.linear:
            found[measure] = {run: specialized.of(value, [run])[0] for run in specialized.models}
        elif value in specialized.peaks:
            found[measure] = dict(zip(specialized.models, specialized.peaks[value], strict=True))
    return found


def _runs_of(study: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """The runs of each method among these."""
    runs_of: dict[str, list[str]] = {}
    for run, method in study.runs.set_index("run")["method"].items():
        if run in set(names):
            runs_of.setdefault(method, []).append(run)
    return runs_of


def _by_method(
    found: Found, runs_of: Mapping[str, Sequence[str]], minuend: str | None
) -> dict[str, Interval]:
    """The mean over seeds of each method, or of what `minuend` is above it at each seed."""
    if not isinstance(next(iter(found.values())), Estimates):
        seeds: dict[str, list[Any]] = {
            method: [found[run] for run in runs] for method, runs in runs_of.items()
        }
        return {} if minuend else {method: mean_of(each) for method, each in seeds.items()}
    return {method: over_seeds(one) for method, one in _seeds(found, runs_of, minuend).items()}


def _seeds(
    found: Mapping[str, Any], runs_of: Mapping[str, Sequence[str]], minuend: str | None
) -> dict[str, Estimates]:
    """[seeds] of each method, or of what `minuend` is above it."""
    each = {method: stack([found[run] for run in runs]) for method, runs in runs_of.items()}
    if minuend is None:
        return each
    return {method: each[minuend] - one for method, one in each.items() if method != minuend}
