"""Measure models over a set of questions, in units that are stored as they are done.

    study = measure_pss(["smollm2-135m"], questions, Choices(), store=Store("results/store"))
    study.pss, study.details, study.masks, study.run
    write_study(study, Path("out"))

A unit is (model, shard of concepts). A finished unit is never computed again: a rerun after a
crash, a wider set of ratios on the next model, or a second chapter with the same choices continues
from the store. Units that are not there yet are grouped into tasks and handed out (see `workers`);
a task loads its model once, and puts each unit into the store as it is done. What is returned is
read from the store, so that it is the same whoever computed it.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.limits import release_memory
from paramspec.execution.parallel import (
    begin_work,
    hand_out,
    in_worker,
    on_this_machine,
    worker_count,
)
from paramspec.execution.provenance import group_records, read_computed
from paramspec.execution.store import Store, remove_leftovers, writing_to
from paramspec.method.batches import BATCH_TOKENS
from paramspec.method.hooks import down_projections, value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.masks import ConceptCoefficients, load_masks, record_concepts, save_masks
from paramspec.method.pss import (
    Choices,
    Tables,
    evaluations,
    general_questions,
    measure_concepts,
    method_key,
)
from paramspec.method.rows import ROW_TOKENS, Request
from paramspec.method.scoring import (
    SCORING_VERSION,
    choose_engine,
    encode,
    mark,
    score_options,
)
from paramspec.models.checkpoints import (
    Checkpoint,
    checkpoint_files,
    digest_files,
    find_checkpoints,
)
from paramspec.models.describe import folds_asked, require_taught
from paramspec.models.devices import place_and_dtype
from paramspec.models.load import LoadedModel, check_checkpoint, load_model
from paramspec.models.registry import require_distinct
from paramspec.specwiki import Question, questions_digest
from paramspec.studies.records import unit_record
from paramspec.tables import DETAIL_COLUMNS, PSS_COLUMNS

COEFFICIENTS = "coefficients.safetensors"
SHARD = 4  # concepts of a unit: seconds to minutes of work, so that little is lost by a crash
TASKS = 2  # of a worker, were all models as large as the largest: uneven ones even out
# Weights whose computation takes as long as what is done beside it: of 0.35 M weights, an
# evaluation took 0.7 ms on a core, of 135 M weights 44 ms.
OVERHEAD = 2_000_000


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
        questions: of at least two concepts, both folds of each; with a micro model among the
            models, of concepts that it was taught (see `study_questions`).
        choices: see `Choices`; the defaults if not given.
        store: where finished units are kept and looked for.
        dtype, device: see `load_model`.

    Models that are loaded already are measured in this process, the others where `workers` says.

    Raises:
        InputError: if a model is not found, incomplete or named twice, if the questions cannot be
            used or must not be asked of a micro model (see `require_taught`), or if the store is
            of a newer version, before anything is measured; if a model cannot be measured, when
            its turn comes: what is finished is kept.
    """
    choices = (choices or Choices()).with_folds(folds_asked(models))
    store = store or Store("results/store")
    store = Store(store.root.absolute())
    require_taught(models, questions, choices.score_on)
    _refuse_thin(questions, choices)
    plans = _plan(models, questions, choices, store, dtype, device)
    store.remove_leftovers()
    computed = _measure(plans, questions, choices, store)
    parts, runs = [], []
    for plan in plans:
        paths = [store.get(key) for key in plan.keys]
        if None in paths:
            raise InputError(
                f"{store.root}: a result of model {plan.name!r} was damaged or removed as soon as "
                "it was written; check the disk, and run again: what is whole is kept"
            )
        parts += [_load(path) for path in paths]
        recorded = store.record(_coefficients_key(plan.identity, questions, choices))
        runs.append(_run_record(plan, paths, recorded, computed[plan.name], questions, choices))
    run = {
        "questions": {"digest": questions_digest(questions), "count": len(questions)},
        **method_key(choices),
        "models": runs,
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
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """`answers = score_questions(load_model("smollm2-135m"), questions)`: without any mask.

    Returns:
        A row per question: `question_id`, `concept`, `domain`, `tier`, `relation`, `fold`,
        `option_logprobs`, `predicted`, `predicted_norm`, `correct`, `correct_norm`, as in
        `DETAIL_COLUMNS`.

    Raises:
        InputError: if a micro model must not be asked one of them, see `require_taught`.
    """
    require_taught([model], questions, {question.fold for question in questions})
    store = store or Store("results/store")
    view = value_vector_view(model.model)
    engine = choose_engine(view)
    key = result_basis(identity_of(model), questions) | {
        "unit": "answers",
        "row_tokens": row_tokens,
        "batch_tokens": batch_tokens,
    }
    path = store.get(key)
    if path is None:
        with (
            naming(model.name),
            tqdm(total=len(questions), desc=model.name, unit="question") as bar,
        ):
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
            [answer_row(question, score) for question, score in zip(questions, scores, strict=True)]
        )
        path = store.put(
            key,
            lambda folder: table.to_parquet(folder / "answers.parquet"),
            unit_record(model, engine),
        )
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
    require_taught([loaded], questions, ())
    store = store or Store("results/store")
    key = _coefficients_key(identity_of(loaded), questions, choices)
    with store.turn(key):
        path = store.get(key)
        if path is None:
            recorded = _record(loaded, questions, choices)
            tensors = {"sums": recorded.sums, "counts": recorded.counts}
            path = store.put(
                key, lambda folder: save_file(tensors, folder / COEFFICIENTS), unit_record(loaded)
            )
    concepts = tuple(dict.fromkeys(question.concept for question in questions))
    return ConceptCoefficients(concepts, **load_file(path / COEFFICIENTS))


