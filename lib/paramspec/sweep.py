"""Measure models over a set of questions, in units that are stored as they are done.

    study = measure_pss(["smollm2-135m"], questions, Choices(), store=Store("results/store"))
    study.pss, study.details, study.masks, study.run
    write_study(study, Path("out"))

A unit is (model, shard of concepts). A finished unit is never computed again: a rerun after a
crash, a wider set of ratios on the next model, or a second chapter with the same choices continues
from the store.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from paramspec.errors import InputError
from paramspec.hooks import value_vector_view
from paramspec.masks import ConceptCoefficients, load_masks, record_concepts, save_masks
from paramspec.models import LoadedModel, find_checkpoint, load_model
from paramspec.pss import (
    DETAIL_COLUMNS,
    PSS_COLUMNS,
    Choices,
    Tables,
    evaluations,
    general_questions,
    measure_concepts,
    method_key,
)
from paramspec.scoring import (
    SCORING_VERSION,
    Request,
    choose,
    choose_engine,
    encode,
    score_options,
)
from paramspec.specwiki import Question, questions_digest
from paramspec.store import Store, writing_to

VERSIONS = ("paramspec", "torch", "transformers", "numpy")
COEFFICIENTS = "coefficients.safetensors"
SHARD = 4  # concepts of a unit: seconds to minutes of work, so that little is lost by a crash


@dataclass(frozen=True)
class Study:
    """What `measure_pss` gives: its tables, masks by name, and the record of the run."""

    pss: pd.DataFrame
    details: pd.DataFrame
    masks: dict[str, Tensor]
    run: dict[str, object]


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

    Args:
        models: registry ids, hub ids, directories, GGUF files, or models already loaded.
        questions: of at least two concepts, both folds of each.
        choices: see `Choices`; the defaults if not given.
        store: where finished units are kept and looked for.
        dtype, device: see `load_model`.

    Raises:
        InputError: if a model is not found or named twice, or if the questions cannot be used,
            before anything is measured; if a model cannot be loaded, when its turn comes.
    """
    choices = choices or Choices()
    store = store or Store("results/store")
    _refuse_thin(questions, choices)
    _refuse_twice(models)
    parts: list[Tables] = []
    runs = []
    for model in models:
        loaded = (
            model
            if isinstance(model, LoadedModel)
            else load_model(model, dtype=dtype, device=device)
        )
        tables, run = _measure_model(loaded, questions, choices, store)
        parts += tables
        runs.append(run)
    run = {
        "questions": {"digest": questions_digest(questions), "count": len(questions)},
        **method_key(choices),
        "models": runs,
        "versions": {name: version(name) for name in VERSIONS},
        "hardware": hardware(),
    }
    return Study(
        pd.concat([part.pss for part in parts], ignore_index=True),
        pd.concat([part.details for part in parts], ignore_index=True),
        {name: mask for part in parts for name, mask in part.masks.items()},
        run,
    )


def score_questions(
    model: LoadedModel,
    questions: Sequence[Question],
    *,
    store: Store | None = None,
    row_tokens: int = 128,
    batch_tokens: int = 2048,
) -> pd.DataFrame:
    """`answers = score_questions(load_model("smollm2-135m"), questions)`: without any mask.

    Returns:
        A row per question: `question_id`, `concept`, `domain`, `tier`, `relation`, `fold`,
        `option_logprobs`, `predicted`, `predicted_norm`, `correct`, `correct_norm`, as in
        `DETAIL_COLUMNS`.
    """
    store = store or Store("results/store")
    view = value_vector_view(model.model)
    engine = choose_engine(view)
    key = _basis(model, questions) | {
        "unit": "answers",
        "engine": engine.name,
        "row_tokens": row_tokens,
        "batch_tokens": batch_tokens,
    }
    path = store.get(key)
    if path is None:
        with tqdm(total=len(questions), desc=model.name, unit="question") as bar:
            scores = score_options(
                view,
                [Request(encode(model.tokenizer, question), 0) for question in questions],
                [None],
                engine=engine,
                row_tokens=row_tokens,
                batch_tokens=batch_tokens,
                progress=bar.update,
            )
        table = pd.DataFrame(
            [_answer(question, score) for question, score in zip(questions, scores, strict=True)]
        )
        path = store.put(key, lambda folder: table.to_parquet(folder / "answers.parquet"))
    return pd.read_parquet(path / "answers.parquet")


def concept_coefficients(
    loaded: LoadedModel,
    questions: Sequence[Question],
    choices: Choices | None = None,
    *,
    store: Store | None = None,
) -> ConceptCoefficients:
    """`coefficients = concept_coefficients(loaded, questions)`: `record_concepts`, stored.

    Args:
        loaded: the model.
        questions: of at least two concepts.
        choices: only `position` and `batch_tokens` matter.
        store: where they are kept and looked for.
    """
    choices = choices or Choices()
    store = store or Store("results/store")
    key = _basis(loaded, questions) | {
        "unit": "coefficients",
        "position": choices.position,
        "batch_tokens": choices.batch_tokens,
    }
    path = store.get(key)
    if path is None:
        with tqdm(total=len(questions), desc="coefficients", unit="question", leave=False) as bar:
            recorded = record_concepts(
                value_vector_view(loaded.model),
                loaded.tokenizer,
                questions,
                position=choices.position,
                batch_tokens=choices.batch_tokens,
                progress=bar.update,
            )
        tensors = {"sums": recorded.sums, "counts": recorded.counts}
        path = store.put(key, lambda folder: save_file(tensors, folder / COEFFICIENTS))
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    return ConceptCoefficients(concepts, **load_file(path / COEFFICIENTS))


