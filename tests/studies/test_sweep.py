"""A study survives crashes, damage and full disks, and never takes an old result for a new one."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from oracles import same_tables, score_one_at_a_time
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.store import Store
from paramspec.method import pss
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import load_masks, record_concepts
from paramspec.method.pss import Choices
from paramspec.method.scoring import encode, mark, score_options
from paramspec.models.tokens import tokenizer_facts
from paramspec.specwiki import questions_digest
from paramspec.studies import runner
from paramspec.studies.sweep import (
    concept_coefficients,
    measure_pss,
    needs_of,
    score_questions,
    write_study,
)
from toy_study import CONCEPTS, loaded, save_toy, toy_loaded, toy_questions
from toys import same_weights, toy_model

SMALL = Choices(ratios=(0.1, 0.3), general=5)


@pytest.fixture(autouse=True)
def single_concepts(monkeypatch):
    """A unit is one concept here, so that a small study has several."""
    monkeypatch.setattr("paramspec.studies.sweep.SHARD", 1)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def reused(study):
    return [model["units_from_store"] for model in study.run["models"]]


def assert_same(one, other):
    """Equal to the last bit: the same model, questions, choices and batches."""
    pd.testing.assert_frame_equal(one.pss, other.pss)
    pd.testing.assert_frame_equal(one.details, other.details)
    assert one.masks.keys() == other.masks.keys()
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)


def units(store):
    """The finished units, by their keys, with the time they were written."""
    found = {}
    for path in store.root.glob("v*/*/*/key.json"):
        key = json.loads(path.read_text())
        found[key["unit"], *key.get("concepts", ())] = path.stat().st_mtime_ns
    return found


CHANGED = {
    "ratios": (0.1, 0.4),
    "position": "last",
    "scope": "model",
    "spared": 0.1,
    "ablation": "mean",
    "protocol": "holdout",
    "folds": (1,),
    "controls": 2,
    "nulls": ("random",),
    "general": 4,
    "general_by": "concept",
    "seed": 1,
    "chat": True,
    "row_tokens": 60,
    "batch_tokens": 600,
}
TWO = toy_questions(2)
HELD_OUT = SMALL.model_copy(update={"protocol": "holdout"})
REWORDED = [
    q.model_copy(update={"cloze": "old age of beta"}) if q.id == "beta/food" else q for q in TWO
]
# A model, questions and choices, of which one differs from those of `TWO` and `SMALL`
OTHERS = {
    **{field: ({}, TWO, SMALL.model_copy(update={field: new})) for field, new in CHANGED.items()},
    "cloze": ({}, REWORDED, SMALL),
    "tier": ({}, [q.model_copy(update={"tier": "low"}) for q in TWO], SMALL),
    "order": ({}, TWO[::-1], SMALL),
    "one less": ({}, TWO[:-1], SMALL),
    "another concept": ({}, toy_questions(3), SMALL),
    "name": ({"name": "other"}, TWO, SMALL),
    "weights": ({"seed": 1, "digest": "1" * 64}, TWO, SMALL),
}


def test_a_rerun_takes_everything_from_the_store(store):
    model, questions = toy_loaded(), toy_questions(3)
    first = measure_pss([model], questions, SMALL, store=store)
    written = units(store)
    assert set(written) == {
        ("answers",),
        ("coefficients",),
        *(("pss", name) for name in CONCEPTS[:3]),
    }
    again = measure_pss([model], questions, SMALL, store=store)
    assert (reused(first), reused(again)) == ([0], [3])
    assert units(store) == written
    assert_same(first, again)


@pytest.mark.parametrize("changed", OTHERS)
def test_another_choice_question_or_model_is_another_result(store, tmp_path, changed):
    assert set(CHANGED) == set(Choices.model_fields)
    first = measure_pss([toy_loaded()], TWO, SMALL, store=store)
    model, questions, choices = OTHERS[changed]
    given = [toy_loaded(**model)], questions, choices
    other = measure_pss(*given, store=store)
    assert reused(other) == [0]
    assert_same(other, measure_pss(*given, store=Store(tmp_path / "new")))
    assert_same(measure_pss([toy_loaded()], TWO, SMALL, store=store), first)


def test_another_dtype_or_scoring_version_is_another_result(store, tmp_path, monkeypatch):
    saved = str(save_toy(tmp_path / "toy"))
    first = measure_pss([saved], TWO, SMALL, store=store)
    halved = measure_pss([saved], TWO, SMALL, store=store, dtype="bfloat16")
    assert reused(halved) == [0]
    scores = (study.details["option_logprobs"].tolist() for study in (first, halved))
    assert 1e-3 < abs(np.subtract(*scores)).max() < 5
    monkeypatch.setattr("paramspec.studies.runner.SCORING_VERSION", 10**6)
    monkeypatch.setattr("paramspec.method.pss.SCORING_VERSION", 10**6)
    assert reused(measure_pss([saved], TWO, SMALL, store=store)) == [0]
    assert len(list(store.root.glob("v*/*/*/coefficients.safetensors"))) == 3


@pytest.mark.parametrize("name", ["pss.parquet", "coefficients.safetensors"])
def test_a_damaged_unit_is_computed_again(store, name):
    model, questions = toy_loaded(), toy_questions(3)
    first = measure_pss([model], questions, SMALL, store=store)
    file = min(store.root.glob(f"v*/*/*/{name}"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.unlink()  # tensors in use are mapped from it
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{name} is damaged"):
        again = measure_pss([model], questions, SMALL, store=store)
    assert reused(again) == [3 if name == "coefficients.safetensors" else 2]
    assert_same(again, first)  # whose masks are made of them


def test_a_disk_that_fills_up_leaves_the_earlier_results(tmp_path, store, monkeypatch):
    model, out = toy_loaded(), tmp_path / "out"
    write_study(measure_pss([model], TWO, SMALL, store=store), out)
    study = measure_pss([model], toy_questions(5), SMALL, store=store)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(path, text, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)  # of run.json, the last of them
    with pytest.raises(InputError, match=r"No space left on device.*free some space"):
        write_study(study, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_files_hold_the_study(store, tmp_path):
    model, questions, out = toy_loaded(), toy_questions(3), tmp_path / "out"
    study = measure_pss([replace(model, commit="c" * 40)], questions, SMALL, store=store)
    write_study(study, out)
    for name, table in (("pss", study.pss), ("details", study.details)):
        same_tables(pd.read_parquet(out / f"{name}.parquet"), table, atol=0)
    masks, choices = load_masks(out / "masks.safetensors")
    same_weights(masks, dict(study.masks))
    run = json.loads((out / "run.json").read_text())
    for record in (run, choices):  # a masks file says by itself what it was made of
        assert record["questions"] == {"digest": questions_digest(questions), "count": 30}
        asked = SMALL.with_folds((0, 1))  # what an open choice of folds came to
        assert record["choices"] == json.loads(asked.model_dump_json())
        assert record["models"][0]["digest"] == model.digest
    assert not {"versions", "hardware"} & run.keys()  # those of units alone
    (record,) = run["models"]
    assert (record["name"], record["layers"], record["width"]) == ("toy", 3, 48)
    assert (record["units"], record["units_from_store"]) == (3, 0)
    assert record["evaluations"] == len(study.details)
    assert record["tokenizer"] == tokenizer_facts(model.tokenizer)
    assert (record["engine"]["name"], record["commit"]) == ("packed", "c" * 40)
    (computed,) = record["computed"]
    assert computed["units"] == {"pss": 3, "coefficients": 1, "answers": 1}
    assert computed["versions"]["torch"] == importlib.metadata.version("torch")
    assert computed["hardware"]["threads"] == torch.get_num_threads()
    assert computed["first"] <= computed["last"]


def test_units_of_two_machines_are_told_apart(store, monkeypatch, pretend_versions):
    """The second half is computed elsewhere; a third machine, where all is stored, is not named."""
    model, questions = toy_loaded(), toy_questions(4)
    measure, here = pss.measure_concepts, provenance.hardware()["cpu"]

    def elsewhere(*arguments, **options):
        if "gamma" in arguments[4]:
            monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "another", "gpus": []})
            pretend_versions(pandas="999", torch="2.13.0+cu130")
        return measure(*arguments, **options)

    monkeypatch.setattr(pss, "measure_concepts", elsewhere)
    measure_pss([model], questions, SMALL, store=store)
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "a third", "gpus": []})
    study = measure_pss([model], questions, SMALL, store=store)
    assert reused(study) == [4]
    one, other = study.run["models"][0]["computed"]
    assert (one["hardware"]["cpu"], one["units"]) == (
        here,
        {"pss": 2, "coefficients": 1, "answers": 1},
    )
    assert (other["hardware"]["cpu"], other["units"]) == ("another", {"pss": 2})
    assert other["versions"]["torch"] == "2.13.0+cu130"
    assert "a third" not in json.dumps(study.run)


def test_each_question_is_scored_once_without_a_mask(store, monkeypatch):
    """Also in several units, as a concept's own and as general ones; the rest under masks alone."""
    model, questions, asked = toy_loaded(), toy_questions(3), []

    def scored(view, requests, keeps, **options):
        asked.extend(keeps[request.mask] for request in requests)
        return score_options(view, requests, keeps, **options)

    for module in ("paramspec.method.pss", "paramspec.studies.sweep"):
        monkeypatch.setattr(f"{module}.score_options", scored)
    details = measure_pss([model], questions, SMALL, store=store).details
    bare = details[details["mask"] == "none"]
    assert sum(keep is None for keep in asked) == len(questions) < len(bare)
    assert len(asked) == len(questions) + len(details) - len(bare)
    known = score_questions(model, questions, store=store).set_index("question_id")
    for question_id, logprobs in zip(bare["question_id"], bare["option_logprobs"], strict=True):
        np.testing.assert_array_equal(logprobs, known.loc[question_id, "option_logprobs"])


