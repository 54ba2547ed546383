"""The causal study on toy models: its tables are what independent training and scoring give."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from oracles import score_one_at_a_time
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.parallel import workers
from paramspec.execution.store import Store
from paramspec.method import masks
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import record_concepts
from paramspec.method.pss import Choices
from paramspec.method.scoring import choose, encode
from paramspec.models.load import load_model
from paramspec.stats.bootstrap import interval
from paramspec.stats.methods import MEASURES, measure_methods, over_seeds, resample_runs
from paramspec.studies import causal, evaluation, runner
from paramspec.studies.causal import Run, causal_runs, measure_runs, trained_concepts
from paramspec.studies.evaluation import Evaluation
from paramspec.studies.finetune import finetune
from paramspec.studies.training import METHODS, Training
from toy_study import save_toy, toy_questions, toy_tokenizer

TAUGHT = ("alpha", "delta", "sigma")
TRAINING = Training(
    method="FT-PV", concepts=TAUGHT, share=0.25, statements=2, epochs=2, batch=8, learning_rate=0.02
)
FULL = Evaluation(
    others=10,
    open_ended="cloze",
    stated=6,
    prose=2,
    choices=Choices(ratios=(0.1, 0.3), folds=(1,), general=4, nulls=("random",)),
    sampled=6,
    samples=3,
)


@pytest.fixture(scope="module")
def questions():
    """Each fact stated twice, in other words than its cloze."""
    return [
        q.model_copy(
            update={
                "statements": tuple(
                    f"{age} {q.relation} {q.concept} {q.options[q.answer]}"
                    for age in ("old", "new")
                )
            }
        )
        for q in toy_questions()
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("models") / "toy", "llama")


@pytest.fixture(scope="module")
def runs():
    return causal_runs(TRAINING, FULL, seeds=2, doses=[0.5], rules=["other"], rates=[2], alone=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def study(model, questions, runs, store):
    return measure_runs(
        str(model), questions, [r for part in runs.values() for r in part], store=store
    )


def own(questions):
    return [question for question in questions if question.concept in TAUGHT]


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_model_that_finetune_saves(
    method, model, questions, study, tmp_path
):
    """Trained again into a directory, loaded as any model, scored an option at a time."""
    finetune(
        str(model), questions, TRAINING.model_copy(update={"method": method}), tmp_path / "out"
    )
    loaded = load_model(str(tmp_path / "out"))
    view = value_vector_view(loaded.model)
    answers = study.answers[study.answers["run"] == f"{method}/0"].set_index("question_id")
    assert len(answers) == 30 + 10
    moved = 0
    for question in questions:
        if question.id not in answers.index:
            continue
        expected = score_one_at_a_time(view, encode(loaded.tokenizer, question))
        stored = answers.loc[question.id]
        np.testing.assert_allclose(stored["option_logprobs"], expected, atol=1e-4)
        right = choose(expected.tolist(), question.options).by_characters == question.answer
        assert stored["correct_norm"] == right
        assert stored["trained"] == (question.concept in TAUGHT)
        before = study.answers.query("run == 'original' and question_id == @question.id")
        moved += not np.allclose(before["option_logprobs"].iloc[0], expected, atol=1e-3)
    assert moved > 20


def test_likelihoods_are_the_models_own_loss(model, study, questions):
    """transformers' loss of one text at a time; prose is the shipped text, in pieces of 128."""
    loaded = load_model(str(model))
    texts = study.texts[study.texts["run"] == "original"]
    prose = loaded.tokenizer.encode(evaluation.PROSE.read_text())
    rows = [prose[:128], prose[128:256]]
    for nats, tokens, row in zip(
        *(texts.loc[texts["kind"] == "prose", c] for c in ("nats", "tokens")), rows, strict=True
    ):
        batch = torch.tensor([row])
        expected = float(loaded.model(input_ids=batch, labels=batch).loss)
        assert (tokens, nats / tokens) == (127, pytest.approx(expected, abs=1e-4))
    stated = {
        loaded.tokenizer.decode(loaded.tokenizer.encode(text))
        for q in questions
        if q.concept not in TAUGHT
        for text in q.statements
    }
    losses = []
    for text in stated:
        batch = torch.tensor([loaded.tokenizer.encode(text)])
        losses.append(float(loaded.model(input_ids=batch, labels=batch).loss) * (batch.numel() - 1))
    taken = texts.loc[texts["kind"] == "statements", "nats"]
    assert len(taken) == 6
    for nats in taken:
        assert min(abs(nats - loss) for loss in losses) < 1e-3


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_every_passage_begins_with_what_the_tokenizer_puts_in_front(template):
    passages = evaluation._passages(toy_tokenizer(template), 3)
    front = [1] if "<s>" in template else []
    assert all(row[: len(front)] == front and 2 not in row for row in passages)
    assert [len(row) for row in passages] == [128] * 3
    prose = toy_tokenizer().encode(evaluation.PROSE.read_text())
    joined = [token for row in passages for token in row[len(front) :]]
    assert joined == prose[: len(joined)]


