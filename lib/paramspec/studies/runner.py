"""Units of work on models: found in the store, or computed where `workers` says, and stored.

    for done in run_units(["zoo-llama-1", "smollm2-135m"], questions, units, costs, compute, store):
        done.paths, done.computed           # the units' directories; how many this run computed

A unit is what a crash can lose. Its result depends on its key alone, so that it is the same whoever
computed it, and a rerun, or another study with the same key, finds it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import joblib
import torch
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.files import require_writable
from paramspec.execution.limits import release_memory
from paramspec.execution.parallel import hand_out, on_this_machine
from paramspec.execution.store import Store
from paramspec.method.hooks import ValueVectorView, unverified_view, value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.rows import Engine
from paramspec.method.scoring import SCORING_VERSION, choose_engine
from paramspec.models.checkpoints import Checkpoint, digest_of, find_checkpoints
from paramspec.models.load import LoadedModel, check_checkpoint, load_model, place_and_dtype
from paramspec.models.registry import require_distinct
from paramspec.models.tokens import tokenizer_facts
from paramspec.specwiki import Question, questions_digest

CHUNKS = 4  # of a worker, at least, where models are large: so all are done at about the same time


@dataclass(frozen=True)
class Target:
    """A model to be measured, loaded already or where it lies.

    `device` is `load_model`'s; `basis` is what every result of the model depends on.
    """

    model: LoadedModel | Checkpoint
    device: str
    basis: dict[str, str]


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
    """The units of a model: `keys[i]` is that of unit `i`, and `costs[i]` its evaluations."""

    target: Target
    keys: Sequence[Mapping[str, Any]]
    costs: Sequence[float]
    compute: Compute


def find_targets(
    models: Sequence[str | LoadedModel], dtype: str = "auto", device: str = "auto"
) -> list[Target]:
    """`find_targets(["smollm2-135m"])`: where models lie, trained or fetched if need be."""
    names = [model for model in models if isinstance(model, str)]
    found = {}
    if names:
        wish = (device, dtype)
        # The machines of a cluster may have other GPUs than this one.
        ((place, way),) = [_choose(*wish)] if on_this_machine() else hand_out(_choose, [wish])
        for name, one in zip(names, find_checkpoints(names), strict=True):
            basis = {"model": digest_of(one.path), "name": one.name, **way}
            # A worker may have another working directory.
            found[name] = Target(replace(one, path=one.path.absolute()), place, basis)
    targets = [
        found[one] if isinstance(one, str) else Target(one, str(one.device), basis_of(one))
        for one in models
    ]
    require_distinct([target.model.name for target in targets])
    return targets


def basis_of(loaded: LoadedModel) -> dict[str, str]:
    """`basis_of(loaded)`: what every result of a model in memory depends on."""
    return {"model": loaded.digest, "name": loaded.name, **_way(loaded.device, loaded.dtype)}


def _way(place: torch.device, dtype: torch.dtype) -> dict[str, str]:
    kind = place.type
    return {"dtype": str(dtype), "device": kind, "arithmetic": arithmetic(dtype, kind)}


def _choose(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """Where this machine computes, and what a key says of that."""
    place, kind = place_and_dtype(device, dtype)
    return str(place), _way(place, kind)


Task = tuple[Job, list[int], Store]


class Done(NamedTuple):
    """The directories of a model's units, and how many of these this run computed."""

    target: Target
    paths: list[Path]
    computed: int


def run_units(
    models: Sequence[str | LoadedModel],
    questions: Sequence[Question],
    units: Sequence[Mapping[str, Any]],
    costs: Sequence[float],
    compute: Compute,
    store: Store,
    *,
    dtype: str = "auto",
    device: str = "auto",
    cost: str = "question",
) -> list[Done]:
    """`(done,) = run_units([loaded], questions, units, costs, compute, store)`: of each model all.

    Models that are loaded already are measured in this process. What a unit raises begins with the
    model's name.

    Args:
        units: what the key of each says, beside the model and the questions.
        costs: of each unit, counted in what `cost` says.
        compute: goes to other processes: a function of a module, or a `functools.partial` of one.
    """
    jobs = []
    for target in find_targets(models, dtype, device):
        basis = result_basis(target.basis, questions)
        jobs.append(Job(target, [{**basis, **key} for key in units], costs, compute))
    store.remove_leftovers()
    here: list[Task] = []
    away: list[tuple[Job, list[int], Checkpoint]] = []
    left = 0.0
    for job in jobs:
        missing = [number for number, key in enumerate(job.keys) if store.get(key) is None]
        left += sum(costs[number] for number in missing)
        if isinstance(job.target.model, LoadedModel):
            here += [(job, [number], store) for number in missing]
        elif missing:
            away.append((job, missing, job.target.model))
    tasks = _tasks(away, store) if away else []
    results = chain((_work(*task) for task in here), hand_out(_work, tasks) if tasks else ())
    title = jobs[0].target.model.name if len(jobs) == 1 else f"{len(jobs)} models"
    total = sum(costs) * len(jobs)
    computed: Counter[str] = Counter()
    try:
        with tqdm(total=total, initial=total - left, desc=title, unit=cost) as bar:
            for name, made, spent in results:
                computed[name] += made
                bar.update(spent)
    finally:
        _HELD.clear()  # of this process, if it was the worker
    return [_collect(job, computed[job.target.model.name], store) for job in jobs]