def test_several_models_stand_in_one_study(store, tmp_path):
    models = [toy_loaded("llama", name="one"), toy_loaded("gpt2", name="two", digest="1" * 64)]
    study = measure_pss(models, TWO, SMALL, store=store)
    assert list(dict.fromkeys(study.pss["model"])) == ["one", "two"]
    assert [model["name"] for model in study.run["models"]] == ["one", "two"]
    for model in models:
        alone = measure_pss([model], TWO, SMALL, store=Store(tmp_path / "new"))
        part = study.details[study.details["model"] == model.name].reset_index(drop=True)
        same_tables(part, alone.details, atol=0)
        assert all(torch.equal(study.masks[name], mask) for name, mask in alone.masks.items())


def test_unmasked_answers_equal_scoring_one_option_at_a_time(store):
    model, questions = toy_loaded("gpt2"), toy_questions(3)
    answers = score_questions(model, questions, store=store)
    pd.testing.assert_frame_equal(answers, score_questions(model, questions, store=store))
    view = value_vector_view(model.model)
    for question, row in zip(questions, answers.itertuples(), strict=True):
        expected = score_one_at_a_time(view, encode(model.tokenizer, question)).numpy()
        np.testing.assert_allclose(row.option_logprobs, expected, atol=1e-3)
        right = mark(expected.tolist(), question)
        assert (row.correct, row.correct_norm) == (right["correct"], right["correct_norm"])
        assert (row.question_id, row.concept) == (question.id, question.concept)
        assert (row.tier, row.fold) == (question.tier, question.fold)


