"""The causal study on toy models: its tables are what independent training and scoring give."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.parallel import workers
from paramspec.execution.store import Store
from paramspec.method import generation
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices
from paramspec.method.scoring import encode, mark
from paramspec.models.load import load_model
from paramspec.stats.methods import MEASURES, best_rates, measure_methods, run_means
from paramspec.studies import causal, evaluation, runner
from paramspec.studies.causal import (
    Run,
    causal_runs,
    measure_runs,
    rate_runs,
    trained_concepts,
)
from paramspec.studies.evaluation import Evaluation
from paramspec.studies.finetune import finetune
from paramspec.studies.training import METHODS, Training
from toy_study import save_toy, toy_questions, toy_tokenizer

QUESTIONS = toy_questions()
TAUGHT = ("alpha", "delta", "sigma")
TRAINING = Training(
    method="FT-PV", concepts=TAUGHT, share=0.25, statements=2, epochs=2, batch=8, learning_rate=0.02
)
FULL = Evaluation(
    others=10, open_ended="cloze", stated=6, left_out=4, prose=2, sampled=6, samples=3,
    choices=Choices(ratios=(0.1, 0.3), folds=(1,), general=4, nulls=("random",)),
)  # fmt: skip
METHOD_RUNS = causal_runs(TRAINING, FULL, seeds=2)
NAMES = ["original", *(f"{method}/{seed}" for seed in (0, 1) for method in METHODS)]
RUNS = [
    *METHOD_RUNS,
    Run("other", TRAINING.model_copy(update={"rule": "other"}), Evaluation(stated=2)),
    Run("alone", TRAINING.model_copy(update={"concepts": ("alpha",)}), Evaluation()),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_toy(tmp_path_factory.mktemp("models") / "toy", "llama"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def study(model, store):
    return measure_runs(model, QUESTIONS, RUNS, store=store)


@pytest.fixture
def measure(model, tmp_path):
    """`measure(run)`: runs in a store of their own."""
    return lambda *runs: measure_runs(model, QUESTIONS, runs, store=Store(tmp_path))


def original(**asked):
    return Run("x", TRAINING, Evaluation(**asked), original=True)


@pytest.mark.parametrize("method", METHODS)
def test_tables_are_those_of_the_model_that_finetune_saves(method, model, study, tmp_path):
    """Trained again, saved and loaded as any model: options, samples and the states of greedy
    answers, by plain forward passes."""
    finetune(model, QUESTIONS, TRAINING.model_copy(update={"method": method}), tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    view, name = value_vector_view(loaded.model), f"{method}/0"
    answers, generated, samples = (
        table[table["run"] == name].set_index("question_id")
        for table in (study.answers, study.generated, study.samples)
    )
    before = study.answers[study.answers["run"] == "original"].set_index("question_id")
    assert len(answers) == 30 + 10
    assert samples["concept"].value_counts().to_dict() == dict.fromkeys(TAUGHT, 2)

    @torch.no_grad()
    def read(prompt, words):
        output = loaded.model(torch.tensor([prompt + words]), output_hidden_states=True)
        logits = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        likelihood = logits.gather(1, torch.tensor(words)[:, None]).sum()
        return float(likelihood), output.hidden_states[-1][0, -2]

    moved = compared = 0
    for question in (q for q in QUESTIONS if q.id in answers.index):
        expected = score_one_at_a_time(view, encode(loaded.tokenizer, question))
        stored = answers.loc[question.id]
        np.testing.assert_allclose(stored["option_logprobs"], expected, atol=1e-4)
        right = mark(expected.tolist(), question)["correct_norm"]
        assert (stored["correct_norm"], stored["trained"]) == (right, question.concept in TAUGHT)
        moved += not np.allclose(before.loc[question.id, "option_logprobs"], expected, atol=1e-3)
        if question.id not in samples.index:
            continue
        prompt, row = loaded.tokenizer.encode(question.cloze), samples.loc[question.id]
        said = zip(row["answers"], row["log_likelihoods"], row["tokens"], strict=True)
        for answer, likelihood, tokens in said:
            words = loaded.tokenizer.encode(answer)
            if len(words) == tokens:  # not if its end, or a special token, is not in the words
                assert likelihood == pytest.approx(read(prompt, words)[0], abs=1e-3)
                compared += 1
        words = loaded.tokenizer.encode(generated.loc[question.id, "answer"])
        if len(words) == 12:  # cut off: the state is that before the last token
            state = generated.loc[question.id, "state"]
            np.testing.assert_allclose(state, read(prompt, words)[1], atol=1e-4)
            compared += 1
    assert moved > 20
    assert compared > 0


def test_likelihoods_are_the_models_own_loss(model, study):
    """transformers' loss of one text at a time; prose is the shipped text, in pieces of 128."""
    loaded = load_model(model)

    def nats(row):
        batch = torch.tensor([row])
        return float(loaded.model(input_ids=batch, labels=batch).loss) * (len(row) - 1)

    of = dict(iter(study.texts[study.texts["run"] == "original"].groupby("kind")))
    prose = loaded.tokenizer.encode(evaluation.PROSE.read_text())
    expected = [nats(prose[:128]), nats(prose[128:256])]
    assert list(of["prose"]["tokens"]) == [127, 127]
    np.testing.assert_allclose(of["prose"]["nats"], expected, atol=0.02)
    others = [q.statements[0] for q in QUESTIONS if q.concept not in TAUGHT]
    possible = np.array([nats(loaded.tokenizer.encode(text)) for text in others])
    assert len(of["statements"]) == 6
    for found in of["statements"]["nats"]:
        assert np.abs(possible - found).min() < 1e-3
    last = [q.statements[-1] for q in QUESTIONS if q.concept in TAUGHT]
    possible = np.array([nats(loaded.tokenizer.encode(text)) for text in last])
    assert len(of["left out"]) == 4
    for found in of["left out"]["nats"]:
        assert np.abs(possible - found).min() < 1e-3


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_every_passage_begins_with_what_the_tokenizer_puts_in_front(template):
    front = [1] if "<s>" in template else []
    prose, size = toy_tokenizer().encode(evaluation.PROSE.read_text()), 128 - len(front)
    expected = [[*front, *prose[start : start + size]] for start in (0, size, 2 * size)]
    assert evaluation._passages(toy_tokenizer(template), 3) == expected