def _answer(question: Question, score: Tensor) -> dict[str, object]:
    choice = choose(score.tolist(), question.options)
    return {
        "question_id": question.id,
        "concept": question.concept,
        "domain": question.domain,
        "tier": question.tier,
        "relation": question.relation,
        "fold": question.fold,
        "option_logprobs": score.tolist(),
        "predicted": choice.by_sum,
        "predicted_norm": choice.by_characters,
        "correct": choice.by_sum == question.answer,
        "correct_norm": choice.by_characters == question.answer,
    }


def write_study(study: Study, out: Path) -> None:
    """`write_study(study, Path("out"))`: the four files that the command `pss` leaves.

    All are written before the first of them replaces its predecessor: a full disk leaves the
    results that were there.
    """
    choices = {
        key: value for key, value in study.run.items() if key not in ("hardware", "versions")
    }
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=out) as name:
            scratch = Path(name)
            study.pss.to_parquet(scratch / "pss.parquet", index=False)
            study.details.to_parquet(scratch / "details.parquet", index=False)
            save_masks(scratch / "masks.safetensors", study.masks, choices)
            text = json.dumps(study.run, indent=2, ensure_ascii=False) + "\n"
            (scratch / "run.json").write_text(text, encoding="utf-8")
            for file in list(scratch.iterdir()):
                file.replace(out / file.name)


def hardware() -> dict[str, object]:
    """`hardware()`: what a run was computed on."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpus": gpus}


def _refuse_twice(models: Sequence[str | LoadedModel]) -> None:
    if not models:
        raise InputError("models: none given; name at least one model")
    names = set()
    for model in models:
        name = model.name if isinstance(model, LoadedModel) else find_checkpoint(model).name
        if name in names:
            raise InputError(f"model {name!r}: given twice; results are told apart by its name")
        names.add(name)


def _refuse_thin(questions: Sequence[Question], choices: Choices) -> None:
    folds: dict[str, set[int]] = {}
    for question in questions:
        folds.setdefault(question.concept, set()).add(question.fold)
    if len(folds) < 2:
        raise InputError(f"questions on {len(folds)} concept(s): at least 2 are needed")
    for concept, present in folds.items():
        if len(present) < 2:
            raise InputError(
                f"{concept!r} has questions of fold {min(present)} alone; both folds are needed"
            )
    # The concept with the most questions has the fewest on others.
    asked = Counter(q.concept for q in questions if q.fold in choices.score_on)
    general_questions(questions, asked.most_common(1)[0][0], choices)


def _measure_model(
    loaded: LoadedModel, questions: Sequence[Question], choices: Choices, store: Store
) -> tuple[list[Tables], dict[str, object]]:
    began = time.perf_counter()
    view = value_vector_view(loaded.model)
    engine = choose_engine(view)
    basis = _basis(loaded, questions)
    concepts = list(dict.fromkeys(question.concept for question in questions))
    shards = [concepts[start : start + SHARD] for start in range(0, len(concepts), SHARD)]
    keys = [
        basis | method_key(choices) | {"unit": "pss", "engine": engine.name, "concepts": shard}
        for shard in shards
    ]
    total = evaluations(choices, questions, concepts)
    reused = 0
    tables = []
    with tqdm(total=total, desc=loaded.name, unit="question", smoothing=0.1) as bar:
        for shard, key in zip(shards, keys, strict=True):
            path = store.get(key)
            if path is None:
                coefficients = concept_coefficients(loaded, questions, choices, store=store)
                measured = measure_concepts(
                    loaded.name,
                    view,
                    loaded.tokenizer,
                    questions,
                    shard,
                    choices,
                    coefficients,
                    engine=engine,
                    progress=bar.update,
                )
                path = store.put(key, lambda folder, measured=measured: _save(measured, folder))
            else:
                reused += 1
                bar.update(evaluations(choices, questions, shard))
            tables.append(_load(path))
    run = {
        "name": loaded.name,
        "digest": loaded.digest,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "engine": {"name": engine.name, "reason": engine.reason},
        "layers": view.layers,
        "width": view.width,
        "evaluations": total,
        "units": len(shards),
        "units_from_store": reused,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return tables, run


def _basis(loaded: LoadedModel, questions: Sequence[Question]) -> dict[str, object]:
    """What every result of a model on some questions depends on."""
    return {
        "model": loaded.digest,
        "name": loaded.name,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "questions": questions_digest(questions),
        "scoring_version": SCORING_VERSION,
    }


def _save(tables: Tables, directory: Path) -> None:
    tables.pss.to_parquet(directory / "pss.parquet", index=False)
    tables.details.to_parquet(directory / "details.parquet", index=False)
    save_masks(directory / "masks.safetensors", tables.masks, {})


def _load(directory: Path) -> Tables:
    return Tables(
        pd.read_parquet(directory / "pss.parquet")[list(PSS_COLUMNS)],
        pd.read_parquet(directory / "details.parquet")[list(DETAIL_COLUMNS)],
        load_masks(directory / "masks.safetensors")[0],
    )