@pytest.mark.parametrize("front", ["", "<s> "])
def test_a_tokenizer_that_ends_texts_measures_as_one_that_does_not(store, tmp_path, front):
    """Coefficients and scores, at the prompt's last token too."""
    choices = SMALL.model_copy(update={"position": "last"})
    bare, ending = (
        measure_pss(
            [str(save_toy(tmp_path / name, template=f"{front}$A{end}"))], TWO, choices, store=store
        )
        for name, end in (("bare", ""), ("ending", " </s>"))
    )
    assert bare.run["models"][0]["digest"] != ending.run["models"][0]["digest"]
    for one, other in ((bare.pss, ending.pss), (bare.details, ending.details)):
        pd.testing.assert_frame_equal(one.drop(columns="model"), other.drop(columns="model"))
    masks = zip(bare.masks.values(), ending.masks.values(), strict=True)
    assert all(torch.equal(one, other) for one, other in masks)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_stored_coefficients_are_those_recorded(store, position):
    model = toy_loaded()
    view = value_vector_view(model.model)
    expected = record_concepts(view, model.tokenizer, TWO, position=position)
    for _ in range(2):
        stored = concept_coefficients(model, TWO, Choices(position=position), store=store)
        assert stored.concepts == expected.concepts
        assert torch.equal(stored.sums, expected.sums)
        assert torch.equal(stored.counts, expected.counts)


