"""Units of work on models: found in the store, or computed where `workers` says, and stored.

    targets = find_targets(["zoo-llama-1", "smollm2-135m"])
    jobs = [Job(target, keys, costs, compute) for target in targets]
    for job, done in zip(jobs, run_jobs(jobs, store), strict=True):
        done.paths, done.computed           # the units' directories; how many this run computed

A unit is what a crash can lose. Its result depends on its key alone, so that it is the same whoever
computed it, and a rerun, or another study with the same key, finds it. Units of one model are
handed out in chunks; a process keeps the model that its last chunk was about.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.files import writing_to
from paramspec.execution.limits import release_memory
from paramspec.execution.parallel import hand_out, on_this_machine, worker_count
from paramspec.execution.store import Store
from paramspec.method.hooks import ValueVectorView, unverified_view, value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.rows import Engine
from paramspec.method.scoring import SCORING_VERSION, choose_engine
from paramspec.models.checkpoints import Checkpoint, digest_of, find_checkpoints
from paramspec.models.devices import place_and_dtype
from paramspec.models.load import LoadedModel, check_checkpoint, load_model
from paramspec.models.registry import require_distinct
from paramspec.models.tokens import tokenizer_facts
from paramspec.specwiki import Question, questions_digest

CHUNKS = 4  # of a worker, at least, where models are large: so all are done at about the same time
# Weights whose computation takes as long as what is done beside it: of 0.35 M weights, an
# evaluation took 0.7 ms on a core, of 135 M weights 44 ms.
OVERHEAD = 2_000_000


@dataclass(frozen=True)
class Target:
    """A model to be measured, loaded already or where it lies, and what a result of it depends on.

    `device` is `load_model`'s; `arithmetic` is that of the machine that computes, see `kernels`.
    """

    model: LoadedModel | Checkpoint
    name: str
    digest: str
    dtype: torch.dtype
    device: str
    arithmetic: str = "stock"


@dataclass(frozen=True)
class Ready:
    """A model that is loaded, its view verified and its engine chosen, once for all its units.

    `kept` is what units leave for those after them.
    """

    loaded: LoadedModel
    view: ValueVectorView
    engine: Engine
    kept: dict[str, Any] = field(default_factory=dict)


# Computes unit number so-and-so: what fills its directory, and what its record says of it.
Compute = Callable[[Ready, int], tuple[Callable[[Path], None], Mapping[str, Any]]]


@dataclass(frozen=True)
class Job:
    """The units of a model: `keys[i]` is that of unit `i`, and `costs[i]` its evaluations.

    `compute` goes to other processes: a function of a module, or a `functools.partial` of one.
    """

    target: Target
    keys: tuple[Mapping[str, Any], ...]
    costs: tuple[float, ...]
    compute: Compute


def target_of(loaded: LoadedModel) -> Target:
    """`target_of(loaded)`: a model in memory."""
    way = arithmetic(loaded.dtype, loaded.device.type)
    return Target(loaded, loaded.name, loaded.digest, loaded.dtype, str(loaded.device), way)


def find_targets(
    models: Sequence[str | LoadedModel], dtype: str = "auto", device: str = "auto"
) -> list[Target]:
    """`find_targets(["smollm2-135m"])`: where models lie, trained or fetched if need be.

    Raises:
        InputError: if one is not found, or named twice.
    """
    names = [model for model in models if isinstance(model, str)]
    found = {}
    if names:
        place, kind, way = _where_tasks_run(_choose_device, device, dtype)
        for name, one in zip(names, find_checkpoints(names), strict=True):
            # A worker may have another working directory.
            one = Checkpoint(one.name, one.path.absolute())
            found[name] = Target(one, one.name, digest_of(one.path), kind, str(place), way)
    targets = [found[one] if isinstance(one, str) else target_of(one) for one in models]
    require_distinct([target.name for target in targets])
    return targets


def _choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype, str]:
    place, kind = place_and_dtype(device, dtype)
    return place, kind, arithmetic(kind, place.type)


def _where_tasks_run(function: Callable[..., object], *arguments: object) -> Any:
    """Call it there: the machines of a cluster may have other GPUs, and other disks, than this."""
    if on_this_machine():
        return function(*arguments)
    return next(iter(hand_out(function, [arguments])))


class Done(NamedTuple):
    """The directories of a job's units, and how many of these this run computed."""

    paths: list[Path]
    computed: int


