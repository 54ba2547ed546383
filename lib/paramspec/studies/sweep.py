"""Measure models over a set of questions, in units that are stored as they are done.

A unit is (model, shard of concepts), see `runner`. Results are read from the store, so that they
are the same whoever computed them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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
from paramspec.method.masks import ConceptCoefficients, record_concepts, save_masks
from paramspec.method.pss import Choices
from paramspec.method.rows import ROW_TOKENS, Request
from paramspec.method.scoring import encode_all, mark, score_options
from paramspec.models.checkpoints import Checkpoint
from paramspec.models.describe import folds_asked, require_taught
from paramspec.models.load import LoadedModel
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.runner import (
    Done,
    Needs,
    Ready,
    Target,
    basis_of,
    loaded_target,
    result_basis,
    run_units,
    unit_record,
)

COEFFICIENTS, ANSWERS = "coefficients.safetensors", "answers.parquet"
PSS, DETAILS, MASKS = "pss.parquet", "details.parquet", "masks.safetensors"
TEXTS = ["model", "protocol", "question_id", "concept", "role", "mask_concept", "mask"]
ASKED = {"chat", "row_tokens", "batch_tokens"}  # the choices that `answer_table` takes
# Beside forward passes, on a core of an Intel Xeon with AMX: an answer's packing,
# marking and storing; and a mask's choice and use, for each value vector of the model
ANSWER_BYTES, ANSWER_SECONDS, MASK_SECONDS = 40, 1.6e-4, 2.2e-8
PROCESS = 700_000_000  # bytes of a process with torch and transformers
SHARD = 4  # concepts of a unit: seconds to minutes of work, so that little is lost by a crash


def needs_of(
    questions: Sequence[Question], choices: Choices, vectors: int, bytes_each: int
) -> Needs:
    """`needs_of(questions, choices, 32 * 11008, 2).memory`: of a model of so many value vectors,
    whose weights have two bytes. `tests/benchmarks/scale.py` measures it.
    """
    concepts = {question.concept for question in questions}
    asked = pss.evaluations(choices, questions, list(concepts))
    masks = pss.count_masks(choices) - 1  # of a concept
    sums = 2 * len(concepts) * vectors  # of two folds
    return Needs(
        coefficients=bytes_each * sums,
        answers=ANSWER_BYTES * asked,
        # Sums of four bytes, held beside what is written; and the masks of a unit.
        memory=PROCESS + (8 if bytes_each == 4 else 6) * sums + SHARD * masks * vectors,
        seconds=ANSWER_SECONDS * asked + MASK_SECONDS * len(concepts) * masks * vectors,
    )


@dataclass(frozen=True)
class Study:
    """What `measure_pss` gives: the table `pss`, the record of the run, and what was asked.

    `details` and `masks` are as large as the models and concepts are many. They are not held: each
    time, answers are read from the store, and masks are made again from the coefficients there.
    """

    pss: pd.DataFrame
    run: dict[str, Any]
    questions: tuple[Question, ...]
    masks: Masks
    _paths: list[Path]

    @property
    def details(self) -> pd.DataFrame:
        """Every answer, `DETAIL_COLUMNS`; texts are categories, lists are Arrow's."""
        tables = [pq.read_table(path / DETAILS, read_dictionary=TEXTS) for path in self._paths]
        table = pa.concat_tables(tables).unify_dictionaries()
        lists = {kind for kind in table.schema.types if pa.types.is_list(kind)}
        details = table.to_pandas(types_mapper={one: pd.ArrowDtype(one) for one in lists}.get)
        for name in TEXTS:  # sorted as texts are
            texts = details[name].cat
            details[name] = texts.reorder_categories(sorted(texts.categories))
        return details

    def write(self, folder: Path) -> None:
        """`pss.parquet`, `details.parquet` and `masks.safetensors`, unit by unit."""
        self.pss.to_parquet(folder / PSS, index=False)
        with pq.ParquetWriter(folder / DETAILS, pq.read_schema(self._paths[0] / DETAILS)) as file:
            for path in self._paths:
                file.write_table(pq.read_table(path / DETAILS))
        shapes = {one["name"]: (one["layers"], one["width"]) for one in self.run["models"]}
        named = {name: shapes[self.masks.model(name)] for name in self.masks}
        save_masks(folder / MASKS, named, self.masks.values(), self.run)


