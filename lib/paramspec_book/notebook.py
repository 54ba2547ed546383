"""What the cells of chapters have in common: how they begin, measure, and hand numbers to prose.

experiments = begin("4-twenty-models", globals())       # from the parameters
study, holdout = measure(experiments, jobs, scheduler)
glue_interval("c1", {"value": 0.7, "low": 0.4, "high": 0.9})     # c1, c1-low and c1-high
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from myst_nb import glue

from paramspec.execution.parallel import workers
from paramspec.stats.trends import with_interval
from paramspec.studies.chapters import CHAPTERS, Experiment, chapter_experiments
from paramspec.studies.sweep import Study
from paramspec_book import figures


def begin(chapter: str, parameters: Mapping[str, Any]) -> list[Experiment]:
    """`begin("3-masking", globals())`: the book's style, and what the chapter measures."""
    figures.use_book_style()
    glue_all(profile=os.environ.get("PARAMSPEC_PROFILE", "by hand"))
    return chapter_experiments(chapter, parameters) if chapter in CHAPTERS else []


def measure(
    experiments: Sequence[Experiment], jobs: int = 0, scheduler: str | None = None
) -> list[Study]:
    """`measure(experiments, jobs, scheduler)`: their studies, see `workers`."""
    with workers(jobs=jobs, scheduler=scheduler):
        return [experiment.measure() for experiment in experiments]


def glue_all(**values: object) -> None:
    """`glue_all(n_models=20)`: for the prose, as `n-models`."""
    for name, value in values.items():
        plain = value.item() if isinstance(value, np.generic) else value
        glue(name.replace("_", "-"), plain, display=False)


def glue_interval(name: str, row: Mapping[str, float], key: str = "value") -> None:
    """`glue_interval("peak", row, "peak_pooled")`: as `peak`, `peak-low` and `peak-high`.

    Args:
        row: holds `key`, and either `low` and `high` or `key_low` and `key_high`.
    """
    prefix = "" if "low" in row else f"{key}_"
    glue(name, float(row[key]), display=False)
    for end in ("low", "high"):
        glue(f"{name}-{end}", float(row[f"{prefix}{end}"]), display=False)


def shown(table: pd.DataFrame, titles: Mapping[str, str], form: str = ".2f") -> pd.DataFrame:
    """`shown(table, {"peak_pss": "peak PSS"})`: columns of values with their intervals, as text."""
    rows = table.to_dict("records")
    texts = {
        title: [with_interval(row, name, form=form) for row in rows]
        for name, title in titles.items()
    }
    return pd.DataFrame(texts, index=table.index)