def _coefficients_key(
    identity: Identity, questions: Sequence[Question], choices: Choices
) -> dict[str, object]:
    return result_basis(identity, questions) | {
        "unit": "coefficients",
        "position": choices.position,
        "batch_tokens": choices.batch_tokens,
    }


def _record(
    loaded: LoadedModel, questions: Sequence[Question], choices: Choices
) -> ConceptCoefficients:
    options = {"desc": "coefficients", "unit": "question", "leave": False, "disable": in_worker()}
    with tqdm(total=len(questions), **options) as bar:
        return record_concepts(
            value_vector_view(loaded.model),
            loaded.tokenizer,
            questions,
            position=choices.position,
            batch_tokens=choices.batch_tokens,
            progress=bar.update,
        )


def answer_row(question: Question, score: Tensor) -> dict[str, object]:
    return {
        "question_id": question.id,
        "concept": question.concept,
        "domain": question.domain,
        "tier": question.tier,
        "relation": question.relation,
        "fold": question.fold,
        "option_logprobs": score.tolist(),
        **mark(score.tolist(), question),
    }


def write_study(study: Study, out: Path) -> None:
    """`write_study(study, Path("out"))`: the four files that the command `pss` leaves.

    All are written before the first of them replaces its predecessor: a full disk leaves the
    results that were there.
    """
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with TemporaryDirectory(prefix=".partial-", dir=out) as name:
            scratch = Path(name)
            study.pss.to_parquet(scratch / "pss.parquet", index=False)
            study.details.to_parquet(scratch / "details.parquet", index=False)
            save_masks(scratch / "masks.safetensors", study.masks, study.run)
            text = json.dumps(study.run, indent=2, ensure_ascii=False) + "\n"
            (scratch / "run.json").write_text(text, encoding="utf-8")
            for file in list(scratch.iterdir()):
                file.replace(out / file.name)


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


# --- planning -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What tells a model from others in a key, known before it is loaded."""

    name: str
    digest: str
    dtype: torch.dtype
    device: str
    arithmetic: str = "stock"  # of the machine that computes, see `kernels.arithmetic`