class Masks(Mapping[str, Tensor]):
    """The masks of a study, int32 `[n, 2]` of (layer, value vector), by `mask_name`."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        questions: Sequence[Question],
        choices: Choices,
        store: Store,
    ) -> None:
        self._targets, self._questions, self._choices = targets, questions, choices
        self._store = store
        concepts = dict.fromkeys(question.concept for question in questions)
        self._places = {
            pss.mask_name(model, concept, *cell): (model, concept, number)
            for model, concept in itertools.product(targets, concepts)
            for number, cell in enumerate(pss.mask_cells(choices), 1)
        }
        # Those that were asked for last are held.
        self._coefficients, self._made = lru_cache(1)(self._read), lru_cache(1)(self._make)

    def _read(self, model: str) -> ConceptCoefficients:
        target = self._targets[model]
        key = _coefficients_key(target.basis, self._questions, self._choices)
        if path := self._store.get(key):
            return _read_coefficients(path, self._questions)
        loaded = loaded_target(target)  # they were removed, or damaged
        return concept_coefficients(loaded, self._questions, self._choices, store=self._store)

    def _make(self, model: str, concept: str) -> list[Tensor]:
        found = pss.concept_masks(self._coefficients(model), concept, self._choices)
        return [mask.vectors for mask in found]

    def __getitem__(self, name: str) -> Tensor:
        model, concept, number = self._places[name]
        return self._made(model, concept)[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def model(self, name: str) -> str:
        """The model that a mask is of."""
        return self._places[name][0]


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
    needs = partial(needs_of, questions, choices)
    found = run_units(
        models, questions, units, costs, compute, store, dtype=dtype, device=device, needs=needs
    )
    paths = [path for done in found for path in done.paths]
    accuracies = pd.concat([pd.read_parquet(path / PSS) for path in paths], ignore_index=True)
    runs = []
    for done in found:
        shared = (_coefficients_key, _unmasked_key)
        others = [store.get(key(done.target.basis, questions, choices)) for key in shared]
        runs.append(_run_record(done, sum(costs), others))
    about = {"digest": questions_digest(questions), "count": len(questions)}
    run = {"questions": about, **pss.method_key(choices), "models": runs}
    targets = {done.target.model.name: done.target for done in found}
    masks = Masks(targets, questions, choices, store)
    return Study(accuracies, run, tuple(questions), masks, paths)


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

    def write(folder: Path) -> None:
        measured.pss.to_parquet(folder / PSS, index=False)
        measured.details.to_parquet(folder / DETAILS, index=False)

    return write, record


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
        sums = recorded.sums
        if loaded.dtype != torch.float32:
            # Half the disk: square roots of 4e-9 to 4e9 are within 0.1 % in half precision, which
            # is finer than what the model computes in. In place: a second copy would be gigabytes.
            sums = sums.sqrt_().half()
        tensors = {"sums": sums, "counts": recorded.counts}
        return lambda folder: save_file(tensors, folder / COEFFICIENTS), unit_record(loaded)

    key = _coefficients_key(basis_of(loaded), questions, choices)
    path = (store or Store("results/store")).find(key, record)
    return _read_coefficients(path, questions)


def _read_coefficients(path: Path, questions: Sequence[Question]) -> ConceptCoefficients:
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    found = load_file(path / COEFFICIENTS)
    if found["sums"].dtype == torch.half:
        found["sums"] = found["sums"].float().square_()
    return ConceptCoefficients(concepts, **found)


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
            study.write(scratch)
            text = json.dumps(study.run, indent=2, ensure_ascii=False) + "\n"
            (scratch / "run.json").write_text(text, encoding="utf-8")
            asked = "".join(f"{question.model_dump_json()}\n" for question in study.questions)
            (scratch / "questions.jsonl").write_text(asked, encoding="utf-8")
            for file in list(scratch.iterdir()):
                file.replace(out / file.name)