def test_all_runs_are_asked_the_same_and_others_are_others(study, runs):
    full = [run.name for run in runs["methods"]]
    asked = {name: tuple(part["question_id"]) for name, part in study.answers.groupby("run")}
    assert len({asked[name] for name in full}) == 1
    others = study.answers[~study.answers["trained"]]
    assert not others["concept"].isin(TAUGHT).any()
    assert set(study.pss["concept"]) == set(TAUGHT)
    assert set(study.pss["model"]) == set(full)


def test_unrelated_questions_are_on_concepts_not_trained(model, questions, monkeypatch, tmp_path):
    """PSS after training compares with what was not trained: seen in what is scored."""
    scored = []
    real = evaluation.measure_concepts

    def note(*arguments, **options):
        scored.append(real(*arguments, **options))
        return scored[-1]

    monkeypatch.setattr(evaluation, "measure_concepts", note)
    run = Run("original", None, FULL, TAUGHT)
    measure_runs(str(model), questions, [run], store=Store(tmp_path))
    details = pd.concat([tables.details for tables in scored])
    assert set(details["mask_concept"]) == set(TAUGHT)
    about = details["question_id"].map({question.id: question.concept for question in questions})
    own = details["role"] == "concept"
    assert (about[own] == details.loc[own, "mask_concept"]).all()
    assert len(about[~own]) > 0
    assert not set(about[~own]) & set(TAUGHT)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_pss_is_measured_as_its_choices_say(position, model, questions, tmp_path, monkeypatch):
    """The coefficients that masks are chosen by, against those of each question by itself."""
    seen, budgets = [], []
    real, batches = evaluation.measure_concepts, masks.prompt_batches

    def note(name, view, tokenizer, asked, concepts, choices, coefficients, **options):
        seen.append(coefficients)
        return real(name, view, tokenizer, asked, concepts, choices, coefficients, **options)

    def note_budget(prompts, batch_tokens):
        budgets.append(batch_tokens)
        return batches(prompts, batch_tokens)

    monkeypatch.setattr(evaluation, "measure_concepts", note)
    monkeypatch.setattr(masks, "prompt_batches", note_budget)
    choices = FULL.choices.model_copy(update={"position": position, "batch_tokens": 12})
    asked = Evaluation(others=10, folds=(1,), choices=choices)
    measure_runs(str(model), questions, [Run("x", None, asked, TAUGHT)], store=Store(tmp_path))
    assert set(budgets) == {12}
    loaded = load_model(str(model))
    view = value_vector_view(loaded.model)
    expected = {
        concept: sum(
            record_concepts(view, loaded.tokenizer, [q], position=position).sums[0, 1]
            for q in questions
            if (q.concept, q.fold) == (concept, 1)
        )
        for concept in TAUGHT
    }
    for concept in TAUGHT:
        found = seen[0].sums[seen[0].concepts.index(concept), 1]
        torch.testing.assert_close(found, expected[concept], atol=1e-4, rtol=1e-4)


