"""Fine-tune a model in many ways and evaluate each result: the measurements of chapters 8 and 9.

Trained value vectors are stored on their own, so that one more question to ask, or a second
chapter, trains nothing twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paramspec.errors import InputError, naming
from paramspec.execution.limits import release_memory
from paramspec.execution.provenance import computed, read_computed
from paramspec.execution.store import Computed, Store
from paramspec.method import masks
from paramspec.method.hooks import replace_value_vectors
from paramspec.models.describe import folds_asked, require_taught
from paramspec.seeds import by_hash
from paramspec.specwiki import Question, questions_digest
from paramspec.studies import runner
from paramspec.studies.evaluation import TABLES, Evaluation, evaluate
from paramspec.studies.finetune import FINETUNE_VERSION, refuse_quantized, texts_digest, tune
from paramspec.studies.training import METHODS, Method, Training, last_statements, training_texts

TRAINED = "vectors.safetensors"
RECORD = "record.json"
KEPT = 2**28  # bytes of trained values; more are trained again when they are needed again
# The columns of a training in the table of runs, and their values for the original.
ORIGINAL = {"method": "original", "rule": "", "share": 0.0, "seed": 0, "learning_rate": 0.0}


@dataclass(frozen=True)
class Run:
    """A training and the evaluation of its result; of the `original`, its concepts alone count."""

    name: str
    training: Training
    evaluation: Evaluation
    original: bool = False

    def key(self) -> dict[str, Any]:
        """All that its results depend on, next to the model and the questions."""
        return {
            "unit": "causal",
            "training": None if self.original else self.training.model_dump(mode="json"),
            "concepts": list(self.training.concepts),
            "evaluation": self.evaluation.key(),
            "finetune_version": FINETUNE_VERSION,
        }


def trained_concepts(questions: Sequence[Question], count: int, seed: int = 0) -> tuple[str, ...]:
    """So many concepts of the high tier, by the hash of their names."""
    names = sorted(
        {question.concept for question in questions if question.tier == "high"},
        key=lambda name: by_hash(seed, name),
    )
    if not 1 <= count <= len(names):
        raise InputError(
            f"concepts {count}: expected 1 to {len(names)}, all of the high tier in the questions"
        )
    return tuple(names[:count])


def rate_runs(training: Training, rates: Sequence[float], *, left_out: int = 30) -> list[Run]:
    """`rate_runs(training, [0.001, 0.003])`: each method at each learning rate, at one seed.

    Each is asked for the likelihood of as many statements as `left_out` says, of facts trained on
    in other words, from which `stats.methods.best_rates` chooses.
    """
    asked = Evaluation(folds=(1,), left_out=left_out)
    changed = [{"method": m, "learning_rate": rate} for m in METHODS for rate in sorted(set(rates))]
    return [
        Run(
            f"{one['method']}/rate {one['learning_rate']:g}", training.model_copy(update=one), asked
        )
        for one in changed
    ]


def causal_runs(
    training: Training,
    evaluation: Evaluation,
    *,
    seeds: int = 3,
    rates: Mapping[Method, float] | None = None,
) -> list[Run]:
    """`runs = causal_runs(training, evaluation)`: the original, and each method at each seed.

    >>> training = Training(method="FT-PV", concepts=("alpha",))
    >>> [run.name for run in causal_runs(training, Evaluation(), seeds=1)]
    ['original', 'FT-FV/0', 'FT-PV/0', 'FT-CV/0', 'FT-RV/0']

    Args:
        training: each run has its fields, but for the method and the seed; its seed is the first.
        evaluation: of each run.
        seeds: of each method.
        rates: the learning rate of each method, if it is not that of `training`.
    """
    runs = [Run("original", training, evaluation, original=True)]
    for seed in range(training.seed, training.seed + seeds):
        for method in METHODS:
            rate = (rates or {}).get(method, training.learning_rate)
            own = {"method": method, "seed": seed, "learning_rate": rate}
            runs.append(Run(f"{method}/{seed}", training.model_copy(update=own), evaluation))
    return runs


class CausalStudy(NamedTuple):
    """The tables of `measure_runs`, each with the name of the `run`.

    Attributes:
        runs: a row per run: the fields of `ORIGINAL`, the facts of `tune`, `loss_first` and
            `loss_last`.
        answers: as `score_questions` gives; `trained`: on a concept trained on.
        generated: open-ended: `question_id`, `concept`, `answer`, `correct`, and `state`, the last
            hidden state of the answer's last token.
        samples: of some of these questions: `question_id`, `concept`, and lists over samples,
            `answers`, `log_likelihoods` and `tokens`, see `hallucination.Sampled`.
        texts: `kind` (`statements`, `left out` or `prose`), `text` (its number), `nats` (its
            negative log-likelihood), `tokens` (those predicted).
        details: answers under masks: `DETAIL_COLUMNS`, with the run's name as `model`.
        losses: `step`, and `loss`, of its batch before the step.
        vectors: by run, int32 `[n, 2]`, the (layer, value vector) that it trained.
    """

    runs: pd.DataFrame
    answers: pd.DataFrame
    generated: pd.DataFrame
    texts: pd.DataFrame
    details: pd.DataFrame
    losses: pd.DataFrame
    samples: pd.DataFrame
    vectors: dict[str, Tensor]


def measure_runs(
    model: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    *,
    store: Store | None = None,
) -> CausalStudy:
    """`study = measure_runs("smollm2-135m", questions, runs)`: train and evaluate each.

    >>> training = Training(method="FT-PV", concepts=("alpha",), epochs=1)
    >>> runs = causal_runs(training, Evaluation(others=5), seeds=1)
    >>> study = measure_runs("my-checkpoint/", questions, runs, store=Store("results/store"))
    >>> int(study.answers.groupby("run")["trained"].sum()["FT-PV/0"])
    10

    Args:
        model: as `load_model` takes it.
        questions: hold the concepts trained on, and the other concepts; of a micro model, concepts
            that it was taught.
        runs: handed out in this order, to the processes or machines that `workers` says.
        store: keeps trained vectors and answers; `results/store` if not given.

    Raises:
        InputError: if two runs have one name, if a concept has no statements, if a micro model
            must not be asked a question (see `require_taught`), if a run trains on statements that
            it is asked about, or if PSS needs folds that an evaluation leaves out, before any
            training; if a training diverges, with its name: what
            is finished is kept.
    """
    folds = folds_asked([model])
    runs = [replace(run, evaluation=run.evaluation.with_folds(folds)) for run in runs]
    if twice := [name for name, count in Counter(r.name for r in runs).items() if count > 1]:
        raise InputError(f"run {twice[0]!r} is given twice; give each its own name")
    for run in runs:
        texts = training_texts(questions, run.training)  # refuses what cannot be trained on
        asked = last_statements(questions, run.training.concepts) if run.evaluation.left_out else ()
        if held := sorted(set(asked).intersection(texts)):
            raise InputError(
                f"run {run.name!r}: trains on {held[0]!r}, a fact's last statement, and left_out "
                "asks about it; train on fewer statements of each fact"
            )
    require_taught([model], questions, {fold for run in runs for fold in run.evaluation.folds})
    store = store or Store("results/store")
    compute = partial(_measure_run, tuple(questions), tuple(runs), store)
    units, costs = [run.key() for run in runs], [1] * len(runs)
    (done,) = runner.run_units([model], questions, units, costs, compute, store, cost="run")
    return _collect(runs, done.paths)


def _measure_run(
    questions: Sequence[Question],
    runs: Sequence[Run],
    store: Store,
    ready: runner.Ready,
    number: int,
) -> Computed:
    run = runs[number]
    facts, record, vectors = "{}", None, torch.empty(0, 2, dtype=torch.int32)
    with naming(run.name), ExitStack() as stack:
        if not run.original:
            tensors, facts, record = _trained(ready, questions, run.training, store)
            release_memory()  # an optimizer's worth of it
            stack.enter_context(replace_value_vectors(ready.view, **tensors))
            vectors = tensors["vectors"]
        tables = evaluate(ready, questions, run.training.concepts, run.evaluation)

    def write(folder: Path) -> None:
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        save_file({"vectors": vectors}, folder / TRAINED)
        (folder / RECORD).write_text(facts, encoding="utf-8")

    return write, {"trained": record}


def _trained(
    ready: runner.Ready, questions: Sequence[Question], training: Training, store: Store
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The trained `vectors` and their `values`, the facts of `tune`, and the record of the unit;
    stored, unless they are so large that training them again, to the same bits, costs less.
    """
    loaded, view = ready.loaded, ready.view
    refuse_quantized(loaded)
    basis = {
        "model": loaded.digest,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "finetune_version": FINETUNE_VERSION,
    }
    key = basis | {
        "unit": "finetune",
        "training": training.model_dump(mode="json"),
        "texts": texts_digest(training_texts(questions, training)),
    }
    if training.rule in ("score", "other"):  # which look at other concepts' statements
        key["questions"] = questions_digest(questions)

    with store.turn(key):
        if path := store.get(key):
            facts = (path / RECORD).read_text(encoding="utf-8")
            return load_file(path / TRAINED), facts, read_computed(path)
        kept = partial(_coefficients, store, basis, runner.unit_record(loaded))
        tuned = tune(view, loaded.tokenizer, questions, training, coefficients=kept)
        with tuned as (vectors, trained, found):
            values = torch.empty(len(vectors), view.hidden, dtype=view.modules[0].weight.dtype)
            for layer, chosen in trained.chosen.items():
                moved = view.vectors(layer)[chosen].float() + trained.offsets[str(layer)].detach()
                values[vectors[:, 0] == layer] = moved.to(values.dtype).cpu()
        tensors = {"vectors": vectors.contiguous(), "values": values}
        facts, record = json.dumps(found), runner.unit_record(loaded)

        def write(folder: Path) -> None:
            save_file(tensors, folder / TRAINED)
            (folder / RECORD).write_text(facts, encoding="utf-8")

        if values.nbytes > KEPT:
            return tensors, facts, computed(**record)
        return tensors, facts, read_computed(store.put(key, write, record))


