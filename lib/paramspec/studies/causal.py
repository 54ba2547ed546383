"""Fine-tune a model in many ways and evaluate each result: what chapters 8 and 9 measure.

    runs = [Run("original", None, evaluation), Run("FT-PV/0", training, evaluation), ...]
    study = measure_runs("smollm2-135m", questions, runs)
    study.answers, study.generated, study.texts, study.pss, study.losses, study.samples

A run is one training (or none) and what is asked of its result, see `evaluation`. Trained value
vectors are stored on their own, so that one more question to ask, or a second chapter, trains
nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
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
from paramspec.execution.provenance import group_records, read_computed
from paramspec.execution.store import Store
from paramspec.method.hooks import replace_value_vectors, train_value_vectors
from paramspec.method.pss import count_masks
from paramspec.models.describe import folds_asked, require_taught
from paramspec.seeds import by_hash
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.evaluation import PASSAGE_TOKENS, TABLES, Evaluation, evaluate
from paramspec.studies.finetune import FINETUNE_VERSION, train, training_facts
from paramspec.studies.runner import (
    Job,
    Ready,
    find_targets,
    result_basis,
    run_jobs,
    unit_record,
)
from paramspec.studies.training import (
    METHODS,
    Training,
    choose_vectors,
    encode_texts,
    training_texts,
)

TRAINED = "vectors.safetensors"
RECORD = "record.json"
# What the table of runs says of the model as it is, in the place of a training.
ORIGINAL = {"method": "original", "rule": "", "share": 0.0, "seed": 0, "learning_rate": 0.0}


@dataclass(frozen=True)
class Run:
    """A training, or the model as it is, under a name that no other run of a study has.

    `concepts` are those asked about; those trained on if there is a training.
    """

    name: str
    training: Training | None
    evaluation: Evaluation
    concepts: tuple[str, ...] = ()

    @property
    def about(self) -> tuple[str, ...]:
        return self.training.concepts if self.training else self.concepts

    def key(self) -> dict[str, Any]:
        """What its results depend on, beside the model and the questions."""
        return {
            "unit": "causal",
            "training": self.training and self.training.model_dump(mode="json"),
            "concepts": list(self.about),
            "evaluation": self.evaluation.key(),
            "finetune_version": FINETUNE_VERSION,
        }


def trained_concepts(questions: Sequence[Question], count: int, seed: int = 0) -> tuple[str, ...]:
    """`trained_concepts(questions, 10)`: concepts of the high tier, by the hash of their names.

    Raises:
        InputError: if there are fewer.
    """
    names = sorted(
        {question.concept for question in questions if question.tier == "high"},
        key=lambda name: by_hash(seed, name),
    )
    if not 1 <= count <= len(names):
        raise InputError(
            f"concepts {count}: the questions hold {len(names)} concepts of the high tier; ask for "
            "1 or more, and no more than that"
        )
    return tuple(names[:count])


def causal_runs(
    training: Training,
    evaluation: Evaluation,
    *,
    seeds: int = 3,
    full_seeds: int | None = None,
    doses: Sequence[float] = (),
    dosed: Sequence[str] = ("FT-PV", "FT-RV"),
    rules: Sequence[str] = (),
    rates: Sequence[float] = (),
    alone: bool = False,
) -> dict[str, list[Run]]:
    """`parts = causal_runs(training, evaluation, doses=[1/32, 1/4])`: the runs of a causal study.

    >>> training = Training(method="FT-PV", concepts=("alpha",))
    >>> parts = causal_runs(training, Evaluation(), seeds=1)
    >>> [run.name for run in parts["methods"]]
    ['original', 'FT-FV/0', 'FT-PV/0', 'FT-CV/0', 'FT-RV/0']

    Args:
        training: an FT-PV; what is not varied stays as it is.
        evaluation: in full, of the part `methods`; of the others, multiple choice and likelihoods.
        seeds: of each method.
        full_seeds: of these, how many are also asked open-ended and measured for PSS, which takes
            longest; all if not given.
        doses: other shares, for the methods `dosed`.
        rules: other rules to choose the vectors of FT-PV by.
        rates: other learning rates, as multiples of the training's.
        alone: whether each concept is also trained on by itself.

    Returns:
        `methods` (with the original), `doses`, `rules`, `rates` and `alone`.
    """
    without = evaluation.model_copy(update={"choices": None, "open_ended": "no"})
    brief = without.model_copy(update={"others": 0, "sampled": 0})

    def run(name: str, asked: Evaluation = brief, **changed: object) -> Run:
        return Run(name, training.model_copy(update=changed), asked)

    full = seeds if full_seeds is None else full_seeds
    numbered = [(training.seed + number, number < full) for number in range(seeds)]
    rate = training.learning_rate
    return {
        "methods": [
            Run("original", None, evaluation, training.concepts),
            *(
                run(f"{m}/{s}", evaluation if fully else without, method=m, seed=s)
                for s, fully in numbered
                for m in METHODS
            ),
        ],
        "doses": [run(f"{m}/share {x:.4g}", method=m, share=x) for x in doses for m in dosed],
        "rules": [run(f"FT-PV/{rule}", rule=rule) for rule in rules],
        "rates": [
            run(f"{m}/rate x{x:g}", method=m, learning_rate=x * rate)
            for x in rates
            for m in METHODS
        ],
        "alone": [
            run(f"{m}/{name}", method=m, concepts=(name,))
            for name in training.concepts * alone
            for m in METHODS
        ],
    }


class CausalStudy(NamedTuple):
    """What `measure_runs` gives; each table has a column `run`, the name of it.

    Attributes:
        runs: a row a run: `method` (`original` without training), `rule`, `share`, `seed`,
            `learning_rate`, `vectors`, `parameters`, `optimizer_bytes`, `steps`, `loss_first`,
            `loss_last`, `seconds` of training.
        answers: multiple choice, columns as `score_questions` gives, and `trained`, whether the
            question is on a concept trained on.
        generated: open-ended: `question_id`, `concept`, `answer`, `correct`, and `state`, the last
            hidden state of the answer's last token.
        samples: of some of these questions: `question_id`, `concept`, and lists over samples,
            `answers`, `log_likelihoods` and `tokens`, see `hallucination.Sampled`.
        texts: `kind` (`statements` or `prose`), `text` (its number), `nats` (its negative
            log-likelihood), `tokens` (those predicted).
        pss: `PSS_COLUMNS`, with the run's name as `model`.
        losses: `step`, and `loss`, of its batch before the step.
        vectors: by run, int32 `[n, 2]`, the (layer, value vector) that it trained.
        computed: what trained and measured each run: distinct records, as
            `provenance.group_records` gives.
    """

    runs: pd.DataFrame
    answers: pd.DataFrame
    generated: pd.DataFrame
    texts: pd.DataFrame
    pss: pd.DataFrame
    losses: pd.DataFrame
    samples: pd.DataFrame
    vectors: dict[str, Tensor]
    computed: list[dict[str, Any]]


def measure_runs(
    model: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    *,
    store: Store | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> CausalStudy:
    """`study = measure_runs("smollm2-135m", questions, runs)`: train and evaluate each.

    >>> training = Training(method="FT-PV", concepts=("alpha",), epochs=1)
    >>> runs = causal_runs(training, Evaluation(others=5), seeds=1)["methods"]
    >>> study = measure_runs("my-checkpoint/", questions, runs, store=Store("results/store"))
    >>> int(study.answers.groupby("run")["trained"].sum()["FT-PV/0"])
    10

    Args:
        model: as `load_model` takes it.
        questions: hold the concepts trained on, and the other concepts; of a micro model, concepts
            that it was taught.
        runs: handed out to the processes or machines that `workers` says, the costliest first.
        store: where trained vectors and answers are kept and looked for.

    Raises:
        InputError: if two runs have one name, if a concept is unknown or has no statements, if a
            micro model must not be asked a question (see `require_taught`), or if PSS needs folds
            that an evaluation leaves out, before any training; if a training diverges, with its
            name: what is finished is kept.
    """
    folds = folds_asked([model])
    runs = [replace(run, evaluation=run.evaluation.with_folds(folds)) for run in runs]
    _refuse(runs, questions)
    require_taught([model], questions, {fold for run in runs for fold in run.evaluation.scored})
    store = Store((store or Store("results/store")).root.absolute())
    (target,) = find_targets([model], dtype, device)
    basis = result_basis(target, questions)
    job = Job(
        target,
        keys=tuple(basis | run.key() for run in runs),
        costs=tuple(_cost(run, questions) for run in runs),
        compute=partial(_measure_run, tuple(questions), tuple(runs), store),
    )
    (done,) = run_jobs([job], store, unit="token")
    return _collect(runs, done.paths)


# --- one run ------------------------------------------------------------------------------------


def _refuse(runs: Sequence[Run], questions: Sequence[Question]) -> None:
    names = [run.name for run in runs]
    known = {question.concept for question in questions}
    for run in runs:
        if names.count(run.name) > 1:
            raise InputError(f"run {run.name!r} is given twice; give each its own name")
        if unknown := [concept for concept in run.about if concept not in known]:
            raise InputError(f"concept {unknown[0]!r}: no question on it; correct the name")
        if run.training is not None:
            training_texts(questions, run.about, run.training.statements)
        asked, choices = run.evaluation.asked_folds, run.evaluation.choices
        needed: set[int] = {*choices.choose_on, *choices.score_on} if choices else set()
        if not needed <= set(asked):
            raise InputError(
                f"run {run.name!r}: folds {list(asked)} are asked, and its choices for PSS need "
                f"folds {sorted(needed)}; ask for these, or measure PSS on fewer"
            )


def _cost(run: Run, questions: Sequence[Question]) -> float:
    """Tokens that go through the model, roughly; a step of training counts as three passes."""
    training, asked = run.training, run.evaluation
    own = sum(q.concept in run.about and q.fold in asked.asked_folds for q in questions)
    cost = 20 * (own + asked.others) + 12 * asked.stated + PASSAGE_TOKENS * asked.prose
    if asked.open_ended != "no":
        cost += 30 * (own + asked.sampled * asked.samples)
    if asked.choices:
        cost += 20 * count_masks(asked.choices) * (own + asked.choices.general * len(run.about))
    if training:
        texts = training_texts(questions, training.concepts, training.statements)
        cost += 60 * training.epochs * len(texts)
    return cost


def _measure_run(
    questions: Sequence[Question], runs: Sequence[Run], store: Store, ready: Ready, number: int
) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """What fills a run's directory, and what its record says."""
    run = runs[number]
    facts, trained, vectors = "{}", None, torch.empty(0, 2, dtype=torch.int32)
    with naming(run.name), ExitStack() as stack:
        if run.training is not None:
            path = _trained(ready, questions, run.training, store)
            release_memory()  # an optimizer's worth of it
            facts, trained = (path / RECORD).read_text(encoding="utf-8"), read_computed(path)
            vectors, values = (load_file(path / TRAINED)[name] for name in ("vectors", "values"))
            stack.enter_context(replace_value_vectors(ready.view, vectors, values))
        tables = evaluate(ready, questions, run.about, run.evaluation)

    def write(folder: Path) -> None:
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        save_file({"vectors": vectors}, folder / TRAINED)
        (folder / RECORD).write_text(facts, encoding="utf-8")

    return write, {"trained": trained}