def test_samples_and_states_are_those_of_the_trained_model(model, questions, study, tmp_path):
    """A sample's likelihood, and the state of a greedy answer, by one plain forward pass each."""
    training = TRAINING.model_copy(update={"method": "FT-FV", "seed": 1})
    finetune(str(model), questions, training, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    clozes = {question.id: question.cloze for question in questions}
    rows = study.samples[study.samples["run"] == "FT-FV/1"]
    assert len(rows) == 6
    assert rows["concept"].value_counts().to_dict() == dict.fromkeys(TAUGHT, 2)
    greedy = study.generated[study.generated["run"] == "FT-FV/1"].set_index("question_id")

    @torch.no_grad()
    def logits_and_states(tokens):
        output = loaded.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        return output.logits[0].log_softmax(-1), output.hidden_states[-1][0]

    for row in rows.itertuples():
        prompt = loaded.tokenizer.encode(clozes[row.question_id])
        for answer, likelihood, tokens in zip(
            row.answers, row.log_likelihoods, row.tokens, strict=True
        ):
            words = loaded.tokenizer.encode(answer)
            if len(words) != tokens:  # its end, or a special token, is not in the words
                continue
            logits, _ = logits_and_states(prompt + words)
            expected = sum(float(logits[len(prompt) + n - 1, words[n]]) for n in range(tokens))
            assert likelihood == pytest.approx(expected, abs=1e-3)
        found = greedy.loc[row.question_id]
        words = loaded.tokenizer.encode(found["answer"])
        if len(words) == 12:  # cut off: the state is that before the last token
            _, states = logits_and_states(prompt + words[:-1])
            np.testing.assert_allclose(found["state"], states[-1], atol=1e-4)


def test_losses_are_those_of_each_step(study):
    steps = study.runs.set_index("run")
    for name, part in study.losses.groupby("run"):
        assert list(part["step"]) == list(range(1, steps.loc[name, "steps"] + 1))
        assert part["loss"].iloc[0] == steps.loc[name, "loss_first"]
    assert set(study.losses["run"]) == set(study.runs["run"]) - {"original"}


def test_a_rerun_trains_and_asks_nothing(model, questions, runs, store, study, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(causal, "train", refuse)
    monkeypatch.setattr(runner, "load_model", refuse)
    flat = [run for part in runs.values() for run in part]
    renamed = [dataclasses.replace(run, name=f"again {run.name}") for run in flat]
    again = measure_runs(str(model), questions, renamed, store=store)
    for table in ("answers", "generated", "texts", "pss", "losses", "samples"):
        one, other = getattr(study, table), getattr(again, table)
        columns = [column for column in one if column not in ("run", "model")]
        pd.testing.assert_frame_equal(one[columns], other[columns])
    assert set(again.pss["model"]) == set(again.pss["run"])
    assert all(torch.equal(study.vectors[r.name], again.vectors[f"again {r.name}"]) for r in flat)


def test_a_run_says_what_trained_and_what_evaluated_it(model, questions, tmp_path, monkeypatch):
    """Trained on one machine, asked one more thing on another; a third one has all in the store."""
    asked = Evaluation(others=10)
    store = Store(tmp_path)
    measure_runs(str(model), questions, [Run("x", TRAINING, asked)], store=store)
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "another", "gpus": []})
    more = asked.model_copy(update={"stated": 2})
    measure_runs(str(model), questions, [Run("x", TRAINING, more)], store=store)
    monkeypatch.setattr(provenance, "hardware", lambda: {"cpu": "a third", "gpus": []})
    study = measure_runs(str(model), questions, [Run("x", TRAINING, more)], store=store)
    cpus = {}
    for record in study.computed:
        assert record["versions"]["torch"] == version("torch")
        assert record["tokenizer"]["eos"]["token"] == "</s>"
        for unit in record["units"]:
            assert unit["run"] == "x"
            cpus[unit["unit"]] = record["hardware"]["cpu"]
    assert cpus.pop("evaluation") == "another"
    assert set(cpus) == {"training"}
    assert cpus["training"] not in ("another", "a third")


def test_other_versions_train_and_ask_anew(
    model, questions, tmp_path, monkeypatch, pretend_versions
):
    run = Run("x", TRAINING, Evaluation())
    measure_runs(str(model), questions, [run], store=Store(tmp_path))
    pretend_versions(torch="999.0")
    train, trained = causal.train, []
    monkeypatch.setattr(causal, "train", lambda *a, **k: trained.append(1) or train(*a, **k))
    study = measure_runs(str(model), questions, [run], store=Store(tmp_path))
    assert trained == [1]
    assert {record["versions"]["torch"] for record in study.computed} == {"999.0"}


