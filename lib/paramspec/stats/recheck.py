"""Every verdict once more, from stored answers alone, by a path that shares no code with chapters.

    recheck(Path("book/_executed"))     # a row per claim: its estimates, and the verdict

A chapter leaves what its verdict rests on in a folder next to its executed copy, `NAME.data/`.
Here each estimate is computed from these tables with every concept left out in turn; intervals are
the jackknife's, with Student's t. Slopes are of ordinary least squares, not freed of noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from paramspec.errors import InputError

Interval = tuple[float, float]
Effects = dict[str, Interval]  # by name
Found = Effects | str  # or why there are none


def recheck(folder: Path) -> pd.DataFrame:
    """`recheck(Path("book/_executed"))`: a row per claim.

    Columns are `claim`; `chapter`, the verdict in the executed copy; `verdict`, from its tables, or
    `no data`; `agrees`; and `effects`, the intervals of what must be above zero.

    Raises:
        InputError: if the folder holds no executed chapter with tables.
    """
    rows = []
    for claim, (chapter, effects_of) in CLAIMS.items():
        paths = sorted((folder / f"{chapter}.data").glob("*.parquet"))
        tables = {path.stem: pd.read_parquet(path) for path in paths}
        effects = effects_of(tables) if tables else "no data"
        found = effects if isinstance(effects, str) else _verdict(effects)
        said = _said(folder / f"{chapter}.ipynb", f"{claim.lower()}-verdict")
        shown = {} if isinstance(effects, str) else effects
        texts = [f"{name} {low:+.3f} to {high:+.3f}" for name, (low, high) in shown.items()]
        agrees = "" if "no data" in (found, said) else "yes" if found == said else "no"
        rows.append((claim, said, found, agrees, "; ".join(texts)))
    table = pd.DataFrame(rows, columns=["claim", "chapter", "verdict", "agrees", "effects"])
    if (table["verdict"] == "no data").all():
        raise InputError(f"{folder}: no executed chapter with its tables; run `paramspec build`")
    return table


def _said(path: Path, name: str) -> str:
    """The text that an executed copy handed to its prose by this name."""
    cells = json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        if output.get("metadata", {}).get("scrapbook", {}).get("name") == name:
            texts = [text for kind, text in output["data"].items() if kind.endswith("text/plain")]
            return "".join(texts[0]).strip("'\"")
    return "no data"


def _verdict(effects: Mapping[str, Interval]) -> str:
    bounds = np.array(list(effects.values()), dtype=float).reshape(-1, 2)
    if not len(bounds):
        return "not run"
    if np.isnan(bounds).any():
        return "cannot tell"
    if (bounds[:, 1] < 0).any():
        return "opposite"
    return "consistent" if (bounds[:, 0] > 0).all() else "cannot tell"


def _left_out(
    answers: pd.DataFrame, by: list[str], names: list[str], value: str = "correct_norm"
) -> pd.DataFrame:
    """Means of the groups: a column of all answers, then one without each of these concepts."""
    grouped = answers.groupby([*by, "concept"])[value].agg(["sum", "size"]).unstack(fill_value=0)
    top, bottom = (
        grouped[part].reindex(columns=names, fill_value=0).to_numpy(dtype=float)
        for part in ("sum", "size")
    )
    whole = [part.sum(axis=1, keepdims=True) for part in (top, bottom)]
    with np.errstate(invalid="ignore"):
        values = np.hstack([whole[0] / whole[1], (whole[0] - top) / (whole[1] - bottom)])
    return pd.DataFrame(values, index=grouped.index)


def _interval(values: np.ndarray | pd.Series) -> Interval:
    """From a value of all answers, and those with each concept left out in turn."""
    value, left = float(values[0]), np.asarray(values[1:], dtype=float)
    moved = left[~np.isclose(left, value, rtol=0, atol=1e-12)]  # by concepts that are in it
    if len(moved) < 2:
        return np.nan, np.nan
    spread = ((moved - moved.mean()) ** 2).sum() * (len(moved) - 1) / len(moved)
    reach = stats.t.isf(0.025, len(moved) - 1) * np.sqrt(spread)
    return value - reach, value + reach


def _concepts(table: pd.DataFrame) -> list[str]:
    return sorted(set(table["concept"]))


def _did(answers: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The difference in differences, in the mean over the ratios, of each model."""
    own_masks = answers[answers["mask"].isin(["none", "concept"])]
    accuracy = _left_out(own_masks, ["model", "ratio", "role"], names)
    own, general = (accuracy.xs(role, level="role") for role in ("concept", "general"))
    gap, before = general - own, general.xs(0.0, level="ratio")
    masked = gap[gap.index.get_level_values("ratio") > 0]
    return (masked.groupby(level="model").mean() - gap.xs(0.0, level="ratio")) / before


