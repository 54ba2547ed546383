"""PSS over many models: tables of peaks, correlations, contrasts.

    draws = resample_models(study.pss)                     # all models, the same resampled concepts
    model_table(draws)                                     # a row per model, with intervals
    correlations(draws, x="accuracy", y="peak_pss")        # Pearson, Spearman, their intervals
    contrast(draws, "zoo-llama-5", "zoo-llama-1", "peak_pss")

All models are asked the same questions, so their values move together when a concept is left out:
a resample draws concepts once, for all of them. Models of one family are not independent points
either: an interval over families resamples these instead (paper, sections 4.1 to 4.4).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.stats.bootstrap import Draws, interval, percentiles, resample
from paramspec.stats.summary import ConceptCounts
from paramspec.tables import TIERS

CHANCE = 0.25
LIKE_SIZED = 1.25  # the largest ratio of parameter counts of two models of like size


def resample_models(pss: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> Draws:
    """`draws = resample_models(study.pss)`: each model's measures in resamples of the concepts.

    >>> draws = resample_models(study.pss, resamples=200)
    >>> draws.of("accuracy").shape == (1 + 200, len(draws.models))
    True

    Args:
        pss: rows of one protocol; every model has the same concepts.
        resamples: their number, apart from the measured values.
        seed: of the resampled concepts.

    Returns:
        Draws of `accuracy`, on the concepts' own questions without a mask; `peak_pss`, the peak
        over the ratios of |G(k) - C(k)| / G(0), pooled over concepts; `peak_null`, the same under
        random masks; `peak_excess`, peak_pss minus peak_null; `peak_did`, the peak of the
        difference in differences; `peak_per_concept`, the peak of the mean over concepts; and
        `ceiling`, the most that a loss of all knowledge could give, (G(0) - chance) / G(0).

    Raises:
        InputError: if models have different concepts, or protocols are mixed.
    """
    if pss["protocol"].nunique() != 1:
        raise InputError(f"protocols {sorted(set(pss['protocol']))}: give the rows of one")
    each = {model: ConceptCounts.of(part) for model, part in pss.groupby("model", sort=False)}
    first, *others = each
    names = sorted(each[first].names)
    for model in others:
        if sorted(each[model].names) != names:
            raise InputError(f"model {model!r}: measured on other concepts than {first!r}")
    samples = resample(len(names), resamples, seed)
    found = [_measures(counts, np.argsort(counts.names)[samples]) for counts in each.values()]
    of_all = [measure for measure in found[0] if all(measure in one for one in found)]
    stacked = {measure: np.stack([one[measure] for one in found], axis=1) for measure in of_all}
    return Draws(tuple(each), stacked)


def _measures(counts: ConceptCounts, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure of one model, `[samples]`, over concept indices `[samples, concepts]`."""
    base = counts.statistics(("none", 0.0), samples)
    accuracy, general = base["concept_accuracy"][0], base["general_accuracy"][0]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"accuracy": accuracy, "ceiling": np.maximum(general - CHANCE, 0) / general}
    own, null = counts.peaks("concept", samples), counts.peaks("random", samples)
    named = [("peak_pss", own, "peak_pooled"), ("peak_did", own, "peak_did")]
    named += [("peak_per_concept", own, "peak_per_concept"), ("peak_null", null, "peak_pooled")]
    found |= {name: peaks[peak].mean(axis=0) for name, peaks, peak in named if peaks}
    if own and null:
        found["peak_excess"] = found["peak_pss"] - found["peak_null"]
    return found


def model_table(draws: Draws, about: pd.DataFrame | None = None) -> pd.DataFrame:
    """`model_table(draws, about)`: a row per model, each measure with its 95 % interval.

    >>> table = model_table(resample_models(study.pss))
    >>> bool((table["accuracy_low"] <= table["accuracy"]).all())
    True

    Args:
        draws: from `resample_models`.
        about: more columns, joined by `model`.

    Returns:
        `model`, then for every measure the value, `_low` and `_high` (percentiles over resampled
        concepts). A peak is a maximum of absolute values, so that noise moves its interval
        upwards, at times beyond the value: compare it with that of `peak_null`.
    """
    table = pd.DataFrame({"model": draws.models})
    for measure, values in draws.values.items():
        low, high = percentiles(values[1:])
        table[measure], table[f"{measure}_low"], table[f"{measure}_high"] = values[0], low, high
    return table if about is None else table.merge(about, on="model", how="left", validate="1:1")