def test_one_more_question_trains_nothing(model, questions, store, study, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(causal, "train", refuse)
    asked = Evaluation(folds=(0,), others=5)
    answers = measure_runs(str(model), questions, [Run("x", TRAINING, asked)], store=store).answers
    assert len(answers) == 15 + 5


def test_workers_give_the_same_tables(model, questions, runs, study, tmp_path):
    some = [*runs["methods"][:3], *runs["alone"][:2]]
    with workers(jobs=2):
        other = measure_runs(str(model), questions, some, store=Store(tmp_path))
    for table in ("answers", "generated", "pss"):
        expected = getattr(study, table)
        expected = expected[expected["run"].isin([run.name for run in some])]
        columns = [c for c in expected if c != "option_logprobs"]
        pd.testing.assert_frame_equal(
            getattr(other, table)[columns], expected[columns].reset_index(drop=True)
        )


def test_parts_vary_one_thing_each(runs, study):
    names = [run.name for part in runs.values() for run in part]
    assert len(set(names)) == len(names)
    assert [run.name for run in runs["methods"]] == [
        "original",
        *(f"{method}/{seed}" for seed in (0, 1) for method in METHODS),
    ]
    base = TRAINING.model_dump()
    for part, may in {
        "doses": {"method", "share"},
        "rules": {"rule"},
        "rates": {"method", "learning_rate"},
        "alone": {"method", "concepts"},
    }.items():
        assert runs[part]
        for run in runs[part]:
            given = run.training.model_dump()
            assert {name for name in base if given[name] != base[name]} <= may
            assert run.evaluation.choices is None
    table = study.runs.set_index("run")
    assert table.loc["FT-PV/0", "parameters"] == table.loc["FT-RV/0", "parameters"]
    together = table.loc["FT-PV/0", "vectors"] + table.loc["FT-CV/0", "vectors"]
    assert together == table.loc["FT-FV/0", "vectors"]


def test_bad_input_is_told_before_any_training(model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "hand_out", lambda *_: pytest.fail("work was handed out"))
    store = Store(tmp_path)

    def refused(runs, asked=questions):
        with pytest.raises(InputError) as caught:
            measure_runs(str(model), asked, runs, store=store)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    run = Run("one", TRAINING, FULL)
    assert "'one' is given twice" in refused([run, run])
    unknown = TRAINING.model_copy(update={"concepts": ("Atlantis",)})
    assert "'Atlantis'" in refused([Run("x", unknown, FULL)])
    assert "'Atlantis'" in refused([Run("x", None, FULL, ("Atlantis",))])
    assert "no statements" in refused([run], toy_questions())
    with pytest.raises(InputError, match="concepts 9: the questions hold 3"):
        trained_concepts(questions, 9)


def test_a_model_is_loaded_once_for_all_runs_and_not_kept(model, questions, tmp_path, monkeypatch):
    loaded, load = [], runner.load_model
    monkeypatch.setattr(runner, "load_model", lambda *a, **k: loaded.append(a) or load(*a, **k))
    runs = [Run("x", TRAINING, Evaluation()), Run("y", None, Evaluation(), TRAINING.concepts)]
    measure_runs(str(model), questions, runs, store=Store(tmp_path))
    assert len(loaded) == 1
    assert not runner._HELD


def test_a_diverging_run_is_named_and_the_others_are_kept(model, questions, tmp_path, monkeypatch):
    store = Store(tmp_path)
    brief = Evaluation()
    wild = Run("wild", TRAINING.model_copy(update={"learning_rate": 1e37}), brief)
    calm = Run("calm", TRAINING, brief)
    monkeypatch.setattr(causal, "_cost", lambda run, _: {"calm": 2, "wild": 1}[run.name])
    with pytest.raises(InputError, match=r": wild: training diverged: .* use a lower"):
        measure_runs(str(model), questions, [wild, calm], store=store)
    monkeypatch.setattr(causal, "train", lambda *_, **__: pytest.fail("trained again"))
    assert len(measure_runs(str(model), questions, [calm], store=store).answers) == 30


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (causal, "FINETUNE_VERSION", 99),
        (evaluation, "EVALUATION_VERSION", 99),
        (evaluation, "GENERATION_VERSION", 99),
        (evaluation, "MAX_NEW_TOKENS", 3),
        (evaluation, "OPEN_PROMPT", "{question}:"),
        (evaluation, "PASSAGE_TOKENS", 64),
        (evaluation, "PROSE", None),
    ],
)
def test_other_code_is_another_result(module, name, value, tmp_path, monkeypatch):
    run = Run("x", TRAINING, FULL.model_copy(update={"open_ended": "question"}))
    before = run.key()
    assert before == run.key()
    if name == "PROSE":
        value = tmp_path / "prose.txt"
        value.write_text(evaluation.PROSE.read_text().replace("Maria", "Mary"))
    monkeypatch.setattr(module, name, value)
    assert run.key() != before


def test_more_prose_than_there_is_is_one_line(model, questions, tmp_path):
    """A passage that is cut short, or empty, would be a likelihood of something else."""
    asked = Evaluation(prose=1000)
    with pytest.raises(InputError, match=r"x: prose 1000: prose.txt holds \d+ passages of 128"):
        measure_runs(str(model), questions, [Run("x", None, asked, TAUGHT)], store=Store(tmp_path))


def test_too_few_other_concepts_is_one_line(model, questions, tmp_path):
    asked = Evaluation(others=1000)
    with pytest.raises(InputError, match="others 1000: only 50 questions on other concepts"):
        measure_runs(str(model), questions, [Run("x", None, asked, TAUGHT)], store=Store(tmp_path))


# Intervals


