"""Measure models over a set of questions, in units that are stored as they are done.

A unit is (model, shard of concepts), see `runner`. Results are read from the store, so that they
are the same whoever computed them.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from paramspec.errors import InputError
from paramspec.execution.files import PARTIAL, remove_leftovers, writing_to
from paramspec.execution.provenance import group_records, read_computed
from paramspec.execution.store import Computed, Store
from paramspec.method import pss
from paramspec.method.batches import BATCH_TOKENS
from paramspec.method.hooks import value_vector_view
from paramspec.method.masks import (
    ConceptCoefficients,
    load_masks,
    record_concepts,
    save_masks,
)
from paramspec.method.pss import Choices
from paramspec.method.rows import ROW_TOKENS, Request
from paramspec.method.scoring import encode_all, mark, score_options
from paramspec.models.checkpoints import Checkpoint
from paramspec.models.describe import folds_asked, require_taught
from paramspec.models.load import LoadedModel
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.runner import Done, Ready, basis_of, result_basis, run_units, unit_record

COEFFICIENTS, ANSWERS = "coefficients.safetensors", "answers.parquet"
ASKED = {"chat", "row_tokens", "batch_tokens"}  # the choices that `answer_table` takes
SHARD = 4  # concepts of a unit: seconds to minutes of work, so that little is lost by a crash


@dataclass(frozen=True)
class Study:
    """The tables of `measure_pss`, masks by name, the record of the run, and what was asked."""

    pss: pd.DataFrame
    details: pd.DataFrame
    masks: dict[str, Tensor]
    run: dict[str, Any]
    questions: tuple[Question, ...]


def measure_pss(
    models: Sequence[str | LoadedModel],
    questions: Sequence[Question],
    choices: Choices | None = None,
    *,
    store: Store | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Study:
    """`study = measure_pss(["smollm2-135m"], questions)`: PSS of each model on the questions.

    >>> study = measure_pss(["my-checkpoint/"], questions, Choices(ratios=(0.1,), general=5))
    >>> list(study.pss["mask"].unique())
    ['none', 'concept', 'random', 'magnitude', 'other']

    Args:
        models: registry ids, hub ids, directories, GGUF files, or models already loaded.
        questions: of at least two concepts, both folds of each; with a micro model among the
            models, of concepts that it was taught (see `study_questions`).
        choices: see `Choices`; the defaults if not given.
        store: keeps finished units; `results/store` if not given.
        dtype, device: see `load_model`.

    Models that are loaded already are measured in this process, the others where `workers` says.

    Raises:
        InputError: if a model is not found, incomplete or named twice, if the questions cannot be
            used or must not be asked of a micro model (see `require_taught`), before anything is
            measured; if a model cannot be measured, when its turn comes: finished units are kept.
    """
    choices = (choices or Choices()).with_folds(folds_asked(models))
    store = store or Store("results/store")
    require_taught(models, questions, choices.score_on)
    _refuse_thin(questions, choices)
    concepts = list(dict.fromkeys(question.concept for question in questions))
    shards = [concepts[start : start + SHARD] for start in range(0, len(concepts), SHARD)]
    units = [{**pss.method_key(choices), "unit": "pss", "concepts": shard} for shard in shards]
    costs = [pss.evaluations(choices, questions, shard) for shard in shards]
    study = f"{questions_digest(questions)} {choices.model_dump_json()}"
    compute = partial(_measure_shard, study, tuple(questions), choices, shards, store)
    found = run_units(models, questions, units, costs, compute, store, dtype=dtype, device=device)
    paths = [path for done in found for path in done.paths]
    accuracies, details = (
        pd.concat([pd.read_parquet(path / f"{name}.parquet") for path in paths], ignore_index=True)
        for name in ("pss", "details")
    )
    masks: dict[str, Tensor] = {}
    for path in paths:
        masks |= load_masks(path / "masks.safetensors")[0]
    runs = []
    for done in found:
        shared = (_coefficients_key, _unmasked_key)
        others = [store.get(key(done.target.basis, questions, choices)) for key in shared]
        runs.append(_run_record(done, sum(costs), others))
    about = {"digest": questions_digest(questions), "count": len(questions)}
    run = {"questions": about, **pss.method_key(choices), "models": runs}
    return Study(accuracies, details, masks, run, tuple(questions))


def _refuse_thin(questions: Sequence[Question], choices: Choices) -> None:
    folds: dict[str, set[int]] = {}
    for question in questions:
        folds.setdefault(question.concept, set()).add(question.fold)
    if len(folds) < 2:
        raise InputError(f"questions on {len(folds)} concept(s): at least 2 are needed")
    for concept, present in folds.items():
        for needed in (choices.choose_on, choices.score_on):
            if not present.intersection(needed):
                named = " or ".join(map(str, needed))
                raise InputError(f"{concept!r}: no question of fold {named}; add one")
    # The concept with the most questions has the fewest on others.
    asked = Counter(q.concept for q in questions if q.fold in choices.score_on)
    pss.general_questions(questions, asked.most_common(1)[0][0], choices)


def _measure_shard(
    study: str,
    questions: Sequence[Question],
    choices: Choices,
    shards: list[list[str]],
    store: Store,
    ready: Ready,
    number: int,
) -> Computed:
    began = time.perf_counter()
    if study not in ready.kept:
        ready.kept.clear()  # another study's would fill the memory
        # Of processes that begin side by side, each begins with another part.
        unmasked = _unmasked(ready, questions, choices, store) if number % 2 else None
        coefficients = concept_coefficients(ready.loaded, questions, choices, store=store)
        unmasked = unmasked or _unmasked(ready, questions, choices, store)
        ablated = (
            _means(ready.loaded, questions, choices, store) if choices.ablation == "mean" else None
        )
        ready.kept[study] = coefficients, unmasked, ablated
    coefficients, unmasked, ablated = ready.kept[study]
    measured = pss.measure_concepts(
        ready.loaded.name,
        replace(ready.view, ablated=ablated),
        ready.loaded.tokenizer,
        questions,
        shards[number],
        choices,
        coefficients,
        unmasked=unmasked,
        engine=ready.engine,
    )
    seconds = time.perf_counter() - began
    record = {"layers": ready.view.layers, "width": ready.view.width, "seconds": seconds}
    return partial(_save, measured, {}), record


def _save(tables: pss.Tables | Study, made_of: dict[str, Any], directory: Path) -> None:
    tables.pss.to_parquet(directory / "pss.parquet", index=False)
    tables.details.to_parquet(directory / "details.parquet", index=False)
    save_masks(directory / "masks.safetensors", tables.masks, made_of)


def score_questions(
    model: LoadedModel, questions: Sequence[Question], *, store: Store | None = None
) -> pd.DataFrame:
    """`answers = score_questions(load_model("smollm2-135m"), questions)`: without any mask.

    >>> answers = score_questions(load_model("my-checkpoint/"), questions)
    >>> answers.groupby("concept")["correct_norm"].size().to_dict()
    {'alpha': 10, 'beta': 10, 'gamma': 10}

    Returns:
        A row per question: `question_id`, `concept`, `domain`, `tier`, `relation`, `fold`,
        `option_logprobs`, `predicted`, `predicted_norm`, `correct`, `correct_norm`, as in
        `DETAIL_COLUMNS`.

    Raises:
        InputError: if a micro model must not be asked one of them, see `require_taught`.
    """

    require_taught([model], questions, {question.fold for question in questions})
    asked = {"chat": False, "row_tokens": ROW_TOKENS, "batch_tokens": BATCH_TOKENS}
    unit, compute = {"unit": "answers", **asked}, partial(_answers, questions, asked)
    store, costs = store or Store("results/store"), [len(questions)]
    (done,) = run_units([model], questions, [unit], costs, compute, store)
    return pd.read_parquet(done.paths[0] / ANSWERS)


def _answers(
    questions: Sequence[Question], asked: dict[str, Any], ready: Ready, number: int
) -> Computed:
    table = answer_table(ready, questions, **asked)
    return lambda folder: table.to_parquet(folder / ANSWERS), {}


def _unmasked(
    ready: Ready, questions: Sequence[Question], choices: Choices, store: Store
) -> dict[str, Tensor]:
    """Scores without a mask, by question id: each question once, whatever masks it serves."""

    def compute() -> Computed:
        asked = choices.model_dump(include=ASKED)
        write, _ = _answers(_scored(questions, choices), asked, ready, 0)
        return write, unit_record(ready.loaded, ready.engine)

    key = _unmasked_key(basis_of(ready.loaded), questions, choices)
    return scores_by_id(pd.read_parquet(store.find(key, compute) / ANSWERS))


def _scored(questions: Sequence[Question], choices: Choices) -> list[Question]:
    return [question for question in questions if question.fold in choices.score_on]


def _unmasked_key(
    basis: dict[str, str], questions: Sequence[Question], choices: Choices
) -> dict[str, Any]:
    asked = choices.model_dump(include=ASKED)
    return result_basis(basis, _scored(questions, choices)) | {"unit": "answers", **asked}


def answer_table(
    ready: Ready, questions: Sequence[Question], *, chat: bool = False, **budget: int
) -> pd.DataFrame:
    """The table of `score_questions`, of a model in memory; `budget` is of `score_options`."""
    items = encode_all(ready.loaded.tokenizer, questions, chat=chat)
    requests = [Request(item, 0) for item in items]
    with _progress(questions, "answers") as bar:
        options: dict[str, Any] = {"engine": ready.engine, "progress": bar.update, **budget}
        scores = score_options(ready.view, requests, [None], **options)
    about = {"concept", "domain", "tier", "relation", "fold"}
    return pd.DataFrame(
        {
            "question_id": question.id,
            **question.model_dump(include=about),
            "option_logprobs": score.tolist(),
            **mark(score.tolist(), question),
        }
        for question, score in zip(questions, scores, strict=True)
    )


def scores_by_id(answers: pd.DataFrame) -> dict[str, Tensor]:
    """Log-likelihoods of an answer table's options, by question id, as `measure_concepts` takes."""
    scored = zip(answers["question_id"], answers["option_logprobs"], strict=True)
    return {question_id: torch.tensor(logprobs) for question_id, logprobs in scored}


