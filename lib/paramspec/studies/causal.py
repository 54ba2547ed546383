"""Fine-tune a model in many ways and evaluate each result: what chapters 8 and 9 measure.

    runs = [Run("original", None, evaluation), Run("FT-PV/0", training, evaluation), ...]
    study = measure_runs("smollm2-135m", questions, runs)
    study.answers, study.generated, study.texts, study.pss, study.losses, study.samples
    draws = resample_runs(study.answers, "correct_norm")     # [1 + resamples, runs], as in trends

A run is one training (or none) and what is asked of its result, see `evaluation`. Trained value
vectors and answers are stored apart as they are done, so that a rerun after a crash, one more
question to ask, or a second chapter trains nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paramspec.errors import InputError, naming
from paramspec.execution.limits import release_memory
from paramspec.execution.provenance import group_records, read_computed
from paramspec.execution.store import Store
from paramspec.method.hooks import (
    ValueVectorView,
    replace_value_vectors,
    train_value_vectors,
    value_vector_view,
)
from paramspec.method.masks import mean_coefficients
from paramspec.method.pss import count_masks
from paramspec.models.describe import folds_asked, require_taught
from paramspec.models.load import LoadedModel
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.evaluation import TABLES, Evaluation, by_hash, evaluate
from paramspec.studies.finetune import (
    FINETUNE_VERSION,
    METHODS,
    Coefficients,
    Diverged,
    Training,
    choose_vectors,
    encode_texts,
    optimizer_bytes,
    train,
    training_texts,
)
from paramspec.studies.runner import (
    Job,
    Ready,
    find_targets,
    result_basis,
    run_jobs,
    stored,
    unit_record,
)

TRAINED = "vectors.safetensors"
RECORD = "record.json"


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

    def key(self) -> dict[str, object]:
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
    brief = evaluation.model_copy(
        update={"open_ended": "no", "choices": None, "others": 0, "sampled": 0}
    )

    def run(name: str, asked: Evaluation, **changed: object) -> Run:
        return Run(name, training.model_copy(update=changed), asked)

    without = evaluation.model_copy(update={"choices": None, "open_ended": "no"})
    parts = {"methods": [Run("original", None, evaluation, training.concepts)]}
    for number in range(seeds):
        asked = evaluation if number < (seeds if full_seeds is None else full_seeds) else without
        s = training.seed + number
        parts["methods"] += [run(f"{m}/{s}", asked, method=m, seed=s) for m in METHODS]
    parts["doses"] = [
        run(f"{m}/share {share:.4g}", brief, method=m, share=share)
        for share in doses
        for m in dosed
    ]
    parts["rules"] = [run(f"FT-PV/{rule}", brief, rule=rule) for rule in rules]
    parts["rates"] = [
        run(f"{m}/rate x{rate:g}", brief, method=m, learning_rate=rate * training.learning_rate)
        for rate in rates
        for m in METHODS
    ]
    parts["alone"] = [
        run(f"{m}/{concept}", brief, method=m, concepts=(concept,))
        for concept in training.concepts * alone
        for m in METHODS
    ]
    return parts


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
    computed: list[dict[str, object]]


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
    basis = result_basis(target.identity, questions)
    job = Job(
        target,
        keys=tuple(basis | run.key() for run in runs),
        costs=tuple(_cost(run, questions) for run in runs),
        compute=partial(_measure_run, tuple(questions), tuple(runs), store),
    )
    run_jobs([job], store, unit="token")
    paths = [stored(store, key, run.name) for key, run in zip(job.keys, runs, strict=True)]
    return _collect(runs, paths)


@contextmanager
def tuned(
    loaded: LoadedModel,
    questions: Sequence[Question],
    training: Training | None,
    *,
    store: Store | None = None,
) -> Iterator[LoadedModel]:
    """`with tuned(loaded, questions, training) as model: ...`: the model, trained, for a while.

    What it yields has a digest of its own, so that whatever is stored of it is not taken for the
    base model's; the base model's weights are back, bit by bit, when the block ends. Trained
    vectors are stored. Without a training it yields the model as it is.
    """
    if training is None:
        yield loaded
        return
    store = store or Store("results/store")
    view = value_vector_view(loaded.model)
    path = _trained(loaded, view, questions, training, store)
    digest = hashlib.sha256(f"{loaded.digest} {path.name}".encode()).hexdigest()
    with _replaced(view, path):
        yield dataclasses.replace(loaded, digest=digest)


# --- one run ------------------------------------------------------------------------------------


def _refuse(runs: Sequence[Run], questions: Sequence[Question]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise InputError(f"run {run.name!r} stands twice; give each its own name")
        if run.training is not None:
            training_texts(questions, run.about, run.training.statements)
        asked, choices = run.evaluation.folds, run.evaluation.choices
        needed = {*choices.choose_on, *choices.score_on} if choices else set()
        if not needed <= set(asked):
            raise InputError(
                f"run {run.name!r}: folds {list(asked)} are asked, and its choices for PSS need "
                f"folds {sorted(needed)}; ask for these, or measure PSS on fewer"
            )
        for concept in run.about:
            if not any(question.concept == concept for question in questions):
                raise InputError(f"concept {concept!r}: no question on it; correct the name")


def _cost(run: Run, questions: Sequence[Question]) -> float:
    """As many tokens of a question take as long, roughly: as was measured of SmolLM2 on a CPU."""
    training, asked = run.training, run.evaluation
    own = sum(q.concept in run.about and q.fold in asked.folds for q in questions)
    cost = 20 * (own + asked.others) + 3 * (128 * asked.prose + 12 * asked.stated)
    if asked.open_ended != "no":
        cost += 37 * own + 24 * asked.sampled * (1 + asked.samples)
    if asked.choices:
        scored = own * len(asked.choices.score_on) / len(asked.folds)
        each = scored + asked.choices.general * len(run.about)
        cost += 20 * (scored + asked.others) + 23 * each * (count_masks(asked.choices) - 1)
    if training:
        texts = training_texts(questions, training.concepts, training.statements)
        more = 1.25 if training.method in ("FT-FV", "FT-CV") else 1
        more += training.rule == "gradient"
        cost += 57 * training.epochs * len(texts) * more
    return cost


def _measure_run(
    questions: Sequence[Question], runs: Sequence[Run], store: Store, ready: Ready, number: int
) -> tuple[Callable[[Path], None], dict[str, object]]:
    """What fills a run's directory, and what its record says."""
    run = runs[number]
    record: dict[str, object] = {}
    trained, vectors = None, torch.empty(0, 2, dtype=torch.int32)
    with naming(run.name), ExitStack() as stack:
        if run.training is not None:
            coefficients = ready.kept.setdefault(
                "mean_coefficients",
                functools.cache(partial(mean_coefficients, ready.view, ready.loaded.tokenizer)),
            )
            path = _trained(ready.loaded, ready.view, questions, run.training, store, coefficients)
            release_memory()  # an optimizer's worth of it
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            trained = read_computed(path)
            vectors = stack.enter_context(_replaced(ready.view, path))
        tables = evaluate(ready, questions, run.about, run.evaluation)

    def write(folder: Path) -> None:
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        save_file({"vectors": vectors}, folder / TRAINED)
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    return write, {"trained": trained}