@dataclass(frozen=True)
class _Plan:
    """A model's units: `keys[i]` is that of `shards[i]`, and `missing` lists those to compute."""

    model: LoadedModel | Checkpoint
    identity: Identity
    place: str  # a device as `load_model` takes it
    weights: int
    shards: list[list[str]]
    keys: list[dict[str, object]]
    missing: list[int]

    @property
    def name(self) -> str:
        return self.identity.name


def concept_shards(questions: Sequence[Question]) -> list[list[str]]:
    """`concept_shards(questions)`: the concepts of each unit, in the order of the questions."""
    concepts = list(dict.fromkeys(question.concept for question in questions))
    return [concepts[start : start + SHARD] for start in range(0, len(concepts), SHARD)]


def _plan(
    models: Sequence[str | LoadedModel],
    questions: Sequence[Question],
    choices: Choices,
    store: Store,
    dtype: str,
    device: str,
) -> list[_Plan]:
    """Find the models, and their units in the store: what can fail cheaply fails here."""
    require_distinct([model if isinstance(model, str) else model.name for model in models])
    names = [model for model in models if isinstance(model, str)]
    place, kind, way = "cpu", torch.float32, "stock"
    if names:
        place, kind = elsewhere(place_and_dtype, device, dtype)
        way = elsewhere(arithmetic, kind, torch.device(place).type)
    found = iter(find_checkpoints(names))
    everything = [model if isinstance(model, LoadedModel) else next(found) for model in models]
    require_distinct([model.name for model in everything])
    shards = concept_shards(questions)
    plans = []
    for model in everything:
        if isinstance(model, LoadedModel):
            identity = identity_of(model)
        else:
            # A worker may have another working directory.
            model = Checkpoint(model.name, model.spec, model.path.absolute())
            digest = digest_files(checkpoint_files(model.path))
            identity = Identity(model.name, digest, kind, torch.device(place).type, way)
        basis = result_basis(identity, questions) | method_key(choices) | {"unit": "pss"}
        keys = [basis | {"concepts": shard} for shard in shards]
        missing = [number for number, key in enumerate(keys) if store.get(key) is None]
        weights = 0
        if missing and isinstance(model, Checkpoint):
            weights = _check(model)
        plans.append(_Plan(model, identity, str(place), weights, shards, keys, missing))
    waiting = [plan for plan in plans if plan.weights]
    if waiting and not on_this_machine():
        require_shared(store, [plan.model.path for plan in waiting])
    return plans


def _check(checkpoint: Checkpoint) -> int:
    """Refuse a model that cannot be measured, as far as its files' headers tell; its weights."""
    network = check_checkpoint(checkpoint)
    if network is None:
        return checkpoint.path.stat().st_size  # of a GGUF file: a byte or less for each
    down_projections(network)
    return network.num_parameters()


def elsewhere(function: Callable[..., object], *arguments: object) -> object:
    """Call it where tasks will run: the machines of a cluster may have other GPUs than this."""
    if on_this_machine():
        return function(*arguments)
    return next(iter(hand_out(function, [arguments])))


def require_shared(store: Store, paths: Sequence[Path]) -> None:
    """A cluster's workers read models from, and write results to, directories that they share."""
    with writing_to(store.root):
        store.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".shared-", dir=store.root) as name:
            unseen = elsewhere(_unseen, [Path(name), *paths])
    if unseen:
        place, remedy = unseen[0], "copy the model to a directory that all machines see"
        if place.name.startswith(".shared-"):
            place, remedy = store.root, "choose a store in a directory that all machines see"
        raise InputError(f"{place}: not seen by a worker of the cluster; {remedy}")


def _unseen(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if not path.exists()]