def _trained(ready: Ready, questions: Sequence[Question], training: Training, store: Store) -> Path:
    """The directory of trained vectors, from the store or trained now."""
    loaded, view = ready.loaded, ready.view
    texts = training_texts(questions, training.concepts, training.statements)
    key = {
        "unit": "finetune",
        "model": loaded.digest,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "training": training.model_dump(mode="json"),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "finetune_version": FINETUNE_VERSION,
    }
    if training.rule in ("score", "other"):  # which look at other concepts' statements
        key["questions"] = questions_digest(questions)
    path = store.get(key)
    if path is not None:
        return path
    vectors = choose_vectors(view, loaded.tokenizer, questions, training)
    rows = encode_texts(view, loaded.tokenizer, texts)
    began = time.perf_counter()
    with train_value_vectors(view, vectors) as trained:
        losses = train(view, trained, rows, training)
    values = torch.empty(len(vectors), view.hidden, dtype=view.modules[0].weight.dtype)
    for layer, chosen in trained.chosen.items():
        offset = trained.offsets[str(layer)].detach()
        moved = view.vectors(layer)[chosen].float() + offset
        values[vectors[:, 0] == layer] = moved.to(values.dtype).cpu()
    facts = training_facts(vectors, view.hidden, losses, began)

    def write(folder: Path) -> None:
        save_file({"vectors": vectors.contiguous(), "values": values}, folder / TRAINED)
        (folder / RECORD).write_text(json.dumps(facts), encoding="utf-8")

    return store.put(key, write, unit_record(loaded))