def _trained(
    loaded: LoadedModel,
    view: ValueVectorView,
    questions: Sequence[Question],
    training: Training,
    store: Store,
    coefficients: Coefficients | None = None,
) -> Path:
    """The directory of trained vectors; `coefficients` are the model's, see `choose_vectors`."""
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
    began = time.perf_counter()
    vectors = choose_vectors(view, loaded.tokenizer, questions, training, coefficients)
    rows = encode_texts(view, loaded.tokenizer, texts)
    seconds_choosing = time.perf_counter() - began
    began = time.perf_counter()
    with train_value_vectors(view, vectors) as trained:
        try:
            losses = train(view, trained, rows, training)
        except Diverged as error:
            raise InputError(
                f"{error}; give a lower learning rate than {training.learning_rate:g}"
            ) from error
        values = _moved(view, trained, vectors)
    record = {
        "losses": losses,
        "steps": len(losses),
        "vectors": len(vectors),
        "parameters": len(vectors) * view.hidden,
        "optimizer_bytes": optimizer_bytes(len(vectors), view.hidden),
        "seconds": round(time.perf_counter() - began, 2),
        "seconds_choosing": round(seconds_choosing, 2),
    }

    def write(folder: Path) -> None:
        save_file({"vectors": vectors.contiguous(), "values": values}, folder / TRAINED)
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    return store.put(key, write, unit_record(loaded))


@torch.no_grad()
def _moved(view: ValueVectorView, trained: object, vectors: Tensor) -> Tensor:
    """Where the chosen vectors are after training, `[n, hidden]`, in the weights' dtype."""
    values = torch.empty(len(vectors), view.hidden, dtype=view.modules[0].weight.dtype)
    for layer, chosen in trained.chosen.items():
        rows = vectors[:, 0] == layer
        offset = trained.offsets[str(layer)]
        values[rows] = (view.vectors(layer)[chosen].float() + offset).to(values.dtype).cpu()
    return values


@contextmanager
def _replaced(view: ValueVectorView, path: Path) -> Iterator[Tensor]:
    """The trained vectors in their places, for a while; which they are."""
    tensors = load_file(path / TRAINED)
    vectors = tensors["vectors"]
    with replace_value_vectors(view, vectors, tensors.pop("values")):
        yield vectors


def _collect(runs: Sequence[Run], paths: Sequence[Path]) -> CausalStudy:
    rows, vectors, tables, records = [], {}, {name: [] for name in (*TABLES, "losses")}, []
    for run, path in zip(runs, paths, strict=True):
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        training, losses = run.training, record.get("losses", [])
        rows.append(
            {
                "run": run.name,
                "method": training.method if training else "original",
                "rule": training.rule if training else "",
                "share": training.share if training else 0.0,
                "seed": training.seed if training else 0,
                "learning_rate": training.learning_rate if training else 0.0,
                "loss_first": losses[0] if losses else np.nan,
                "loss_last": np.mean(losses[-max(1, len(losses) // 10) :]) if losses else np.nan,
                **{
                    name: record.get(name, 0)
                    for name in ("vectors", "parameters", "optimizer_bytes", "steps", "seconds")
                },
            }
        )
        vectors[run.name] = load_file(path / TRAINED)["vectors"]
        made = read_computed(path)
        trained = made.pop("trained", None)
        records += [({"unit": "training", "run": run.name}, trained)] if trained else []
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
