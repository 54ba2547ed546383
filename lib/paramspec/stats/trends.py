"""PSS over many models: their measures, trends over them, contrasts.

    measures = measure_models(study.details)                # all on the same concepts
    model_table(measures)                                   # a row per model, with intervals
    trend(measures, x="accuracy", y="did")                  # slope and correlation
    contrast(measures, "zoo-llama-5", "zoo-llama-1")

All models are asked the same questions, so their values move together when a concept is left out:
differences and trends are paired by concept (paper, sections 4.1 to 4.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.stats.estimates import (
    Estimates,
    Interval,
    difference,
    mean_of,
    quantile,
    share,
    stack,
    told,
)
from paramspec.stats.summary import BARE, Cells
from paramspec.tables import TIERS

LIKE_SIZED = 1.25  # the largest ratio of parameter counts of two models of like size


@dataclass(frozen=True)
class Measures:
    """Measures of models on the same concepts, from `measure_models`.

    Attributes:
        models: their names.
        linear: `[models]` of each measure that is a smooth function of accuracies.
        peaks: of each measure that is a maximum, an interval for each model.
        asked: the number of own questions without a mask, of each model.
        chances: of a guess to be right, of each model.
    """

    models: tuple[str, ...]
    linear: Mapping[str, Estimates]
    peaks: Mapping[str, tuple[Interval, ...]]
    asked: tuple[int, ...]
    chances: tuple[float, ...]

    def of(self, measure: str, models: Sequence[str] | None = None) -> Estimates:
        """`measures.of("did", ["zoo-llama-1"])`: `[models]`, by default all."""
        return self.linear[measure][self._places(models)]

    def values(self, measure: str, models: Sequence[str] | None = None) -> np.ndarray:
        """The values of any measure, peaks among them."""
        if measure in self.linear:
            return self.of(measure, models).values
        return np.array([self.peaks[measure][place]["value"] for place in self._places(models)])

    def interval(self, measure: str, model: str) -> Interval:
        """The value of a measure, with its bounds."""
        (place,) = self._places([model])
        if measure in self.peaks:
            return self.peaks[measure][place]
        one = self.linear[measure][place]
        return share(one, self.asked[place]) if measure == "accuracy" else one.interval()

    def _places(self, models: Sequence[str] | None) -> list[int]:
        return [self.models.index(name) for name in (self.models if models is None else models)]


def measure_models(details: pd.DataFrame, concepts: Sequence[str] | None = None) -> Measures:
    """`measures = measure_models(study.details)`: what trends over models are made of.

    >>> measures = measure_models(study.details)
    >>> measures.of("accuracy").values.shape == (len(measures.models),)
    True

    Args:
        details: answers of one protocol; every model has the same concepts.
        concepts: those whose masks count; all if not given. Measures of two groups of concepts can
            be subtracted.

    Returns:
        Of each model, without a mask: `accuracy`, on the concepts' own questions, and `ceiling`,
        the most that a loss of all knowledge could give, (G(0) - chance) / G(0). Then, as means
        over the ratios, which noise does not lift: `did`, the difference in differences; `pooled`,
        (G(k) - C(k)) / G(0) with its sign; and `per_concept`, the mean over concepts of
        |G(k) - C(k)| / G(0), which noise does lift; `did_undivided`, `did_over_own` and
        `did_over_masked`, with 1, C(0) and G(k) for the denominator; under random masks the same
        with `null_` before it; and with `excess_` the difference of the two. As maxima over the
        ratios: `peak_pss`, as the paper takes it, `peak_per_concept` and `peak_did`, and `null_`
        with each.

    Raises:
        InputError: if models have different concepts, or protocols are mixed.
    """
    if details["protocol"].nunique() != 1:
        raise InputError(f"protocols {sorted(set(details['protocol']))}: give the rows of one")
    units = sorted(set(details["concept"]) | set(details["mask_concept"]))
    if concepts is not None:
        details = details[details["mask_concept"].isin(concepts)]
    each: dict[str, Cells] = {}
    names: list[str] = []
    for model, part in details.groupby("model", sort=False):
        if each and sorted(set(part["mask_concept"])) != names:
            raise InputError(
                f"model {model!r}: measured on other concepts than {next(iter(each))!r}"
            )
        names = sorted(set(part["mask_concept"]))
        each[model] = Cells.of(part, units)
    return measures_of(list(each.values()), tuple(each))


def measures_of(each: Sequence[Cells], models: Sequence[str] | None = None) -> Measures:
    """`measures_of([cells], ["smollm2-135m"])`: from the accuracies of each."""
    linear, peaks = [_linear(cells) for cells in each], [_peaks(cells) for cells in each]
    return Measures(
        tuple(map(str, range(len(each))) if models is None else models),
        {name: stack([one[name] for one in linear]) for name in _common(linear)},
        {name: tuple(one[name] for one in peaks) for name in _common(peaks)},
        tuple(cells.asked[BARE][0] for cells in each),
        tuple(cells.chance for cells in each),
    )


def _common(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The measures that all models have: one that lacks random masks has no null."""
    return [name for name in found[0] if all(name in one for one in found)]