def test_all_runs_are_asked_the_same_and_others_are_others(study):
    assert [run.name for run in METHOD_RUNS] == NAMES
    asked = {name: tuple(part["question_id"]) for name, part in study.answers.groupby("run")}
    assert len({asked[name] for name in NAMES}) == 1
    others = study.answers[~study.answers["trained"]]
    assert not others["concept"].isin(TAUGHT).any()
    assert set(study.details["mask_concept"]) == set(TAUGHT)
    assert set(study.details["model"]) == set(NAMES)
    table = study.runs.set_index("run")
    assert table.loc["FT-PV/0", "parameters"] == table.loc["FT-RV/0", "parameters"]
    together = table.loc["FT-PV/0", "vectors"] + table.loc["FT-CV/0", "vectors"]
    assert together == table.loc["FT-FV/0", "vectors"]
    assert set(study.losses["run"]) == set(table.index) - {"original"}
    for name, part in study.losses.groupby("run"):
        assert list(part["step"]) == list(range(1, table.loc[name, "steps"] + 1))
        assert part["loss"].iloc[0] == table.loc[name, "loss_first"]


@pytest.mark.parametrize("position", ["mean", "last"])
def test_pss_is_measured_as_its_choices_say(position, measure, monkeypatch):
    """Masks are chosen by coefficients of the questions asked; unrelated questions are on concepts
    that were not trained on."""
    recorded, measured, real = [], [], evaluation.measure_concepts

    def note_record(view, tokenizer, questions, **options):
        recorded.append((options, {question.fold for question in questions}))
        return record_concepts(view, tokenizer, questions, **options)

    def note_measure(*given, **options):
        measured.append(real(*given, **options))
        return measured[-1]

    monkeypatch.setattr(evaluation, "record_concepts", note_record)
    monkeypatch.setattr(evaluation, "measure_concepts", note_measure)
    choices = FULL.choices.model_copy(update={"position": position, "batch_tokens": 12})
    measure(original(others=10, folds=(1,), choices=choices))
    asked = {"position": position, "chat": False, "batch_tokens": 12}
    assert recorded == [(asked, {1})]
    details = measured[0].details
    about = details["question_id"].map({question.id: question.concept for question in QUESTIONS})
    own = details["role"] == "concept"
    assert (about[own] == details.loc[own, "mask_concept"]).all()
    assert set(about[own]) == set(TAUGHT)
    assert len(about[~own]) > 0
    assert not set(about[~own]) & set(TAUGHT)


def test_a_rerun_trains_and_asks_nothing(model, store, study, monkeypatch):
    monkeypatch.setattr(causal, "tune", None)
    asked = Run("x", TRAINING, Evaluation(folds=(0,), others=5))  # which is one more question
    answers = measure_runs(model, QUESTIONS, [asked], store=store).answers
    assert len(answers) == 15 + 5
    monkeypatch.setattr(runner, "load_model", None)
    renamed = [dataclasses.replace(run, name=f"again {run.name}") for run in RUNS]
    again = measure_runs(model, QUESTIONS, renamed, store=store)
    for table in ("answers", "generated", "texts", "details", "losses", "samples"):
        both = (getattr(each, table) for each in (study, again))
        both = (each.drop(columns=["run", "model"], errors="ignore") for each in both)
        pd.testing.assert_frame_equal(*both)
    assert set(again.details["model"]) == set(again.details["run"])
    assert all(torch.equal(study.vectors[r.name], again.vectors[f"again {r.name}"]) for r in RUNS)