def concept_coefficients(
    loaded: LoadedModel,
    questions: Sequence[Question],
    choices: Choices | None = None,
    *,
    store: Store | None = None,
) -> ConceptCoefficients:
    """`coefficients = concept_coefficients(loaded, questions)`: `record_concepts`, stored.

    Of `choices`, only `position`, `chat` and `batch_tokens` matter.
    """
    choices = choices or Choices()
    require_taught([loaded], questions, ())

    def record() -> Computed:
        with _progress(questions, "coefficients") as bar:
            recorded = record_concepts(
                value_vector_view(loaded.model),
                loaded.tokenizer,
                questions,
                position=choices.position,
                chat=choices.chat,
                batch_tokens=choices.batch_tokens,
                progress=bar.update,
            )
        tensors = {"sums": recorded.sums, "counts": recorded.counts}
        return lambda folder: save_file(tensors, folder / COEFFICIENTS), unit_record(loaded)

    key = _coefficients_key(basis_of(loaded), questions, choices)
    path = (store or Store("results/store")).find(key, record)
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    return ConceptCoefficients(concepts, **load_file(path / COEFFICIENTS))


def _means(
    loaded: LoadedModel, questions: Sequence[Question], choices: Choices, store: Store
) -> Tensor:
    """The mean coefficients over all clozes, with their signs, stored: `[layers, width]`."""

    def record() -> Computed:
        view = value_vector_view(loaded.model)
        means = pss.study_means(view, loaded.tokenizer, questions, choices)
        return lambda folder: save_file({"means": means}, folder / COEFFICIENTS), unit_record(
            loaded
        )

    key = result_basis(basis_of(loaded), questions) | {"unit": "means", "chat": choices.chat}
    return load_file(store.find(key, record) / COEFFICIENTS)["means"]


