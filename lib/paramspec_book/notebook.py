"""Cells that chapters have in common: they begin, measure, and hand numbers to prose."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from myst_nb import glue

from paramspec.execution.parallel import workers
from paramspec.plain import read_yaml
from paramspec.stats.estimates import interval_of, told
from paramspec.studies.chapters import CHAPTERS, Experiment
from paramspec.studies.sweep import Study, measure_pss
from paramspec_book import figures, kept
from paramspec_book.tables import shown


def begin(chapter: str, parameters: Mapping[str, Any]) -> list[Experiment]:
    """`begin("3-masking", globals())`: the chapter's experiments; figures get the book's style.

    The claims that the chapter tests are glued: `c1-claim`, `c1-paper` (numbers), `c1-primary` (the
    estimate that decides, and why) and `c1-rule`.
    """
    figures.use_book_style()
    glue_all(profile=os.environ.get("PARAMSPEC_PROFILE", "by hand"))
    for name, one in claims().items():
        if one["chapter"] == chapter:
            paper = one["published"].format(**one["numbers"])
            texts = {"paper": paper} | {part: one[part] for part in ("claim", "primary", "rule")}
            glue_all(**{f"{name.lower()}-{part}": text for part, text in texts.items()})
    return CHAPTERS[chapter](parameters) if chapter in CHAPTERS else []


@functools.cache
def claims() -> dict[str, dict[str, Any]]:
    """`claims()["C1"]["numbers"]["pearson"]`: the paper's claims, from `claims.yaml`."""
    path = Path(__file__).with_name("claims.yaml")
    return read_yaml(path.read_text("utf-8"), path.name)


def measure(
    experiments: Sequence[Experiment], jobs: int = 0, scheduler: str | None = None
) -> list[Study]:
    """`measure(experiments, jobs, scheduler)`: their studies, see `workers`."""
    with workers(jobs=jobs, scheduler=scheduler):
        return [measure_pss(one.models, one.questions, one.choices) for one in experiments]


def use_plain_shell() -> None:
    """Cells that begin with `%%bash` print what commands say, in one piece and without colours;
    `paramspec` is that of this Python.
    """
    from IPython.core.magic import register_cell_magic

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    plain = os.environ | {"PATH": path}
    plain = {
        name: value
        for name, value in plain.items()
        if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")
    }

    @register_cell_magic
    def bash(line: str, cell: str) -> None:
        options: dict[str, Any] = {"env": plain, "text": True, "check": True}
        print(
            subprocess.run(["bash", "-ec", cell], stdout=subprocess.PIPE, **options).stdout, end=""
        )


def keep(**tables: pd.DataFrame) -> None:
    """`keep(answers=study.details)`: what the verdict rests on, for `paramspec verdicts`, in the
    folder `NAME.data/` next to the executed copy; by hand, nowhere.
    """
    folder = kept.folder()
    if folder is None:
        return
    for name, table in tables.items():
        slim = table.drop(columns=["option_logprobs", "option_tokens"], errors="ignore")
        slim.to_parquet(folder / f"{name}.parquet", index=False)


def glue_all(**values: object) -> None:
    """`glue_all(n_models=20)`: for the prose, as `n-models`."""
    for name, value in values.items():
        plain = value.item() if isinstance(value, np.generic) else value
        glue(name.replace("_", "-"), plain, display=False)


def glue_interval(name: str, row: Mapping[str, float], key: str = "value") -> None:
    """`glue_interval("peak", row, "peak_pooled")`: as `peak`, `peak-low` and `peak-high`."""
    glue_all(**told(name, interval_of(row, key)))


def method_rows(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`method_rows({"smollm2-135m": measure_methods(study, names)})`: with the model of each."""
    return pd.concat([table.assign(model=model) for model, table in tables.items()])


def in_words(rows: pd.DataFrame, index: list[str], columns: str, form: str = ".2f") -> pd.DataFrame:
    """`in_words(rows, ["model", "method"], "measure")`: intervals as a wide table of text, in the
    order in which `rows` names rows and columns first.
    """
    texts = shown(rows.set_index([*index, columns]), {"value": "text"}, form)["text"]
    return texts.unstack(sort=False).fillna("").rename_axis(columns=None)