def test_what_is_large_is_trained_again_to_the_same_bits(measure, study, tmp_path, monkeypatch):
    monkeypatch.setattr(causal, "KEPT", 0)
    expected = study.answers[study.answers["run"] == "FT-PV/0"].reset_index(drop=True)
    for stated in (0, 2):
        again = measure(Run("FT-PV/0", TRAINING, Evaluation(others=10, stated=stated)))
        pd.testing.assert_frame_equal(again.answers, expected, check_exact=True)
    units = [json.loads(key.read_text())["unit"] for key in tmp_path.rglob("key.json")]
    assert sorted(units) == ["causal", "causal", "coefficients"]


def test_a_page_says_what_trained_and_what_evaluated(measure, tmp_path, monkeypatch):
    """Trained on one machine, asked one more thing on another; a third one has all in the store."""
    for stated, cpu in ((0, "one"), (2, "another"), (2, "a third")):
        used = tmp_path / f"used on {cpu}"
        monkeypatch.setenv(provenance.USED, str(used))
        monkeypatch.setattr(provenance, "hardware", lambda cpu=cpu: {"cpu": cpu, "gpus": []})
        measure(Run("x", TRAINING, Evaluation(others=10, stated=stated)))
    records = provenance.used_results(used)["computed"]
    found = {record["hardware"]["cpu"]: record["units"] for record in records}
    assert found == {"one": {"finetune": 1}, "another": {"causal": 1}}


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (causal, "FINETUNE_VERSION", 99),
        (evaluation, "EVALUATION_VERSION", 99),
        (generation, "GENERATION_VERSION", 99),
        (generation, "MAX_NEW_TOKENS", 3),
        (generation, "OPEN_PROMPT", "{question}:"),
        (evaluation, "PASSAGE_TOKENS", 64),
        (evaluation, "PROSE", evaluation.PROSE.with_suffix(".md")),
    ],
)
def test_other_code_is_another_result(module, name, value, monkeypatch):
    run = Run("x", TRAINING, FULL.model_copy(update={"open_ended": "question"}))
    before = run.key()
    monkeypatch.setattr(module, name, value)
    assert run.key() != before


@pytest.mark.slow
def test_workers_give_the_same_tables(study, measure):
    with workers(jobs=2):
        other = measure(*RUNS[:3])
    for table in ("answers", "generated", "details"):
        expected = getattr(study, table).drop(columns="option_logprobs", errors="ignore")
        expected = expected[expected["run"].isin(NAMES[:3])].reset_index(drop=True)
        pd.testing.assert_frame_equal(getattr(other, table)[list(expected)], expected)