def _coefficients_key(
    basis: dict[str, str], questions: Sequence[Question], choices: Choices
) -> dict[str, Any]:
    return result_basis(basis, questions) | {
        "unit": "coefficients",
        "position": choices.position,
        "chat": choices.chat,
        "batch_tokens": choices.batch_tokens,
    }


def _progress(questions: Sequence[Question], title: str) -> tqdm:
    """A bar within a unit, below that of all units; none in one of several workers."""
    options = {"unit": "question", "leave": False}
    options["disable"] = multiprocessing.parent_process() is not None
    return tqdm(total=len(questions), desc=title, **options)


def _run_record(done: Done, cost: int, others: list[Path | None]) -> dict[str, Any]:
    model = done.target.model
    records = [read_computed(path) for path in done.paths]
    # The directory of a micro model has the record of its training.
    others = [*others, model.path if isinstance(model, Checkpoint) else None]
    alike = (
        "digest",
        "commit",
        "tokenizer",
        "dtype",
        "quantized",
        "arithmetic",
        "engine",
        "layers",
        "width",
    )
    return {
        "name": model.name,
        **{name: records[0].get(name) for name in alike},
        "evaluations": cost,
        "units": len(records),
        "units_from_store": len(records) - done.computed,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "computed": group_records([*done.paths, *filter(None, others)]),
    }


def write_study(study: Study, out: Path) -> None:
    """Write the five files of the command `pss`.

    `run.json` holds `questions` (digest and count), `choices`, `scoring_version`, and of each of
    `models` its `name`, fields of `runner.unit_record`, `evaluations`, `units` and, of these,
    `units_from_store`, `seconds` of computing, and `computed`, see `provenance.group_records`.
    A full disk leaves the old files: all are written before the first of them replaces its own.
    """
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with TemporaryDirectory(prefix=PARTIAL, dir=out) as name:
            scratch = Path(name)
            _save(study, study.run, scratch)
            text = json.dumps(study.run, indent=2, ensure_ascii=False) + "\n"
            (scratch / "run.json").write_text(text, encoding="utf-8")
            asked = "".join(f"{question.model_dump_json()}\n" for question in study.questions)
            (scratch / "questions.jsonl").write_text(asked, encoding="utf-8")
            for file in list(scratch.iterdir()):
                file.replace(out / file.name)