def _collect(job: Job, computed: int, store: Store) -> Done:
    paths = [path for key in job.keys if (path := store.get(key)) is not None]
    if len(paths) < len(job.keys):
        raise InputError(
            f"{store.root}: a result of {job.target.model.name!r} was damaged or removed as soon "
            "as it was written; check the disk, and run again: what is whole is kept"
        )
    return Done(job.target, paths, computed)


def _tasks(jobs: Sequence[tuple[Job, list[int], Checkpoint]], store: Store) -> list[Task]:
    """Which missing units make a task: of the largest model first, and the costliest of each.

    A unit costs its evaluations, times the model's weights. Small models make one task, large ones
    several; a single worker, which keeps the model, gets units one by one.
    """
    weights = [_weights(checkpoint) for *_, checkpoint in jobs]
    if not on_this_machine():
        _require_shared(store)
    count = joblib.effective_n_jobs(None)  # of what is active, where -1 would be every core
    costs = [
        size * sum(job.costs[n] for n in missing)
        for size, (job, missing, _) in zip(weights, jobs, strict=True)
    ]
    tasks: list[Task] = []
    for place in sorted(range(len(jobs)), key=lambda place: -weights[place]):
        job, missing, _ = jobs[place]
        share = math.ceil(costs[place] / sum(costs) * CHUNKS * count)
        parts = min(len(missing), share if count > 1 else len(missing))
        costliest = sorted(missing, key=lambda n: -job.costs[n])
        tasks += [(job, costliest[part::parts], store) for part in range(parts)]
    return tasks


def _work(job: Job, numbers: Sequence[int], store: Store) -> tuple[str, int, float]:
    """A task: compute units of a model; its name, how many were not there yet, and their cost."""
    computed, name = 0, job.target.model.name
    for wait in (False, True):  # what another run computes just now is there by the end
        for number in numbers:
            key = job.keys[number]
            if store.get(key) is not None:
                continue
            with store.turn(key, wait=wait) as mine:
                if mine and store.get(key) is None:
                    with naming(name):
                        ready = _hold(job.target)
                        write, record = job.compute(ready, number)
                    store.put(key, write, {**unit_record(ready.loaded, ready.engine), **record})
                    computed += 1
            release_memory()  # a packed copy of the weights
    return name, computed, sum(job.costs[number] for number in numbers)


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
    dtype = target.basis["dtype"].removeprefix("torch.")
    loaded = load_model(checkpoint, dtype=dtype, device=target.device)
    here = basis_of(loaded)
    for name, there in target.basis.items():
        if here[name] != there:  # its numbers would be stored as another's
            raise InputError(
                f"{checkpoint.path}: {name} {here[name]!r} on this machine, {there!r} where the "
                "study began; use the same files everywhere, and float32 or machines of one kind"
            )
    return loaded


def _weights(checkpoint: Checkpoint) -> int:
    """Refuse a model that cannot be measured, as far as its files' headers tell; its weights."""
    if checkpoint.path.is_file():  # GGUF, which is checked as it is unpacked: a byte or less each
        return checkpoint.path.stat().st_size
    network = check_checkpoint(checkpoint.path)
    unverified_view(network)
    return network.num_parameters()


def _require_shared(store: Store) -> None:
    """A cluster's workers write results to a directory that this machine reads."""
    require_writable(store.root)
    with TemporaryDirectory(dir=store.root) as new:
        (seen,) = hand_out(os.path.isdir, [(new,)])
    if not seen:
        raise InputError(
            f"{store.root}: not seen by a worker of the cluster; keep the store, and models, in "
            "directories that all machines see"
        )


# --- what a result is of ------------------------------------------------------------------------


def result_basis(basis: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
    """`result_basis(target.basis, questions)`: what every result on questions depends on.

    Not the engine, nor the worker. In float32 they move a log-likelihood by less than 1e-3, as
    rounding does; in bfloat16 both follow from what is here, see `kernels`.
    """
    about = {"questions": questions_digest(questions), "scoring_version": SCORING_VERSION}
    return {**basis, **about}


def unit_record(loaded: LoadedModel, engine: Engine | None = None) -> dict[str, Any]:
    """`unit_record(loaded, engine)`: what a unit's record says of the model, see `provenance`.

    `commit` is the hub's, `arithmetic` as `kernels` says, `tokenizer` as `tokenizer_facts` gives.
    """
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