def _accuracy(answers: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    own = answers[(answers["mask"] == "none") & (answers["role"] == "concept")]
    return _left_out(own, ["model"], names)


def _slope(x: pd.DataFrame | np.ndarray, y: pd.DataFrame) -> np.ndarray:
    x, y = (np.asarray(one, dtype=float) for one in (x, y))
    x, y = (one - one.mean(axis=0) for one in (x, y))
    return (x * y).sum(axis=0) / (x**2).sum(axis=0)


def _c1(tables: Mapping[str, pd.DataFrame]) -> Found:
    names = tables["models"].query("measured")["model"]
    if len(names) < 3:
        return "not run"
    if tables["models"].query("measured")["above_chance"].sum() < 3:
        return "not testable here"
    answers = tables["answers"]
    x, y = (of(answers, _concepts(answers)).loc[names] for of in (_accuracy, _did))
    return {"slope": _interval(_slope(x, y))}


def _c2(tables: Mapping[str, pd.DataFrame]) -> Found:
    pairs = tables["pairs"]
    if len(pairs) < 2:
        return "not run"
    did = _did(tables["answers"], _concepts(tables["answers"]))
    return {"newer": _interval(did.loc[pairs["newest"]].mean() - did.loc[pairs["oldest"]].mean())}


def _c3(tables: Mapping[str, pd.DataFrame]) -> Found:
    models, answers = tables["models"].query("measured"), tables["answers"]
    effects: Effects = {}
    for axis in ("released", "mmlu"):
        part = models.dropna(subset=[axis])
        if len(part) < 3:
            return "not run"
        along = part[axis].to_numpy(dtype=float)[:, None]
        effects[axis] = _interval(
            _slope(along, _did(answers, _concepts(answers)).loc[part["model"]])
        )
    return effects


def _c4(tables: Mapping[str, pd.DataFrame]) -> Found:
    tiers, able = tables["tiers"].set_index("concept")["tier"], list(tables["able"]["model"])
    answers = tables["answers"][tables["answers"]["model"].isin(able)]
    if not able:
        return "not run"
    answers = answers.assign(tier=answers["mask_concept"].map(tiers)).dropna(subset=["tier"])
    effects: Effects = {}
    steps = (("high", "low"), ("high", "medium"), ("medium", "low"))
    for name, of in {"accuracy": _accuracy, "did": _did}.items():
        parts = {
            tier: of(part, _concepts(answers)).mean() for tier, part in answers.groupby("tier")
        }
        found = {
            f"{name}, {one} minus {two}": _interval(parts[one] - parts[two]) for one, two in steps
        }
        first, *others = found.items()
        effects |= dict([first]) | {key: one for key, one in others if one[1] < 0}
    return effects


def _c5(tables: Mapping[str, pd.DataFrame]) -> Found:
    did, slopes = _did(tables["answers"], _concepts(tables["answers"])), []
    for _, part in tables["models"].groupby("run"):
        if len(part) < 2:
            return "not run"
        doublings = np.log2(part["parameters"].to_numpy(dtype=float))[:, None]
        slopes.append(_slope(doublings, did.loc[part["model"]]))
    return {"slope": _interval(np.mean(slopes, axis=0))}


def _c6(tables: Mapping[str, pd.DataFrame]) -> Found:
    answers, runs = tables["answers"], tables["models"].sort_values("step").groupby("run")
    parts = [part for _, part in runs if len(part) >= 3]
    parts = [part for part in parts if len(part) == len(parts[0])]
    if not parts:
        return "not run"
    logs, late = np.log(parts[0]["step"].to_numpy(dtype=float)), []
    for measure in (_accuracy, _did):
        values = measure(answers, _concepts(answers))
        curve = np.mean([values.loc[part["model"]].to_numpy() for part in parts], axis=0)
        rise = curve[-1] - curve[0]
        if not _interval(rise)[0] > 0:
            return {"delay": (np.nan, np.nan)}
        late.append(np.trapezoid(curve[-1] - curve, logs, axis=0) / rise)
    return {"delay": _interval(late[1] - late[0])}


def _c7(tables: Mapping[str, pd.DataFrame]) -> Found:
    answers = tables["answers"]
    general = answers[(answers["role"] == "general") & answers["mask"].isin(["none", "concept"])]
    accuracy = _left_out(general, ["ratio"], _concepts(general))
    masked = accuracy[(accuracy.index >= 0.05) & (accuracy.index <= 0.1)]
    return {"change": _interval(masked.mean() - accuracy.loc[0.0])} if len(masked) else "not run"


def _c8(tables: Mapping[str, pd.DataFrame]) -> Found:
    by_run = {
        name: _left_out(part, ["method", "seed"], _concepts(part))
        for name, part in tables["answers"].groupby("model")
    }
    effects: Effects = {}
    for other in ("FT-FV", "FT-CV", "FT-RV"):
        gaps = [accuracy.loc["FT-PV"] - accuracy.loc[other] for accuracy in by_run.values()]
        effects[f"minus {other}"] = _over_seeds(gaps)
    return effects


def _over_seeds(gaps: list[pd.DataFrame]) -> Interval:
    """The mean over models and seeds, from a row per seed of each model."""
    value, parts = np.mean([gap[0].mean() for gap in gaps]), []
    for gap in gaps:
        (low, high), freedom = _interval(gap.mean()), gap.shape[1] - 2  # concepts, but one
        error = (high - low) / 2 / stats.t.isf(0.025, freedom)
        parts.append((np.nan_to_num(error**2), freedom))
        if len(gap) > 1:
            parts.append((gap[0].var() / len(gap), len(gap) - 1))
    variances, freedoms = np.array(parts).T
    if not variances.any():
        return np.nan, np.nan
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    reach = stats.t.isf(0.025, freedom) * np.sqrt(variances.sum()) / len(gaps)
    return value - reach, value + reach


def _pooled(parts: list[tuple[float, float]]) -> Interval:
    """The mean of independent values, each with its reach."""
    value = np.mean([one for one, _ in parts])
    reach = np.sqrt(np.sum([reach**2 for _, reach in parts])) / len(parts)
    return value - reach, value + reach


def _c9(tables: Mapping[str, pd.DataFrame]) -> Found:
    able = list(tables["able"]["model"])
    effects: Effects = {}
    if not able:
        return "not testable here"
    for measure in ("entropy", "dimension"):
        rows = tables[measure]
        for other in ("original", "FT-FV", "FT-CV", "FT-RV"):
            parts = []
            for model in able:
                part = rows[rows["model"] == model]
                mean = _left_out(part, ["method"], _concepts(part), measure)
                gap = mean.loc[other] - mean.loc["FT-PV"]
                low, high = _interval(gap)
                parts.append((gap[0], (high - low) / 2))
            effects[f"{measure}, {other}"] = _pooled(parts)
    return effects


CLAIMS: dict[str, tuple[str, Callable[[Mapping[str, pd.DataFrame]], Found]]] = {
    "C1": ("4-twenty-models", _c1),
    "C2": ("4-twenty-models", _c2),
    "C3": ("4-twenty-models", _c3),
    "C4": ("5-frequency", _c4),
    "C5": ("6-scale", _c5),
    "C6": ("7-pretraining", _c6),
    "C7": ("3-masking", _c7),
    "C8": ("8-causal-training", _c8),
    "C9": ("9-hallucination", _c9),
}
