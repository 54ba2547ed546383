"""Every public name has an example in its docstring, which runs as it stands."""

from __future__ import annotations

import doctest
import io

import numpy as np
import pandas as pd
import pytest
import torch

import paramspec
from paramspec.specwiki import dataset, export_lm_eval
from paramspec.studies.sweep import measure_pss
from toy_study import save_toy, toy_loaded, toy_questions

PUBLIC = {name: getattr(paramspec, name) for name in paramspec.__all__}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: a directory that holds `my-checkpoint/`."""
    folder = tmp_path_factory.mktemp("examples")
    save_toy(folder / "my-checkpoint")
    return folder


@pytest.fixture(scope="module")
def names():
    """What `paramspec`'s docstring says that examples have."""
    loaded, questions = toy_loaded(), toy_questions(3)
    models = [toy_loaded(name=name, seed=seed) for seed, name in enumerate(("old", "new", "other"))]
    choices = paramspec.Choices(ratios=(0.3,), general=5, nulls=("random",))
    return {
        **PUBLIC,
        "np": np,
        "pd": pd,
        "torch": torch,
        "view": paramspec.value_vector_view(loaded.model),
        "tokenizer": loaded.tokenizer,
        "questions": questions,
        "study": measure_pss(models, questions, choices),
    }


@pytest.mark.parametrize("name", [*PUBLIC, "dataset", "export_lm_eval"])
def test_the_example_runs(name, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = (PUBLIC | {"dataset": dataset, "export_lm_eval": export_lm_eval})[name].__doc__
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, 0)
    assert example.examples
    told = io.StringIO()
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=told.write)
    assert not told.getvalue(), told.getvalue()


def test_the_public_names_fit_on_a_screen():
    assert len(PUBLIC) <= 40