def _linear(cells: Cells) -> dict[str, Estimates]:
    own, general = cells.bare
    found = {"accuracy": own, "ceiling": (general - cells.chance) / general}
    measured, null = cells.over_ratios("concept"), cells.over_ratios("random")
    found |= measured
    found |= {f"null_{name}": one for name, one in null.items()}
    return found | {f"excess_{name}": measured[name] - null[name] for name in measured if null}


def _peaks(cells: Cells) -> dict[str, Interval]:
    names = {"pooled": "peak_pss", "per_concept": "peak_per_concept", "did": "peak_did"}
    found = {names[name]: one for name, one in cells.peaks("concept").items()}
    return found | {f"null_{names[name]}": one for name, one in cells.peaks("random").items()}


def model_table(measures: Measures, about: pd.DataFrame | None = None) -> pd.DataFrame:
    """`model_table(measures, about)`: a row per model, each measure with its 95 % interval.

    >>> table = model_table(measure_models(study.details))
    >>> bool((table["accuracy_low"] <= table["accuracy"]).all())
    True

    Args:
        measures: from `measure_models`.
        about: more columns, joined by `model`.

    Returns:
        `model`, `chance`, then for every measure the value, `_low` and `_high`.
    """
    rows = []
    for model, chance in zip(measures.models, measures.chances, strict=True):
        row: dict[str, object] = {"model": model, "chance": chance}
        for measure in (*measures.linear, *measures.peaks):
            row |= told(measure, measures.interval(measure, model))
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if about is None else table.merge(about, on="model", how="left", validate="1:1")