def run_jobs(jobs: Sequence[Job], store: Store, *, unit: str = "question") -> list[Done]:
    """`(done,) = run_jobs([job], store)`: compute the units that are missing; of each job all.

    Models that are loaded already are measured in this process.

    Raises:
        InputError: before any work, if a model cannot be measured, as far as its files' headers
            tell, or is not seen by the workers; what a unit raises, beginning with the model's
            name: what is finished is kept.
    """
    store.remove_leftovers()
    here: list[tuple[Job, list[int]]] = []
    away: list[tuple[Job, list[int], Checkpoint]] = []
    left = 0.0
    for job in jobs:
        missing = [number for number, key in enumerate(job.keys) if store.get(key) is None]
        left += sum(job.costs[number] for number in missing)
        if isinstance(job.target.model, LoadedModel):
            here += [(job, [number]) for number in missing]
        elif missing:
            away.append((job, missing, job.target.model))
    if away and not on_this_machine():
        _require_shared(store, [checkpoint.path for *_, checkpoint in away])
    weighed = [(job, missing, _weights(checkpoint)) for job, missing, checkpoint in away]
    handed_out = _chunks(weighed, worker_count()) if weighed else []
    results = chain(
        (_work(job, numbers, store) for job, numbers in here),
        hand_out(_work, [(*chunk, store) for chunk in handed_out]) if handed_out else (),
    )
    title = jobs[0].target.name if len(jobs) == 1 else f"{len(jobs)} models"
    total = sum(sum(job.costs) for job in jobs)
    computed: Counter[str] = Counter()
    try:
        with tqdm(total=total, initial=total - left, desc=title, unit=unit) as bar:
            for name, made, cost in results:
                computed[name] += made
                bar.update(cost)
    finally:
        _HELD.clear()  # of this process, if it was the worker
    return [
        Done([_stored(store, key, job.target.name) for key in job.keys], computed[job.target.name])
        for job in jobs
    ]


def _stored(store: Store, key: Mapping[str, Any], name: str) -> Path:
    path = store.get(key)
    if path is None:
        raise InputError(
            f"{store.root}: a result of {name!r} was damaged or removed as soon as it was written; "
            "check the disk, and run again: what is whole is kept"
        )
    return path


def _chunks(
    jobs: Sequence[tuple[Job, Sequence[int], int]], count: int
) -> list[tuple[Job, list[int]]]:
    """Which missing units make a task: of the largest model first, and the costliest of each.

    A unit costs its evaluations, times the model's weights. Small models make one task, large ones
    several; a single worker, which keeps the model, gets units one by one.
    """

    costs = [(weights + OVERHEAD) * sum(job.costs[n] for n in left) for job, left, weights in jobs]
    share = sum(costs) / (CHUNKS * count)
    chunks = []
    for place in sorted(range(len(jobs)), key=lambda place: -jobs[place][2]):
        job, numbers, _ = jobs[place]
        numbers = sorted(numbers, key=lambda n: -job.costs[n])
        parts = math.ceil(costs[place] / share - 1e-9)
        size = math.ceil(len(numbers) / parts) if count > 1 else 1
        for start in range(0, len(numbers), size):
            chunks.append((job, numbers[start : start + size]))
    return chunks