def correlations(
    draws: Draws,
    *,
    y: str = "peak_pss",
    x: str | Sequence[float] = "accuracy",
    models: Sequence[str] | None = None,
    families: Mapping[str, str] | None = None,
    given: str | None = None,
) -> pd.DataFrame:
    """`correlations(draws, y="peak_pss", families={"zoo-llama-1": "llama", ...})`.

    >>> found = correlations(resample_models(study.pss), x="accuracy", y="peak_pss")
    >>> found[["statistic", "n"]].values.tolist()
    [['Pearson', 3], ['Spearman', 3]]

    Args:
        draws: from `resample_models`.
        x, y: measures; or, for x, a number for each of the models (tokens, days, MMLU).
        models: those to correlate; all if not given.
        families: the family of each, for the interval over families.
        given: a measure to hold constant: the partial correlation.

    Returns:
        A row for Pearson's and for Spearman's coefficient: `statistic`, `r`, `n`, `low` and `high`
        over resampled concepts, `family_low` and `family_high` over resampled families (all ways
        to draw as many as there are, with their probabilities).
    """
    models = list(draws.models if models is None else models)
    if len(models) < 3:
        raise InputError(f"{len(models)} models: a correlation needs at least 3")
    up = draws.of(y, models)
    along = draws.of(x, models) if isinstance(x, str) else np.tile(x, (len(up), 1))
    series = [along, up] if given is None else [along, up, draws.of(given, models)]
    rows = []
    for statistic in ("Pearson", "Spearman"):
        values = _correlate(series, statistic)
        row = {"statistic": statistic, "r": float(values[0]), "n": len(models)}
        row["low"], row["high"] = map(float, percentiles(values[1:]))
        if families is not None:
            home = np.array([families[model] for model in models])
            row |= _over_families([values[:1] for values in series], home, statistic)
        rows.append(row)
    return pd.DataFrame(rows)


def _correlate(series: list[np.ndarray], statistic: str) -> np.ndarray:
    """A coefficient per row of two `[rows, models]`; a third is held constant: partial."""
    if statistic == "Spearman":
        from scipy import stats  # takes half a second, and workers do without it

        series = [stats.rankdata(values, axis=1) for values in series]
    centred = [values - values.mean(axis=1, keepdims=True) for values in series]

    def r(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))

    if len(centred) == 2:
        return r(*centred)
    xy, xz, yz = (r(one, other) for one, other in itertools.combinations(centred, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        partial = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    # If the third is one of the two, nothing but rounding is left to correlate.
    return np.where(np.isfinite(partial), partial, np.nan)


def _over_families(series: list[np.ndarray], home: np.ndarray, statistic: str) -> dict[str, float]:
    """Percentiles of the coefficient over families drawn with replacement, exactly."""
    families = sorted(set(home))
    values = np.full(1, np.nan)
    if 2 <= len(families) <= 6:  # one has no interval; many have too many ways
        places = [np.flatnonzero(home == family) for family in families]
        drawn = map(np.concatenate, itertools.product(places, repeat=len(places)))
        each = [_correlate([values[:, chosen] for values in series], statistic) for chosen in drawn]
        values = np.concatenate(each)
    low, high = percentiles(values)
    return {"family_low": float(low), "family_high": float(high)}


def contrast(draws: Draws, one: str, other: str, measure: str = "peak_pss") -> dict[str, float]:
    """`contrast(draws, "zoo-llama-5", "zoo-llama-1")`: one minus the other, on the same concepts.

    >>> draws = resample_models(study.pss)
    >>> sorted(contrast(draws, "new", "old", "accuracy"))
    ['high', 'low', 'value']

    Returns:
        `value`, and its 95 % interval over resampled concepts, `low` and `high`.
    """
    values = draws.of(measure, [one, other])
    return interval(values[:, 0] - values[:, 1])


def half_way(
    draws: Draws, models: Sequence[str], steps: Sequence[float], measure: str
) -> np.ndarray:
    """The step at which a measure of these checkpoints reaches half of its rise, `[1 + resamples]`.

    By linear interpolation in log steps, where the measure first passes the middle between its
    first and its largest value. Infinite where it never rises (it may later); nan where a value is.
    """
    # Never falling: a dip after the rise does not make the rise later.
    values = np.maximum.accumulate(draws.of(measure, models), axis=1)
    middle = (values[:, :1] + values[:, -1:]) / 2
    logs = np.log(np.asarray(steps, dtype=float))
    after = (values >= middle).argmax(axis=1)
    rows = np.arange(len(values))
    before = np.maximum(after - 1, 0)
    low, high = values[rows, before], values[rows, after]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, (middle[:, 0] - low) / (high - low), 0.0)
    steps_at = np.exp(logs[before] + share * (logs[after] - logs[before]))
    rising = np.where(values[:, -1] > values[:, 0], steps_at, np.inf)
    return np.where(np.isnan(values[:, -1]), np.nan, rising)


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


def balance_tiers(pss: pd.DataFrame) -> pd.DataFrame:
    """`balance_tiers(study.pss)`: of each domain, the rows of as many concepts of every tier.

    Tiers are thirds of SpecWiki by frequency, in which domains have unequal shares. Concepts are
    taken in the order of their names' hashes.
    """
    concepts = pss.drop_duplicates("concept")[["concept", "domain", "tier"]]
    counts = concepts.groupby(["domain", "tier"]).size().unstack(fill_value=0)
    fewest = counts.reindex(columns=list(TIERS), fill_value=0).min(axis=1)
    kept = [
        name
        for (domain, _), part in concepts.groupby(["domain", "tier"])
        for name in sorted(part["concept"], key=by_hash)[: fewest[domain]]
    ]
    if not kept:
        raise InputError("concepts: no domain has one of each tier; measure more concepts")
    return pss[pss["concept"].isin(kept)]
