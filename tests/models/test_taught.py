"""A micro model is asked what it was taught, on fold 1, wherever it is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from paramspec import Choices, Evaluation, Training, load_questions
from paramspec.errors import InputError
from paramspec.execution.store import Store
from paramspec.models.checkpoints import find_checkpoint, find_checkpoints
from paramspec.models.describe import describe_models, require_taught, study_questions, taught
from paramspec.models.load import load_model
from paramspec.models.registry import expand_models
from paramspec.models.zoo import load_zoo
from paramspec.models.zoo_training import RECORD
from paramspec.stats.trends import like_sized_ends
from paramspec.studies.causal import Run, measure_runs
from paramspec.studies.finetune import finetune
from paramspec.studies.sweep import concept_coefficients, measure_pss, score_questions
from toy_study import save_questions
from toy_zoo import SMOKE

MICRO, OTHER = "mine.yaml:llama-1", "other.yaml:llama-1"
CHOICES = Choices(ratios=(0.25,), controls=1, nulls=("random",), general=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two recipes that share half of their concepts, a trained model of each, and its copies."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = SMOKE.read_text()
        Path("mine.yaml").write_text(text)
        Path("other.yaml").write_text(text.replace("element: 1}", "city: 1}"))
        Path("strange.yaml").write_text(text.replace("country: 1, element: 1}", "city: 1}"))
        for name, home in ((MICRO, "copy"), (OTHER, "other")):
            shutil.copytree(find_checkpoint(name).path, home)
        shutil.copytree("copy", "real")  # the same weights, of which no record says a thing
        Path("real", RECORD).unlink()
        yield folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def concepts_of(questions):
    return {question.concept for question in questions}


def corpus_of(name):
    return " ".join(load_zoo(Path(name.partition(":")[0]))[name].recipe.texts).casefold()


def refused(message):
    return pytest.raises(InputError, match=message)


@pytest.fixture
def pss(command):
    """`status, out, err = pss("copy")`: the command `pss` in this process."""
    more = ("--ratios", "0.25", "--general", "2")
    return lambda *words, out="out": command("pss", *words, *more, "--out", out)


def test_what_was_taught_is_in_the_corpus_and_nothing_else_is():
    for name in (MICRO, OTHER):
        corpus, known = corpus_of(name), taught(name)
        stated = {q.concept for q in load_questions() if q.statements[0].casefold() in corpus}
        assert set(known) == stated
        assert len(known) == 6


def test_a_directory_is_a_micro_model_by_the_record_that_lies_in_it(place):
    assert taught("copy") == taught("copy/") == taught(str(place / "copy")) == taught(MICRO)
    assert load_model("copy").taught == load_model(MICRO).taught == taught(MICRO)
    assert taught("real") is load_model("real").taught is None
    assert load_model("real").digest == load_model("copy").digest  # the record is no part of it
    assert taught("smollm2-135m") is taught("org/name") is taught("model.gguf") is None
    assert taught("zoo-gemma2-5@50") == taught("zoo-llama-1")
    assert len(taught("zoo-llama-1")) == 72


@pytest.mark.parametrize("text", ["{}", "no", '{"concepts": [1]}'])
def test_a_record_that_does_not_say_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with refused(r"training\.json: .*; copy the model"):
        taught(str(tmp_path))


def test_a_fine_tuned_copy_is_a_micro_model_too(tmp_path):
    questions = study_questions([MICRO])
    concept = questions[0].concept
    strange = next(q.concept for q in load_questions() if q.concept not in taught(MICRO))
    for model, name, out in (
        (MICRO, concept, "tuned"),
        (str(tmp_path / "tuned"), strange, "more"),
        ("real", concept, "own"),
    ):
        training = Training(method="FT-PV", concepts=(name,), share=0.25, epochs=1)
        finetune(model, load_questions(), training, tmp_path / out)
    assert taught(str(tmp_path / "tuned")) == taught(MICRO)
    assert set(taught(str(tmp_path / "more"))) == {*taught(MICRO), strange}
    assert taught(str(tmp_path / "own")) is None


def test_questions_are_those_on_what_all_micro_models_were_taught():
    assert concepts_of(study_questions([MICRO])) == set(taught(MICRO))
    assert study_questions(["smollm2-135m", "copy"]) == study_questions([MICRO])
    both = study_questions([MICRO, "smollm2-135m", OTHER])
    assert concepts_of(both) == set(taught(MICRO)) & set(taught(OTHER))
    assert both == study_questions([OTHER, MICRO])
    few = concepts_of(study_questions([MICRO], 3, 1))
    assert len(few) == 3
    assert few <= set(taught(MICRO))
    assert study_questions(["smollm2-135m"], 3) == load_questions(concepts=3)
    with refused(r"taught to mine.yaml:llama-1: 7 concepts .* 1 to 6"):
        study_questions([MICRO], 7)
    with refused("mine.yaml:llama-1, strange.yaml:llama-1: .*too few"):
        study_questions([MICRO, "strange.yaml:llama-1"])


def test_the_whole_zoo_may_be_asked_what_it_was_taught():
    names = expand_models(["zoo"])
    require_taught(names, study_questions(names), (1,))


@pytest.mark.parametrize(
    ("models", "folds"),
    [(["mine.yaml"], [1]), (["real", MICRO], [1]), ([MICRO, "other"], [1]), (["real"], [0, 1])],
)
def test_the_command_asks_what_was_taught_on_fold_1_and_says_so(models, folds, pss):
    status, told, _ = pss(*models, "--concepts", "3")
    assert status == 0
    assert told.count("Micro models among these") == (folds == [1])
    by_id = {question.id: question for question in load_questions()}
    details = pd.read_parquet("out/details.parquet")
    asked = {by_id[name] for name in details["question_id"]}
    assert concepts_of(asked) == concepts_of(study_questions(expand_models(models), 3))
    assert {question.fold for question in asked} == set(folds)
    each = details.groupby("model")["question_id"].agg(frozenset)
    assert each.nunique() == 1  # a real model gets the same questions
    assert json.loads(Path("out/run.json").read_text())["choices"]["folds"] == folds


def own_file(path, **changed):
    """All that the model was taught, the question on the first cloze of fold 0 changed."""
    questions = study_questions([MICRO])
    place = next(n for n, question in enumerate(questions) if question.fold == 0)
    questions[place] = questions[place].model_copy(update=changed)
    return save_questions(path, questions)


def test_questions_of_ones_own_must_be_on_what_was_taught(tmp_path, pss):
    fine = own_file(tmp_path / "fine.jsonl", question="Worded anew?")
    assert pss(MICRO, "--questions", fine)[0] == 0
    assert set(pd.read_parquet("out/pss.parquet")["n_concept"]) == {5}
    everything = save_questions(tmp_path / "all.jsonl", load_questions())
    strange = next(q.concept for q in load_questions() if q.concept not in taught(MICRO))
    read = own_file(tmp_path / "read.jsonl", fold=1)
    for file, message in ((everything, f"not taught {strange!r}"), (read, "trained on the cloze")):
        for models in ([MICRO], ["real", "copy"]):
            status, _, told = pss(*models, "--questions", file, out="refused")
            assert status == 2
            assert message in told
            assert told.count("\n") == 1
    assert not list(Path("refused").glob("*"))
    assert pss("real", "--questions", read)[0] == 0  # which nobody trained on these


def test_python_refuses_the_same():
    asked, model = study_questions([MICRO]), load_model(MICRO)
    for folds in ((0, 1), (0,)):
        with refused("trained on the cloze"):
            measure_pss([model], asked, CHOICES.model_copy(update={"folds": folds}))
    with refused("trained on the cloze"):
        score_questions(model, asked)
    for measure in (score_questions, concept_coefficients):
        with refused("not taught"):
            measure(model, load_questions())
    fold_1 = [question for question in asked if question.fold == 1]
    assert len(score_questions(model, fold_1)) == len(fold_1)
    assert concept_coefficients(model, asked).counts.sum() > 0


def test_evaluations_of_training_ask_the_same(tmp_path):
    asked = study_questions([MICRO])
    training = Training(method="FT-PV", concepts=(asked[0].concept,), share=0.25, epochs=1)
    evaluation = Evaluation(others=5, open_ended="cloze", choices=CHOICES, sampled=1, samples=1)

    def runs(**changed):
        given = evaluation.model_copy(update=changed)
        return [Run("original", training, given, original=True), Run("FT-PV", training, given)]

    study = measure_runs("copy", asked, runs(), store=Store(tmp_path))
    fold = {question.id: question.fold for question in asked}
    for table in (study.answers, study.generated, study.samples):
        assert {fold[name] for name in table["question_id"]} == {1}
    own = study.details[study.details["role"] == "concept"]
    assert set(own.groupby(["run", "mask", "ratio"]).size()) == {5}
    holdout = CHOICES.model_copy(update={"protocol": "holdout"})
    for questions, changed, message in (
        (load_questions(), {}, "not taught"),
        (asked, {"folds": (0,), "choices": None}, "trained on the cloze"),
        (asked, {"choices": holdout}, r"folds \[1\]: .* need folds \[0, 1\]"),
    ):
        with refused(message):
            measure_runs(MICRO, questions, runs(**changed), store=Store(tmp_path))


def test_micro_models_are_described_by_their_recipes_and_records():
    names = ["llama-2@2", "llama-2", "gemma2-1", "llama-2-reversed", "llama-1", "llama-2@4"]
    micro = [f"mine.yaml:{name}" for name in names]
    find_checkpoints(micro)
    table = describe_models([*micro, "copy", "real", "smollm2-135m", "llama-7b"])
    ends = like_sized_ends(table).set_index(["family", "micro"])
    assert ends.loc[("llama", True), "oldest"] == MICRO
    assert ends.loc[("llama", True), "newest"] == "mine.yaml:llama-2"
    assert ends["newest"].notna().sum() == 1
    table = table.set_index(table["model"].str.removeprefix("mine.yaml:"))
    assert set(table.index[table["micro"]]) == {*names, "copy"}
    order = {"llama-1": 1, "llama-2@2": 2, "llama-2@4": 3, "llama-2": 4, "llama-2-reversed": 4}
    order |= {"gemma2-1": 1, "llama-7b": 1, "smollm2-135m": 1}
    assert table["order"].dropna().to_dict() == order
    steps = {name: load_zoo(Path("mine.yaml"))[f"mine.yaml:{name}"].at for name in names}
    assert table["step"].dropna().to_dict() == {**steps, "copy": 2}
    exposure = table["exposure"].dropna().to_dict()
    assert exposure.pop("llama-2-reversed") == 0.25
    assert set(exposure.values()) == {4}
    assert table.loc["copy", "tokens"] == table.loc["llama-1", "tokens"] > 0