def _work(job: Job, numbers: Sequence[int], store: Store) -> tuple[str, int, float]:
    """A task: compute units of a model; its name, how many were not there yet, and their cost."""
    computed = 0
    for wait in (False, True):  # what another run computes just now is there by the end
        for number in numbers:
            key = job.keys[number]
            if store.has(key):
                continue
            with store.turn(key, wait=wait) as mine:
                if mine and store.get(key) is None:
                    with naming(job.target.name):
                        ready = _hold(job.target)
                        write, record = job.compute(ready, number)
                    store.put(key, write, {**unit_record(ready.loaded, ready.engine), **record})
                    computed += 1
            release_memory()  # a packed copy of the weights
    return job.target.name, computed, sum(job.costs[number] for number in numbers)


# The model that a process computed with last: the next unit is most likely about the same.
_HELD: list[tuple[Target, Ready]] = []


def _hold(target: Target) -> Ready:
    if not _HELD or _HELD[0][0] != target:
        _HELD.clear()  # before another one takes memory
        model = target.model
        loaded = model if isinstance(model, LoadedModel) else _load(target, model)
        view = value_vector_view(loaded.model)
        _HELD.append((target, Ready(loaded, view, choose_engine(view))))
    return _HELD[0][1]


def _load(target: Target, checkpoint: Checkpoint) -> LoadedModel:
    dtype = str(target.dtype).removeprefix("torch.")
    loaded = load_model(checkpoint, dtype=dtype, device=target.device)
    if loaded.digest != target.digest:
        raise InputError(
            f"{checkpoint.path}: not the files that the study began with, or not those that the "
            "machine has which began it; let them be the same, and run again"
        )
    here = target_of(loaded).arithmetic
    if here != target.arithmetic:  # its numbers would be stored as another's
        raise InputError(
            f"this machine computes {target.dtype} as {here!r}, the one asked at the start as "
            f"{target.arithmetic!r}; use float32, or machines of one kind"
        )
    return loaded


def _weights(checkpoint: Checkpoint) -> int:
    """Refuse a model that cannot be measured, as far as its files' headers tell; its weights."""
    if checkpoint.path.is_file():  # GGUF, which is checked as it is unpacked: a byte or less each
        return checkpoint.path.stat().st_size
    network = check_checkpoint(checkpoint.path)
    unverified_view(network)
    return network.num_parameters()


def _require_shared(store: Store, models: Sequence[Path]) -> None:
    """A cluster's workers read models from, and write results to, directories that they share."""
    with writing_to(store.root):
        store.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".shared-", dir=store.root) as new:
            for path in (Path(new), *models):
                if not _where_tasks_run(Path.exists, path):
                    raise InputError(
                        f"{path}: not seen by a worker of the cluster; keep models, and the store, "
                        "in directories that all machines see"
                    )


# --- what a result is of ------------------------------------------------------------------------


def result_basis(target: Target, questions: Sequence[Question]) -> dict[str, Any]:
    """`result_basis(target, questions)`: what every result of a model on questions depends on.

    Not the engine, nor the worker. In float32 they move a log-likelihood by less than 1e-3, as
    rounding does; in bfloat16 both follow from what is here, see `kernels`.
    """
    return {
        "model": target.digest,
        "name": target.name,
        "dtype": str(target.dtype),
        "device": torch.device(target.device).type,
        "arithmetic": target.arithmetic,
        "questions": questions_digest(questions),
        "scoring_version": SCORING_VERSION,
    }


def unit_record(loaded: LoadedModel, engine: Engine | None = None) -> dict[str, Any]:
    """`unit_record(loaded, engine)`: what a unit's record says of the model, see `provenance`."""
    return {
        "model": loaded.name,
        "digest": loaded.digest,
        "commit": loaded.commit,
        "tokenizer": tokenizer_facts(loaded.tokenizer),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "arithmetic": arithmetic(loaded.dtype, loaded.device.type),
        "engine": engine and {"name": engine.name, "reason": engine.reason},
    }