def _coefficients(
    store: Store, basis: dict[str, Any], record: dict[str, Any], *over: Any
) -> Tensor:
    """`masks.mean_coefficients`, kept: of the same texts for every seed and learning rate."""

    def compute() -> Computed:
        means = masks.mean_coefficients(*over)
        return lambda folder: save_file({"means": means}, folder / TRAINED), record

    key = basis | {"unit": "coefficients", "texts": texts_digest(over[-1])}
    return load_file(store.find(key, compute) / TRAINED)["means"]


def _collect(runs: Sequence[Run], paths: Sequence[Path]) -> CausalStudy:
    rows, vectors = [], {}
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in (*TABLES, "losses")}
    for run, path in zip(runs, paths, strict=True):
        facts = json.loads((path / RECORD).read_text(encoding="utf-8"))
        losses = facts.get("losses", [])
        training = ORIGINAL if run.original else run.training.model_dump()
        row = {"run": run.name} | {name: training[name] for name in ORIGINAL}
        row["loss_first"] = losses[0] if losses else np.nan
        row["loss_last"] = np.mean(losses[-max(1, len(losses) // 10) :]) if losses else np.nan
        for name in ("vectors", "parameters", "optimizer_bytes", "steps", "seconds"):
            row[name] = facts.get(name, 0)
        rows.append(row)
        vectors[run.name] = load_file(path / TRAINED)["vectors"]
        curve = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
        tables["losses"].append(curve.assign(run=run.name))
        for file in path.glob("*.parquet"):
            # It may be stored of another run of the same training.
            own = {"run": run.name} | ({"model": run.name} if file.stem == "details" else {})
            tables[file.stem].append(pd.read_parquet(file).assign(**own))
    joined = {
        name: pd.concat(parts or [pd.DataFrame()], ignore_index=True)
        for name, parts in tables.items()
    }
    return CausalStudy(pd.DataFrame(rows), **joined, vectors=vectors)
