"""A study survives crashes, damage and full disks, and never takes an old result for a new one."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.store import Store
from paramspec.method import pss
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import load_masks, record_concepts
from paramspec.method.pss import Choices
from paramspec.method.scoring import encode
from paramspec.models.tokens import tokenizer_facts
from paramspec.specwiki import questions_digest
from paramspec.studies.sweep import concept_coefficients, measure_pss, score_questions, write_study
from paramspec.tables import DETAIL_COLUMNS, PSS_COLUMNS
from toy_study import CONCEPTS, save_toy, toy_loaded, toy_questions

SMALL = Choices(ratios=(0.1, 0.3), general=5)
FILES = ("pss.parquet", "details.parquet", "masks.safetensors", "run.json")


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


# What a result depends on

CHANGED = {
    "ratios": (0.1, 0.4),
    "position": "last",
    "scope": "model",
    "protocol": "holdout",
    "folds": (1,),
    "controls": 2,
    "nulls": ("random",),
    "general": 4,
    "seed": 1,
    "row_tokens": 60,
    "batch_tokens": 600,
}


def test_a_rerun_takes_everything_from_the_store(store):
    model, questions = toy_loaded(), toy_questions(3)
    first = measure_pss([model], questions, SMALL, store=store)
    written = units(store)
    assert set(written) == {("coefficients",), *(("pss", name) for name in CONCEPTS[:3])}
    again = measure_pss([model], questions, SMALL, store=store)
    assert (reused(first), reused(again)) == ([0], [3])
    assert units(store) == written
    assert_same(first, again)


def test_every_choice_has_a_change_here():
    assert set(CHANGED) == set(Choices.model_fields)


@pytest.mark.parametrize("field", CHANGED)
def test_another_choice_is_another_result(store, tmp_path, field):
    model, questions = toy_loaded(), toy_questions(2)
    first = measure_pss([model], questions, SMALL, store=store)
    choices = SMALL.model_copy(update={field: CHANGED[field]})
    assert choices != SMALL
    changed = measure_pss([model], questions, choices, store=store)
    assert reused(changed) == [0]
    assert_same(changed, measure_pss([model], questions, choices, store=Store(tmp_path / "new")))
    assert_same(measure_pss([model], questions, SMALL, store=store), first)


@pytest.mark.parametrize(
    "change",
    [
        lambda questions: [
            q.model_copy(update={"cloze": "old age of beta"}) if q.id == "beta/food" else q
            for q in questions
        ],
        lambda questions: [q.model_copy(update={"tier": "low"}) for q in questions],
        lambda questions: questions[::-1],
        lambda questions: questions[:-1],
        lambda questions: toy_questions(3),
    ],
    ids=["cloze", "tier", "order", "one less", "another concept"],
)
def test_other_questions_are_another_result(store, tmp_path, change):
    model, questions = toy_loaded(), change(toy_questions(2))
    measure_pss([model], toy_questions(2), SMALL, store=store)
    changed = measure_pss([model], questions, SMALL, store=store)
    assert reused(changed) == [0]
    assert_same(changed, measure_pss([model], questions, SMALL, store=Store(tmp_path / "new")))


@pytest.mark.parametrize("change", [{"name": "other"}, {"seed": 1, "digest": "1" * 64}])
def test_another_model_is_another_result(store, tmp_path, change):
    questions, other = toy_questions(3), toy_loaded(**change)
    measure_pss([toy_loaded()], questions, SMALL, store=store)
    changed = measure_pss([other], questions, SMALL, store=store)
    assert reused(changed) == [0]
    assert_same(changed, measure_pss([other], questions, SMALL, store=Store(tmp_path / "new")))


def test_another_dtype_or_scoring_version_is_another_result(store, tmp_path, monkeypatch):
    questions, saved = toy_questions(3), str(save_toy(tmp_path / "toy"))
    first = measure_pss([saved], questions, SMALL, store=store)
    halved = measure_pss([saved], questions, SMALL, store=store, dtype="bfloat16")
    assert reused(halved) == [0]
    dtypes = [study.run["models"][0]["dtype"] for study in (first, halved)]
    assert dtypes == ["float32", "bfloat16"]
    scores = (study.details["option_logprobs"].tolist() for study in (first, halved))
    assert 1e-3 < abs(np.subtract(*scores)).max() < 5
    monkeypatch.setattr("paramspec.studies.runner.SCORING_VERSION", 10**6)
    monkeypatch.setattr("paramspec.method.pss.SCORING_VERSION", 10**6)
    assert reused(measure_pss([saved], questions, SMALL, store=store)) == [0]
    assert len(list(store.root.glob("v*/*/*/coefficients.safetensors"))) == 3


# Damage


@pytest.mark.parametrize("name", ["pss.parquet", "masks.safetensors", "coefficients.safetensors"])
def test_a_damaged_unit_is_computed_again(store, name):
    model, questions = toy_loaded(), toy_questions(3)
    first = measure_pss([model], questions, SMALL, store=store)
    file = next(iter(sorted(store.root.glob(f"v*/*/*/{name}"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.unlink()  # tensors in use are mapped from it
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{name} is damaged; set aside") as caught:
        again = measure_pss([model], questions, SMALL, store=store)
    assert len(caught) == 1
    assert reused(again) == [3 if name == "coefficients.safetensors" else 2]
    assert_same(again, first)


# Disks


def results(out):
    """What is in the output directory, byte by byte."""
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_disk_that_fills_up_leaves_the_earlier_results(tmp_path, store, monkeypatch):
    model, out = toy_loaded(), tmp_path / "out"
    write_study(measure_pss([model], toy_questions(2), SMALL, store=store), out)
    study, before = measure_pss([model], toy_questions(5), SMALL, store=store), results(out)

    def full(path, text, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)  # of run.json, the last of them
    with pytest.raises(InputError, match=r"No space left on device.*free some space"):
        write_study(study, out)
    assert results(out) == before
    assert set(before) == set(FILES)


# What is written


def test_the_four_files_hold_the_study(store, tmp_path):
    model, questions, out = toy_loaded(), toy_questions(3), tmp_path / "out"
    study = measure_pss([model], questions, SMALL, store=store)
    write_study(study, out)
    assert set(results(out)) == set(FILES)
    pss, details = (pd.read_parquet(out / f"{name}.parquet") for name in ("pss", "details"))
    pd.testing.assert_frame_equal(pss, study.pss)
    pd.testing.assert_frame_equal(details, study.details)
    assert list(pss.columns) == list(PSS_COLUMNS)
    assert list(details.columns) == list(DETAIL_COLUMNS)
    masks, choices = load_masks(out / "masks.safetensors")
    assert masks.keys() == study.masks.keys()
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
    assert record["evaluations"] == len(details)
    assert record["tokenizer"] == tokenizer_facts(model.tokenizer)
    assert (record["engine"]["name"], record["commit"]) == ("packed", None)
    assert record["seconds"] >= 0
    (computed,) = record["computed"]
    assert computed["units"] == {"pss": 3, "coefficients": 1}
    assert computed["versions"]["torch"] == importlib.metadata.version("torch")
    assert computed["hardware"]["threads"] == torch.get_num_threads()
    assert computed["device"] == "cpu"
    assert computed["first"] <= computed["last"]


def test_an_upgrade_computes_anew(store, pretend_versions):
    model, questions = toy_loaded(), toy_questions(2)
    measure_pss([model], questions, SMALL, store=store)
    pretend_versions(torch="999.0")
    newer = measure_pss([model], questions, SMALL, store=Store(store.root))
    assert reused(newer) == [0]
    (computed,) = newer.run["models"][0]["computed"]
    assert computed["versions"]["torch"] == "999.0"


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
    assert (one["hardware"]["cpu"], one["units"]) == (here, {"pss": 2, "coefficients": 1})
    assert (other["hardware"]["cpu"], other["units"]) == ("another", {"pss": 2})
    assert other["versions"]["torch"] == "2.13.0+cu130"
    assert "a third" not in json.dumps(study.run)


def test_answers_and_coefficients_say_what_computed_them(store):
    model, questions = toy_loaded(), toy_questions(2)
    score_questions(replace(model, commit="c" * 40), questions, store=store)
    concept_coefficients(model, questions, store=store)
    records = [provenance.read_computed(path) for path in store.root.glob("v*/*/*")]
    commits = {record["unit"]: record["commit"] for record in records}
    assert commits == {"answers": "c" * 40, "coefficients": None}
    assert all(record["tokenizer"] == tokenizer_facts(model.tokenizer) for record in records)


def test_several_models_stand_in_one_study(store):
    questions = toy_questions(3)
    models = [toy_loaded("llama", name="one"), toy_loaded("gpt2", name="two", digest="1" * 64)]
    study = measure_pss(models, questions, SMALL, store=store)
    assert list(dict.fromkeys(study.pss["model"])) == ["one", "two"]
    assert [model["name"] for model in study.run["models"]] == ["one", "two"]
    for model in models:
        alone = measure_pss([model], questions, SMALL, store=Store(store.root / "new"))
        part = study.details[study.details["model"] == model.name].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone.details)
        assert all(torch.equal(study.masks[name], mask) for name, mask in alone.masks.items())


def test_unmasked_answers_equal_scoring_one_option_at_a_time(store):
    model, questions = toy_loaded("gpt2"), toy_questions(3)
    answers = score_questions(model, questions, store=store)
    again = score_questions(model, questions, store=store)
    pd.testing.assert_frame_equal(answers, again)
    assert list(answers["question_id"]) == [question.id for question in questions]
    view = value_vector_view(model.model)
    for question, row in zip(questions, answers.itertuples(), strict=True):
        expected = score_one_at_a_time(view, encode(model.tokenizer, question)).numpy()
        np.testing.assert_allclose(row.option_logprobs, expected, atol=1e-3)
        assert row.correct == (expected.argmax() == question.answer)
        lengths = [len(option) for option in question.options]
        assert row.correct_norm == ((expected / lengths).argmax() == question.answer)
        assert (row.concept, row.tier, row.fold) == (question.concept, question.tier, question.fold)


@pytest.mark.parametrize("front", ["", "<s> "])
def test_a_tokenizer_that_ends_texts_measures_as_one_that_does_not(store, tmp_path, front):
    """Coefficients and scores, at the prompt's last token too."""
    studies = []
    for name, template in (("bare", f"{front}$A"), ("ending", f"{front}$A </s>")):
        path = save_toy(tmp_path / name, template=template)
        choices = SMALL.model_copy(update={"position": "last"})
        studies.append(measure_pss([str(path)], toy_questions(3), choices, store=store))
    bare, ending = studies
    assert bare.run["models"][0]["digest"] != ending.run["models"][0]["digest"]
    for one, other in ((bare.pss, ending.pss), (bare.details, ending.details)):
        pd.testing.assert_frame_equal(one.drop(columns="model"), other.drop(columns="model"))
    masks = zip(bare.masks.values(), ending.masks.values(), strict=True)
    assert all(torch.equal(one, other) for one, other in masks)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_stored_coefficients_are_those_recorded(store, position):
    model, questions = toy_loaded(), toy_questions(4)
    expected = record_concepts(
        value_vector_view(model.model), model.tokenizer, questions, position=position
    )
    for _ in range(2):
        stored = concept_coefficients(model, questions, Choices(position=position), store=store)
        assert stored.concepts == expected.concepts
        assert torch.equal(stored.sums, expected.sums)
        assert torch.equal(stored.counts, expected.counts)


# Refusals


@pytest.mark.parametrize(
    ("models", "questions", "choices", "message"),
    [
        ([], toy_questions(3), SMALL, "models: none given"),
        (["toy"], toy_questions(1), SMALL, r"questions on 1 concept\(s\): at least 2 are needed"),
        (["toy"], [], SMALL, r"questions on 0 concept\(s\)"),
        (
            ["toy"],
            [q for q in toy_questions(3) if q.concept != "beta" or q.fold == 1],
            SMALL,
            "'beta' has questions of fold 1 alone",
        ),
        (["toy"], toy_questions(3), Choices(general=21), "general 21: only 20 questions"),
        (["toy", "toy"], toy_questions(3), SMALL, "model 'toy': given twice"),
        (["toy", "no-such-model"], toy_questions(3), SMALL, "model 'no-such-model': not in"),
        (["toy", "no/such.gguf"], toy_questions(3), SMALL, "'no/such.gguf': not in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    store, models, questions, choices, message
):
    models = [toy_loaded() if model == "toy" else model for model in models]
    with pytest.raises(InputError, match=message) as caught:
        measure_pss(models, questions, choices, store=store)
    assert "\n" not in str(caught.value)
    assert not store.root.exists()