def _tasks(plans: Sequence[_Plan], count: int) -> list[tuple[_Plan, list[int]]]:
    """Which missing units make a task: the costliest first, small models whole, large ones split.

    A model's cost is its weights times its missing units. With several workers, a task is at most
    its share of the whole, so that all of them are done at about the same time; splitting further
    would only load a model more often.
    """
    costs = {plan.name: (plan.weights + OVERHEAD) * len(plan.missing) for plan in plans}
    share = sum(costs.values()) / (TASKS * count if count > 1 else 1)
    tasks = []
    for plan in plans:
        if not plan.missing:
            continue
        parts = min(len(plan.missing), math.ceil(costs[plan.name] / share - 1e-9))
        size = math.ceil(len(plan.missing) / parts)
        for start in range(0, len(plan.missing), size):
            tasks.append((plan, plan.missing[start : start + size]))
    return sorted(tasks, key=lambda task: -(task[0].weights + OVERHEAD) * len(task[1]))


# --- measuring ----------------------------------------------------------------------------------


def _measure(
    plans: Sequence[_Plan], questions: Sequence[Question], choices: Choices, store: Store
) -> Counter[str]:
    """Measure what is missing; how many units of each model this run itself computed."""
    computed: Counter[str] = Counter()
    costs = {
        id(plan): [evaluations(choices, questions, shard) for shard in plan.shards]
        for plan in plans
    }
    total = sum(map(sum, costs.values()))
    title = plans[0].name if len(plans) == 1 else f"{len(plans)} models"
    with tqdm(total=total, desc=title, unit="question", smoothing=0.1) as bar:
        for plan in plans:
            stored = set(range(len(plan.keys))) - set(plan.missing)
            bar.update(sum(costs[id(plan)][number] for number in stored))
        # A model in this process cannot be sent to another.
        for plan in plans:
            if isinstance(plan.model, LoadedModel) and plan.missing:
                made = _measure_units(plan, plan.missing, questions, choices, store, bar.update)
                computed[plan.name] += made[1]
        rest = [plan for plan in plans if isinstance(plan.model, Checkpoint) and plan.missing]
        if not rest:
            return computed
        count = worker_count()
        here = count == 1 and on_this_machine()
        tasks = [
            (plan, numbers, questions, choices, store, bar.update if here else None)
            for plan, numbers in _tasks(rest, count)
        ]
        waiting = (
            {}
            if here
            else {
                (plan.name, number): (plan.keys[number], costs[id(plan)][number])
                for plan in rest
                for number in plan.missing
            }
        )
        with watching(store, waiting, bar):
            for name, made in hand_out(_measure_units, tasks):
                computed[name] += made
    return computed


@contextmanager
def watching(
    store: Store, waiting: dict[object, tuple[dict[str, object], int]], bar: tqdm
) -> Iterator[None]:
    """Move the bar as units that other processes compute come into the store."""
    left, over = dict(waiting), threading.Event()

    def look() -> None:
        for name in [name for name, (key, _) in left.items() if store.has(key)]:
            bar.update(left.pop(name)[1])

    def watch() -> None:
        while not over.wait(0.5):
            look()
            if sys.stderr.isatty():  # elsewhere, each refresh is a line in a log
                bar.refresh()

    thread = threading.Thread(target=watch, daemon=True)
    if waiting:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if waiting:
            thread.join()
            look()


