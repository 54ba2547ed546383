"""Units of work on models: found in the store, or computed where `workers` says, and stored.

    for done in run_units(["zoo-llama-1", "smollm2-135m"], questions, units, costs, compute, store):
        done.paths, done.computed           # the units' directories; how many this run computed

A crash loses the units that are being computed, and no other. The result of a unit depends on its
key alone: a rerun, or another study with the same key, finds it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import joblib
import torch
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.files import require_writable
from paramspec.execution.limits import memory, release_memory
from paramspec.execution.parallel import hand_out, on_this_machine
from paramspec.execution.store import Computed, Store
from paramspec.method.hooks import OWN, ValueVectorView, unverified_view, value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.rows import Engine
from paramspec.method.scoring import SCORING_VERSION, choose_engine
from paramspec.models.checkpoints import Checkpoint, digest_of, find_checkpoints
from paramspec.models.load import LoadedModel, check_checkpoint, load_model, place_and_dtype
from paramspec.models.registry import require_distinct
from paramspec.models.tokens import tokenizer_facts
from paramspec.specwiki import Question, questions_digest

CHUNKS = 8  # of a worker, at least, where models are large: so all end at about the same time


@dataclass(frozen=True)
class Target:
    """A model to be measured, loaded already or where it lies; `device` is `load_model`'s.

    Every result of the model depends on its `basis`.
    """

    model: LoadedModel | Checkpoint
    device: str
    basis: dict[str, str]


@dataclass(frozen=True)
class Ready:
    """A model that is loaded, its view verified and its engine chosen, once for all its units."""

    loaded: LoadedModel
    view: ValueVectorView
    engine: Engine
    kept: dict[str, Any] = field(default_factory=dict)  # results that units leave for later ones


Compute = Callable[[Ready, int], Computed]  # computes a unit, given its number


class Job(NamedTuple):
    """Units of a model, of which those of the numbers `left` are to be computed.

    `keys[i]` is the key of unit `i`, `costs[i]` the number of its evaluations.
    """

    target: Target
    keys: Sequence[Mapping[str, Any]]
    costs: Sequence[float]
    compute: Compute
    store: Store
    left: Sequence[int]


class Needs(NamedTuple):
    """What measuring one model needs beside its weights: bytes, and seconds of a core."""

    coefficients: int  # on the disk; studies of the same questions share them
    answers: int  # on the disk
    memory: int  # of a process
    seconds: float  # beside forward passes


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
    needs: Callable[[int, int], Needs] | None = None,
) -> list[Done]:
    """`(done,) = run_units([loaded], questions, units, costs, compute, store)`: each model's units.

    `units` hold what their keys add to the model and the questions, and `costs` are counted in
    `cost`. Models that are loaded already are measured in this process; for others, `compute` is
    a function of a module, or a partial of one. An error in a unit begins with the model's name.
    `needs` tells, of the number of a model's value vectors and the bytes of a weight, what it
    takes: where there is less, nothing is begun.
    """
    jobs = []
    for target in _find_targets(models, dtype, device):
        basis = result_basis(target.basis, questions)
        keys = [{**basis, **key} for key in units]
        left = [number for number, key in enumerate(keys) if store.get(key) is None]
        jobs.append(Job(target, keys, costs, compute, store, left))
    store.remove_leftovers()
    if needs:
        _require_room([job for job in jobs if job.left], needs)
    here: list[Job] = []
    away: list[Job] = []
    for job in jobs:
        if isinstance(job.target.model, LoadedModel):
            here += [job._replace(left=[number]) for number in job.left]
        elif job.left:
            away.append(job)
    tasks = [(task,) for task in _tasks(away)] if away else []
    results = chain(map(_work, here), hand_out(_work, tasks) if tasks else ())
    title = jobs[0].target.model.name if len(jobs) == 1 else f"{len(jobs)} models"
    total = sum(costs) * len(jobs)
    found = total - sum(costs[number] for job in jobs for number in job.left)
    computed: Counter[str] = Counter()
    try:
        with tqdm(total=total, initial=found, desc=title, unit=cost) as bar:
            for name, made, spent in results:
                computed[name] += made
                bar.update(spent)
    finally:
        _HELD.clear()  # of this process, if it was the worker
    return [_collect(job, computed[job.target.model.name]) for job in jobs]


def _find_targets(models: Sequence[str | LoadedModel], dtype: str, device: str) -> list[Target]:
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
    """`basis_of(loaded)["dtype"]`: every result of a loaded model depends on these."""
    return {"model": loaded.digest, "name": loaded.name, **_way(loaded.device, loaded.dtype)}


def _way(place: torch.device, dtype: torch.dtype) -> dict[str, str]:
    kind = place.type
    way = {"dtype": str(dtype), "device": kind, "arithmetic": arithmetic(dtype, kind)}
    return way | ({"down_projection": own} if (own := os.environ.get(OWN)) else {})


def _choose(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The device and dtype that this machine takes, and their part of a key."""
    place, kind = place_and_dtype(device, dtype)
    return str(place), _way(place, kind)