def _collect(runs: Sequence[Run], paths: Sequence[Path]) -> CausalStudy:
    rows, vectors, records = [], {}, []
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in (*TABLES, "losses")}
    for run, path in zip(runs, paths, strict=True):
        facts = json.loads((path / RECORD).read_text(encoding="utf-8"))
        losses = facts.get("losses", [])
        training = run.training.model_dump() if run.training else ORIGINAL
        row = {"run": run.name} | {name: training[name] for name in ORIGINAL}
        row["loss_first"] = losses[0] if losses else np.nan
        row["loss_last"] = np.mean(losses[-max(1, len(losses) // 10) :]) if losses else np.nan
        for name in ("vectors", "parameters", "optimizer_bytes", "steps", "seconds"):
            row[name] = facts.get(name, 0)
        rows.append(row)
        vectors[run.name] = load_file(path / TRAINED)["vectors"]
        made = read_computed(path)
        if trained := made.pop("trained", None):
            records.append(({"unit": "training", "run": run.name}, trained))
        records.append(({"unit": "evaluation", "run": run.name}, made))
        curve = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
        tables["losses"].append(curve.assign(run=run.name))
        for name in TABLES:
            if (path / f"{name}.parquet").is_file():
                table = pd.read_parquet(path / f"{name}.parquet").assign(run=run.name)
                # Stored of another run of the same training, perhaps.
                tables[name].append(table.assign(model=run.name) if name == "pss" else table)
    joined = {
        name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        for name, parts in tables.items()
    }
    return CausalStudy(
        pd.DataFrame(rows), **joined, vectors=vectors, computed=group_records(records)
    )