def test_coefficients_of_a_model_in_bfloat16_take_half_the_disk(store):
    model = loaded(toy_model("llama", dtype=torch.bfloat16))
    expected = record_concepts(value_vector_view(model.model), model.tokenizer, TWO)
    for _ in range(2):
        stored = concept_coefficients(model, TWO, store=store)
        torch.testing.assert_close(stored.sums, expected.sums, rtol=1e-3, atol=1e-8)
    (file,) = store.root.glob("v*/*/*/coefficients.safetensors")
    assert file.stat().st_size < 0.6 * expected.sums.nbytes


@pytest.mark.parametrize(
    ("models", "questions", "message"),
    [
        ([], TWO, "models: none given"),
        (
            ["toy"],
            [q for q in TWO if q.fold or q.concept == "beta"],
            "'alpha': no question of fold 0",
        ),
        (["toy"], [], r"questions on 0 concept\(s\)"),
        (["toy", "no/such.gguf"], TWO, "'no/such.gguf': not in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(store, models, questions, message):
    models = [toy_loaded() if model == "toy" else model for model in models]
    with pytest.raises(InputError, match=message):
        measure_pss(models, questions, HELD_OUT, store=store)
    assert not store.root.exists()


def test_a_study_that_the_disk_or_the_memory_cannot_hold_is_refused_before_any_work(
    store, tmp_path, monkeypatch
):
    """What is finished counts no more; a model that is loaded counts as one that is not."""
    questions, models = toy_questions(), [str(save_toy(tmp_path / "one")), toy_loaded("llama")]
    one = needs_of(questions, SMALL.with_folds((0, 1)), 3 * 48, 4)
    for count in (2, 1):
        free = count * (one.coefficients + one.answers) - 1
        with monkeypatch.context() as patch:
            usage = SimpleNamespace(free=free)
            patch.setattr(runner.shutil, "disk_usage", lambda _, usage=usage: usage)
            with pytest.raises(InputError, match="store: the results need"):
                measure_pss(models[:count], questions, SMALL, store=store)
        assert not units(store)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "memory", lambda: one.memory - 1)
        with pytest.raises(InputError, match="one: measuring it needs"):
            measure_pss(models, questions, SMALL, store=store)
        assert not units(store)
    measure_pss(models, questions, SMALL, store=store)
    monkeypatch.setattr(runner, "memory", lambda: 0)
    measure_pss(models, questions, SMALL, store=store)


def test_coefficients_take_the_disk_that_is_planned(store):
    questions = toy_questions()
    concept_coefficients(toy_loaded("llama"), questions, SMALL, store=store)
    (file,) = store.root.rglob("coefficients.safetensors")
    planned = needs_of(questions, SMALL.with_folds((0, 1)), 3 * 48, 4).coefficients
    assert planned < file.stat().st_size < planned + 1000  # a header, and counts