def _collect(job: Job, computed: int) -> Done:
    paths = [path for key in job.keys if (path := job.store.get(key)) is not None]
    if len(paths) < len(job.keys):
        raise InputError(
            f"{job.store.root}: a result of {job.target.model.name!r} was damaged or removed as "
            "soon as it was written; check the disk, and run again: finished units are kept"
        )
    return Done(job.target, paths, computed)


def _tasks(jobs: Sequence[Job]) -> list[Job]:
    """Jobs in parts: of the largest model first, and of each model the costliest units first.

    A unit costs its evaluations, times the model's weights. Small models make one task, large ones
    several; a single worker, which keeps the model, gets units one by one.
    """
    weights = [_weights(cast("Checkpoint", job.target.model)) for job in jobs]
    if not on_this_machine():
        _require_shared(jobs[0].store)
    count = joblib.effective_n_jobs(None)  # of the active backend, where -1 would be every core
    costs = [
        size * sum(job.costs[n] for n in job.left) for size, job in zip(weights, jobs, strict=True)
    ]
    tasks: list[Job] = []
    for place in sorted(range(len(jobs)), key=lambda place: -weights[place]):
        job = jobs[place]
        share = math.ceil(costs[place] / sum(costs) * CHUNKS * count)
        parts = min(len(job.left), share if count > 1 else len(job.left))
        costliest = sorted(job.left, key=lambda n: -job.costs[n])
        tasks += [job._replace(left=costliest[part::parts]) for part in range(parts)]
    return tasks


def _require_room(jobs: Sequence[Job], needs: Callable[[int, int], Needs]) -> None:
    """Refuse models for whose results the disk, or for one of which the memory, is too small."""
    disk = 0.0
    for job in jobs:
        found = job.target.model
        if isinstance(found, Checkpoint) and found.path.is_file():
            continue  # GGUF: its shape is known once it is unpacked
        network = found.model if isinstance(found, LoadedModel) else check_checkpoint(found.path)
        view, size = unverified_view(network), 4 if "float32" in job.target.basis["dtype"] else 2
        one = needs(view.layers * view.width, size)
        disk += (one.coefficients + one.answers) * len(job.left) / len(job.keys)
        if on_this_machine() and one.memory > memory():
            raise InputError(
                f"{found.name}: measuring it needs {one.memory / 1e9:.1f} GB of memory beside its "
                f"weights, this process may use {memory() / 1e9:.1f} GB; take fewer concepts, or a "
                "larger machine"
            )
    root = jobs[0].store.root if jobs else Path()
    free = shutil.disk_usage(next(one for one in (root, *root.parents) if one.exists())).free
    if disk > free:
        raise InputError(
            f"{root}: the results need {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free "
            "some space, or choose another directory"
        )


def _work(job: Job) -> tuple[str, int, float]:
    """Compute units of a model; its name, how many were not there yet, and their cost."""
    computed, name, store = 0, job.target.model.name, job.store
    for wait in (False, True):  # what another run computes just now is there by the end
        for number in job.left:
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
    return name, computed, sum(job.costs[number] for number in job.left)


# The model that a process computed with last: most likely, the next unit is of the same.
_HELD: list[tuple[Target, Ready]] = []


def _hold(target: Target) -> Ready:
    if not _HELD or _HELD[0][0] != target:
        _HELD.clear()  # before another one takes memory
        loaded = loaded_target(target)
        view = value_vector_view(loaded.model)
        _HELD.append((target, Ready(loaded, view, choose_engine(view))))
    return _HELD[0][1]


def loaded_target(target: Target) -> LoadedModel:
    """The model, loaded as its results say that it was."""
    checkpoint = target.model
    if isinstance(checkpoint, LoadedModel):
        return checkpoint
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
    """The number of a model's weights; refused is one that, by its files' headers, has no view."""
    if checkpoint.path.is_file():  # GGUF, which is checked as it is unpacked: a byte or less each
        return checkpoint.path.stat().st_size
    network = check_checkpoint(checkpoint.path)
    unverified_view(network)
    return network.num_parameters()


def _require_shared(store: Store) -> None:
    require_writable(store.root)
    with TemporaryDirectory(dir=store.root) as new:
        (seen,) = hand_out(os.path.isdir, [(new,)])
    if not seen:
        raise InputError(
            f"{store.root}: not seen by a worker of the cluster; use a directory that all see"
        )


def result_basis(basis: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
    """The part of a key that every result on questions has.

    The engine and the worker are not in it: in float32 they move a log-likelihood by less than
    1e-3, as rounding does; in bfloat16 both follow from this part, see `kernels`.
    """
    about = {"questions": questions_digest(questions), "scoring_version": SCORING_VERSION}
    return {**basis, **about}


def unit_record(loaded: LoadedModel, engine: Engine | None = None) -> dict[str, Any]:
    """The part of a unit's record that is on the model, see `provenance`."""
    return {
        "model": loaded.name,
        "digest": loaded.digest,
        "commit": loaded.commit,
        "tokenizer": tokenizer_facts(loaded.tokenizer),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantized": loaded.quantized,
        "device": str(loaded.device),
        "arithmetic": arithmetic(loaded.dtype, loaded.device.type),
        "engine": engine and {"name": engine.name, "reason": engine.reason},
    }