def answer_table(runs, concepts=10, each=8, seed=0):
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            (run, f"c{concept}", draw.random() + 0.05 * concept)
            for run in runs
            for concept in range(concepts)
            for _ in range(each)
        ],
        columns=["run", "concept", "right"],
    )


def test_the_interval_is_that_of_a_bootstrap_over_concepts():
    """Against scipy's, of as many resamples; two such intervals of 20,000 differ by less."""
    table = answer_table(["a"])
    draws = resample_runs(table, "right", resamples=20_000)
    means = table.groupby("concept")["right"].mean().to_numpy()
    expected = stats.bootstrap(
        (means,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = interval(draws.of("right")[:, 0])
    assert found["value"] == pytest.approx(means.mean())
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_differences_are_paired():
    """Two runs that differ by the same in every concept have a difference without spread."""
    table = answer_table(["a"])
    shifted = table.assign(run="b", right=table["right"] + 0.1)
    values = resample_runs(pd.concat([table, shifted]), "right").of("right")
    np.testing.assert_allclose(values[:, 1] - values[:, 0], 0.1)
    unpaired = np.ptp(values[:, 0])
    assert unpaired > 0.2


def test_a_weighted_mean_is_a_ratio_of_sums():
    table = pd.DataFrame(
        {"run": "a", "text": [0, 1, 2], "nats": [10.0, 2.0, 6.0], "tokens": [5, 4, 1]}
    )
    draws = resample_runs(table, "nats", weight="tokens", unit="text")
    assert draws.of("nats")[0, 0] == pytest.approx(18 / 10)
    possible = {
        (a + b + c)[0] / (a + b + c)[1] for a in _pairs() for b in _pairs() for c in _pairs()
    }
    assert {round(v, 9) for v in draws.of("nats")[:, 0]} <= {round(v, 9) for v in possible}


def _pairs():
    return [np.array(pair, dtype=float) for pair in ((10, 5), (2, 4), (6, 1))]


def test_a_run_that_was_asked_less_is_refused():
    table = answer_table(["a", "b"])
    with pytest.raises(InputError, match="run 'b': lacks a concept"):
        resample_runs(table[(table["run"] == "a") | (table["concept"] != "c3")], "right")


def test_seeds_are_resampled_alike_for_every_method():
    names = [f"{method}/{seed}" for method in "ab" for seed in range(3)]
    draws = resample_runs(answer_table(names), "right", resamples=500)
    values = {m: over_seeds(draws, [f"{m}/{s}" for s in range(3)], "right") for m in "ab"}
    for method in "ab":
        plain = draws.of("right", [f"{method}/{s}" for s in range(3)])[0].mean()
        assert values[method][0] == pytest.approx(plain)
    # Were b the same as a in every seed, the difference would vanish in every resample.
    same = over_seeds(draws, [f"a/{s}" for s in range(3)], "right") - values["a"]
    assert not same.any()
    # Seeds that differ widen the interval beyond that of concepts alone.
    shifted = answer_table(["a/0"])
    wide = pd.concat([shifted.assign(run=f"w/{s}", right=shifted["right"] + s) for s in range(3)])
    spread = over_seeds(resample_runs(wide, "right"), ["w/0", "w/1", "w/2"], "right")
    assert np.std(spread[1:]) > 0.3


def test_measures_are_those_of_the_tables(study, runs):
    measures = measure_methods(study, [run.name for run in runs["methods"]], resamples=50)
    assert list(measures) == list(MEASURES)
    answers = study.answers[study.answers["run"].isin(["FT-RV/0", "FT-RV/1"])]
    for measure, part in {
        "multiple choice": answers[answers["trained"]],
        "other concepts": answers[~answers["trained"]],
    }.items():
        assert measures[measure]["FT-RV"][0] == pytest.approx(part["correct_norm"].mean())
        assert set(measures[measure]) == {"original", *METHODS}
    original = study.generated[study.generated["run"] == "original"]["correct"].mean()
    assert measures["open-ended"]["original"][0] == pytest.approx(original)
    prose = study.texts.query("run == 'original' and kind == 'prose'")
    expected = prose["nats"].sum() / prose["tokens"].sum()
    assert measures["prose"]["original"][0] == pytest.approx(expected)
    rows = study.pss[study.pss["run"] == "original"]
    none, peaks = rows[rows["mask"] == "none"], []
    for _, part in rows[rows["mask"] == "concept"].groupby("ratio"):
        gap = part["general_accuracy"].mean() - part["concept_accuracy"].mean()
        peaks.append(abs(gap) / none["general_accuracy"].mean())
    assert measures["PSS pooled"]["original"][0] == pytest.approx(max(peaks))
