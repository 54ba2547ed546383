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
EXAMPLES = PUBLIC | {"dataset": dataset, "export_lm_eval": export_lm_eval}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: a directory that holds `my-checkpoint/`."""
    return save_toy(tmp_path_factory.mktemp("examples") / "my-checkpoint").parent


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


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = EXAMPLES[name].__doc__
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, 0)
    assert example.examples
    told = io.StringIO()
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=told.write)
    assert not told.getvalue(), told.getvalue()
    assert len(PUBLIC) <= 40  # they fit on a screen