def _measure_units(
    plan: _Plan,
    numbers: Sequence[int],
    questions: Sequence[Question],
    choices: Choices,
    store: Store,
    progress: Callable[[int], None] | None,
) -> tuple[str, int]:
    """A task: measure some units of a model; its name, and how many were not in the store yet."""
    begin_work()
    progress = progress or (lambda done: None)
    loaded = None
    computed = 0
    waiting = [(number, False) for number in numbers]
    while waiting:
        number, wait = waiting.pop(0)
        key, shard = plan.keys[number], plan.shards[number]
        with store.turn(key, wait=wait) as mine:
            if not mine:  # another sweep computes it just now: by the end it will be there
                waiting.append((number, True))
                continue
            if store.get(key) is not None:
                progress(evaluations(choices, questions, shard))
                continue
            began = time.perf_counter()
            if loaded is None:
                loaded = _load_planned(plan)
                view = value_vector_view(loaded.model)
                engine = choose_engine(view)
                with naming(plan.name):
                    coefficients = concept_coefficients(loaded, questions, choices, store=store)
            with naming(plan.name):
                measured = measure_concepts(
                    loaded.name,
                    view,
                    loaded.tokenizer,
                    questions,
                    shard,
                    choices,
                    coefficients,
                    engine=engine,
                    progress=progress,
                )
            seconds = time.perf_counter() - began
            record = unit_record(loaded, engine) | {
                "layers": view.layers,
                "width": view.width,
                "seconds": seconds,
            }
            store.put(key, lambda folder, measured=measured: _save(measured, folder), record)
            computed += 1
        release_memory()  # a packed copy of the weights
    return plan.name, computed


def _load_planned(plan: _Plan) -> LoadedModel:
    if isinstance(plan.model, LoadedModel):
        return plan.model
    dtype = str(plan.identity.dtype).removeprefix("torch.")
    loaded = load_model(plan.model, dtype=dtype, device=plan.place)
    if loaded.digest != plan.identity.digest:
        raise InputError(
            f"{plan.model.path}: not the files that the sweep began with, or not those that the "
            "machine has which began it; let them be the same, and run again"
        )
    require_same_arithmetic(plan.identity, loaded)
    return loaded


def require_same_arithmetic(planned: Identity, loaded: LoadedModel) -> None:
    """Refuse a worker whose numbers would be stored as those of another kind of machine."""
    here = identity_of(loaded).arithmetic
    if here != planned.arithmetic:
        raise InputError(
            f"{loaded.name}: this machine computes {planned.dtype} as {here!r}, the one asked at "
            f"the start as {planned.arithmetic!r}; use float32, or machines of one kind"
        )


def _run_record(
    plan: _Plan,
    paths: Sequence[Path],
    coefficients: dict[str, object],
    computed: int,
    questions: Sequence[Question],
    choices: Choices,
) -> dict[str, object]:
    """Of one model; see `provenance`. What all its units say alike is said once."""
    records = [read_computed(path) for path in paths]
    units = [
        ({"unit": "pss", "concepts": shard}, record)
        for shard, record in zip(plan.shards, records, strict=True)
    ]
    trained = read_computed(plan.model.path) if isinstance(plan.model, Checkpoint) else {}
    for name, record in (("coefficients", coefficients), ("training", trained)):
        units += [({"unit": name}, record)] if record else []
    alike = ("model", "digest", "dtype", "tokenizer", "layers", "width")
    own = [(label, {k: v for k, v in r.items() if k not in alike}) for label, r in units]
    concepts = [concept for shard in plan.shards for concept in shard]
    return {
        "name": plan.name,
        "digest": plan.identity.digest,
        "dtype": str(plan.identity.dtype).removeprefix("torch."),
        "tokenizer": records[0]["tokenizer"],
        "layers": records[0]["layers"],
        "width": records[0]["width"],
        "evaluations": evaluations(choices, questions, concepts),
        "units": len(paths),
        "units_from_store": len(paths) - computed,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "computed": group_records(own),
    }


def identity_of(loaded: LoadedModel) -> Identity:
    device = loaded.device.type
    return Identity(
        loaded.name, loaded.digest, loaded.dtype, device, arithmetic(loaded.dtype, device)
    )


def result_basis(identity: Identity, questions: Sequence[Question]) -> dict[str, object]:
    """What every result of a model on some questions depends on.

    Not the engine, nor the worker. In float32 they move a log-likelihood by less than 1e-3, as
    rounding does; in bfloat16 both follow from what is here, see `kernels`.
    """
    return {
        "model": identity.digest,
        "name": identity.name,
        "dtype": str(identity.dtype),
        "device": identity.device,
        "arithmetic": identity.arithmetic,
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