def test_a_model_is_loaded_once_for_all_runs_and_not_kept(measure, monkeypatch):
    loaded, load = [], runner.load_model
    monkeypatch.setattr(runner, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    measure(Run("trained", TRAINING, Evaluation()), original())
    assert len(loaded) == 1
    assert not runner._HELD


def test_bad_input_is_told_before_any_training(measure, monkeypatch):
    monkeypatch.setattr(runner, "hand_out", None)
    unknown = TRAINING.model_copy(update={"concepts": ("Atlantis",)})
    for runs, message in (
        ([RUNS[1], RUNS[1]], "'FT-FV/0' is given twice"),
        ([Run("x", unknown, FULL)], "'Atlantis': no statements"),
        ([Run("x", unknown, FULL, original=True)], "'Atlantis'"),
        ([Run("x", TRAINING.model_copy(update={"statements": 9}), FULL)], "a fact's last"),
    ):
        with pytest.raises(InputError, match=message):
            measure(*runs)
    with pytest.raises(InputError, match="concepts 9: expected 1 to 3"):
        trained_concepts(QUESTIONS, 9)


def test_a_diverging_run_is_named_and_the_others_are_kept(measure, monkeypatch):
    wild = Run("wild", TRAINING.model_copy(update={"learning_rate": 1e37}), Evaluation())
    calm = Run("calm", TRAINING, Evaluation())
    with pytest.raises(InputError, match=r": wild: training diverged: "):
        measure(calm, wild)
    monkeypatch.setattr(causal, "tune", None)
    assert len(measure(calm).answers) == 30


def test_each_method_takes_the_rate_that_leaves_most_likely_what_was_left_out(measure):
    """A rate of nearly nothing teaches nothing: the loss is that of the original."""
    rates = (1e-9, 0.01)
    runs = rate_runs(TRAINING, rates, left_out=30)
    assert [run.training.learning_rate for run in runs] == [*rates] * len(METHODS)
    tried = measure(original(left_out=30), *runs)
    assert best_rates(tried) == dict.fromkeys(METHODS, 0.01) | {"original": 0.0}
    nats = tried.texts.groupby("run")["nats"].sum()
    for method in METHODS:
        assert nats[f"{method}/rate 1e-09"] == pytest.approx(nats["x"], rel=1e-5)
        assert nats[f"{method}/rate 0.01"] < nats["x"]
    chosen = causal_runs(TRAINING, Evaluation(), seeds=1, rates={"FT-PV": 0.01})
    found = {run.training.method: run.training.learning_rate for run in chosen[1:]}
    assert found == {"FT-FV": 0.02, "FT-PV": 0.01, "FT-CV": 0.02, "FT-RV": 0.02}


@pytest.mark.parametrize("name", ["prose", "others"])
def test_more_than_there_is_is_refused(measure, name):
    """A passage that is cut short, or empty, would be a likelihood of something else."""
    with pytest.raises(InputError, match=f"x: {name} 1000: "):
        measure(original(**{name: 1000}))


def answer_table(runs):
    rows = [(run, f"c{concept}") for run in runs for concept in range(10) for _ in range(8)]
    table = pd.DataFrame(rows, columns=["run", "concept"])
    return table.assign(right=np.random.default_rng(0).random(len(rows)))


def test_differences_are_paired_and_need_the_same_concepts():
    """Two runs that differ by the same in every concept have a difference without spread."""
    table = answer_table(["a"])
    both = pd.concat([table, table.assign(run="b", right=table["right"] + 0.1)])
    found = run_means(both, "right")
    apart = found["b"] - found["a"]
    assert apart.values == pytest.approx(0.1)
    assert np.allclose(apart.moves, 0)
    assert abs(found["a"].moves).max() > 0.001
    with pytest.raises(InputError, match="run 'b': lacks a concept"):
        run_means(both[(both["run"] == "a") | (both["concept"] != "c3")], "right")


def test_a_weighted_mean_is_a_ratio_of_sums():
    nats, tokens = np.array([10.0, 2.0, 6.0]), np.array([5, 4, 1])
    table = pd.DataFrame({"run": "a", "text": [0, 1, 2], "nats": nats, "tokens": tokens})
    found = run_means(table, "nats", weight="tokens", unit="text")["a"]
    assert found.values == pytest.approx(18 / 10)
    assert found.moves == pytest.approx((nats - 1.8 * tokens) / 10)


def interval_of(rows, measure, method):
    (row,) = rows[(rows["measure"] == measure) & (rows["method"] == method)].to_dict("records")
    assert not row["low"] > row["value"]
    assert not row["high"] < row["value"]
    return row["value"]


def test_measures_are_those_of_the_tables(study):
    measures = measure_methods(study, NAMES)
    assert list(dict.fromkeys(measures["measure"])) == list(MEASURES)
    answers = study.answers[study.answers["run"].isin(["FT-RV/0", "FT-RV/1"])]
    for measure, part in {
        "multiple choice": answers[answers["trained"]],
        "other concepts": answers[~answers["trained"]],
    }.items():
        found = interval_of(measures, measure, "FT-RV")
        assert found == pytest.approx(part["correct_norm"].mean())
        methods = measures.loc[measures["measure"] == measure, "method"]
        assert set(methods) == {"original", *METHODS}
    generated, texts, details = (
        table[table["run"] == "original"] for table in (study.generated, study.texts, study.details)
    )
    prose = texts[texts["kind"] == "prose"]
    expected = {"open-ended": generated["correct"].mean()}
    expected["prose"] = prose["nats"].sum() / prose["tokens"].sum()
    means = details.groupby(["mask", "ratio", "role"])["correct_norm"].mean().unstack("role")
    gaps = means["general"] - means["concept"]
    before = means.loc[("none", 0), "general"]
    expected["PSS pooled"] = gaps["concept"].abs().max() / before
    expected["diff. in diff."] = (gaps["concept"].mean() - gaps["none"].mean()) / before
    for measure, value in expected.items():
        assert interval_of(measures, measure, "original") == pytest.approx(value)
    gains = measure_methods(study, NAMES, minuend="FT-PV")
    assert not gains["measure"].isin(["PSS pooled", "PSS per concept"]).any()
    for measure in ("multiple choice", "diff. in diff.", "prose"):
        pv, rv = (interval_of(measures, measure, method) for method in ("FT-PV", "FT-RV"))
        assert interval_of(gains, measure, "FT-RV") == pytest.approx(pv - rv)