def trend(
    measures: Measures,
    *,
    y: str = "did",
    x: str | Sequence[float] = "accuracy",
    models: Sequence[str] | None = None,
    given: str | None = None,
    within: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """`trend(measures, x="accuracy", y="did")`: how one measure of the models follows another.

    >>> found = trend(measure_models(study.details))
    >>> found["n"], found["slope_low"] <= found["slope"] <= found["slope_high"]
    (3, True)

    Noise flattens a slope and weakens a correlation, and noise that two measures share feigns one.
    So variances and covariances over models are made of products of *different* concepts, in which
    no concept meets its own noise (a U-statistic of degree two). Intervals are those of the
    delete-one jackknife over concepts (Arvesen 1969).

    Args:
        measures: from `measure_models`.
        x, y: measures; or, for x, a number for each of the models (tokens, days, MMLU).
        models: those to correlate; all if not given.
        given: a measure to hold constant: the partial slope and correlation.
        within: the family of each model: trends within families, not between them.

    Returns:
        `n`; `slope`, of y over x, and `r`, both free of noise, each with `_low` and `_high`; and
        `pearson` and `spearman`, as measured. `r` is not a number where models differ by no more
        than noise. A peak has no slope and no `r`.

    Raises:
        InputError: with fewer than three models.
    """
    models = list(measures.models if models is None else models)
    if len(models) < 3:
        raise InputError(f"{len(models)} models: a correlation needs at least 3")
    seen = [measures.values(x, models) if isinstance(x, str) else np.asarray(x, dtype=float)]
    seen.append(measures.values(y, models))
    found = {"n": len(models), **_as_measured(*seen)}
    named = [x, y] + [given] * (given is not None)
    unknown = dict.fromkeys(("slope", "slope_low", "slope_high", "r", "r_low", "r_high"), np.nan)
    if any(isinstance(name, str) and name not in measures.linear for name in named):
        return found | unknown
    series = [measures.of(name, models) if isinstance(name, str) else seen[0] for name in named]
    groups = [within[model] for model in models] if within else [""] * len(models)
    return found | _without_noise(measures.of(y, models), series, groups)


def _as_measured(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from scipy import stats  # takes half a second, and workers do without it

    # Not a number, or the same but for rounding
    if not all(np.ptp(one) > 1e-12 * abs(one).max() for one in (x, y)):
        return {"pearson": np.nan, "spearman": np.nan}
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}


def _without_noise(
    like: Estimates, series: Sequence[Estimates | np.ndarray], groups: Sequence[str]
) -> dict[str, float]:
    """Slope and correlation of the first two of `series`, the others held constant."""
    size = len(like.moves)
    # What each concept says of each model, [concepts, measures, models]: its pseudo-values.
    said = np.stack(
        [
            one.values + size * one.moves if isinstance(one, Estimates) else np.tile(one, (size, 1))
            for one in series
        ],
        axis=1,
    )
    centre = said.mean(axis=0)  # [measures, models]
    for group in set(groups):
        at = [place for place, home in enumerate(groups) if home == group]
        said[:, :, at] -= said[:, :, at].mean(axis=2, keepdims=True)
    whole = said.sum(axis=0)
    each = np.einsum("cam,cbm->cab", said, said)
    moments = (whole @ whole.T - each.sum(axis=0)) / (size * (size - 1))
    without = whole - said
    left_out = np.einsum("cam,cbm->cab", without, without) - (each.sum(axis=0) - each)
    left_out /= (size - 1) * (size - 2)
    both = np.concatenate([moments[None], left_out])  # [1 + concepts, measures, measures]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = _inverse(both)
        slopes = -inverse[:, 0, 1] / inverse[:, 1, 1]
        varies = 1 / _inverse(both[:, 1:, 1:])[:, 0, 0]  # y over models, x left free
        # Both are negative where r, free of noise, comes out beyond 1.
        scale = np.sign(inverse[:, 1, 1]) * np.sqrt(inverse[:, 0, 0] * inverse[:, 1, 1])
        r = -inverse[:, 0, 1] / scale
    # Models that differ in x by no more than rounding have no trend over it.
    if not abs(moments[0, 0]) > 1e-12 * (centre[0] ** 2).mean():
        slopes[:] = r[:] = np.nan
    found = told("slope", _jackknife(slopes, like.count))
    if not _jackknife(varies, like.count)["low"] > 0:
        r[:] = np.nan
    correlation = _jackknife(r, like.count)
    return found | told("r", {key: float(np.clip(one, -1, 1)) for key, one in correlation.items()})


def _inverse(matrices: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.inv(matrices)
    except np.linalg.LinAlgError:  # a measure is the same for all models
        return np.full_like(matrices, np.nan)


def _jackknife(values: np.ndarray, count: int) -> Interval:
    """The first of the values, and its interval from the others, each without one concept."""
    value, left_out = values[0], values[1:]
    spread = ((left_out - left_out.mean()) ** 2).sum() * (len(left_out) - 1) / len(left_out)
    reach = quantile(count) * np.sqrt(spread if spread > 1e-24 else np.nan)
    return {"value": float(value), "low": float(value - reach), "high": float(value + reach)}


def contrast(
    measures: Measures,
    one: str | Sequence[str],
    other: str | Sequence[str],
    measure: str = "did",
) -> Interval:
    """`contrast(measures, "zoo-llama-5", "zoo-llama-1")`: one minus the other, paired by concept.

    >>> measures = measure_models(study.details)
    >>> sorted(contrast(measures, "new", "old", "accuracy"))
    ['high', 'low', 'value']

    Of two lists of models, it is the difference of their means. Two peaks are subtracted as if they
    were independent, see `estimates.difference`.
    """
    if measure in measures.peaks:
        parts = (
            ([one] if isinstance(one, str) else one),
            [other] if isinstance(other, str) else other,
        )
        means = [mean_of([measures.interval(measure, name) for name in part]) for part in parts]
        return difference(*means)
    above, below = (
        measures.of(measure, [part] if isinstance(part, str) else part).mean()
        for part in (one, other)
    )
    return (above - below).interval()


def delay(curve: Estimates, steps: ArrayLike) -> Estimates:
    """`delay(measures.of("accuracy", checkpoints), steps)`: how late a measure makes its rise.

    It is the mean of the logarithm of the steps at which the rise is made, from the first
    checkpoint on: the area above the curve, over log steps, divided by the rise. A curve that rises
    twice as late has a delay that is larger by log 2. Not a number, unless the last value is above
    the first beyond its interval.
    """
    late = lateness(curve, steps)
    return late if (curve[-1] - curve[0]).interval()["low"] > 0 else late * np.nan


def lateness(curve: Any, steps: ArrayLike) -> Any:
    """The area above a curve, over log steps, divided by its rise: of numbers or `Estimates`."""
    gaps = np.diff(np.log(np.asarray(steps, dtype=float)))
    weights = (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
    return ((curve[-1] - curve) * weights).mean(0) * len(weights) / (curve[-1] - curve[0])


def half_way(values: Sequence[float], steps: ArrayLike) -> float:
    """`half_way([0.1, 0.2, 0.5], [100, 200, 400])`: the step at which half of a rise is made.

    By linear interpolation in log steps, where the values first pass the middle between the first
    and the largest. Not a number where they never rise.
    """
    risen = np.maximum.accumulate(np.asarray(values, dtype=float))
    middle = (risen[0] + risen[-1]) / 2
    if not risen[-1] > risen[0]:
        return float("nan")
    after = int((risen >= middle).argmax())
    ends = slice(after - 1, after + 1)
    return float(np.exp(np.interp(middle, risen[ends], np.log(steps)[ends])))


def like_sized_ends(about: pd.DataFrame) -> pd.DataFrame:
    """`like_sized_ends(describe_models(names))`: an old and a new model of each family.

    Models of different size say nothing of generations. So the pair is the most generations apart
    of those in which the larger has at most `LIKE_SIZED` times the parameters of the smaller; of
    several, the most alike in size, then the first by name. Micro models are families of their own.

    Returns a row per family with columns `family`, `micro`, `oldest`, `newest` (names, missing
    without such a pair) and `times`, the larger's parameters over the smaller's.
    """
    family = ["family", "micro"]
    known = about.dropna(subset=["family", "order", "parameters"])
    pairs = known.merge(known, on=family, suffixes=("_old", "_new"))
    pairs = pairs.rename(columns={"model_old": "oldest", "model_new": "newest"})
    pairs["apart"] = pairs["order_new"] - pairs["order_old"]
    sizes = pairs[["parameters_old", "parameters_new"]]
    pairs["times"] = sizes.max(axis=1) / sizes.min(axis=1)
    pairs = pairs[(pairs["apart"] > 0) & (sizes.max(axis=1) <= LIKE_SIZED * sizes.min(axis=1))]
    best = pairs.sort_values(
        ["apart", "times", "oldest", "newest"], ascending=[False, True, True, True]
    ).drop_duplicates(family)
    columns = [*family, "oldest", "newest", "times"]
    return known[family].drop_duplicates().merge(best[columns], on=family, how="left")


def balanced_tiers(pss: pd.DataFrame) -> dict[str, list[str]]:
    """`balanced_tiers(study.pss)`: by tier, concepts of which each domain has equally many.

    Tiers are thirds of SpecWiki by frequency, in which domains have unequal shares. Concepts are
    taken in the order of their names' hashes.
    """
    concepts = pss.drop_duplicates("concept")[["concept", "domain", "tier"]]
    counts = concepts.groupby(["domain", "tier"]).size().unstack(fill_value=0)
    fewest = counts.reindex(columns=list(TIERS), fill_value=0).min(axis=1)
    kept: dict[str, list[str]] = {tier: [] for tier in TIERS}
    for (domain, tier), part in concepts.groupby(["domain", "tier"]):
        kept[tier] += sorted(part["concept"], key=by_hash)[: fewest[domain]]
    if not kept[TIERS[0]]:
        raise InputError("concepts: no domain has one of each tier; measure more concepts")
    return kept
