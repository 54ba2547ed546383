"""Units of work on models: found in the store, or computed where `workers` says, and stored.

    targets = find_targets(["zoo-llama-1", "smollm2-135m"])
    jobs = [Job(target, keys, costs, compute) for target in targets]
    computed = run_jobs(jobs, store)        # how many units of each model this run computed
    stored(store, key, name)                # the directory of a unit

A unit is what a crash can lose. Its result depends on its key alone, so that it is the same whoever
computed it, and a rerun, or another study with the same key, finds it. Units of one model are
handed out in chunks; a process keeps the model that its last chunk was about.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from paramspec.errors import InputError, naming
from paramspec.execution.files import writing_to
from paramspec.execution.limits import release_memory
from paramspec.execution.parallel import begin_work, hand_out, on_this_machine, worker_count
from paramspec.execution.store import Store
from paramspec.method.hooks import ValueVectorView, down_projections, value_vector_view
from paramspec.method.kernels import arithmetic
from paramspec.method.rows import Engine
from paramspec.method.scoring import SCORING_VERSION, choose_engine
from paramspec.models.checkpoints import (
    Checkpoint,
    checkpoint_files,
    digest_files,
    find_checkpoints,
)
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
class Identity:
    """What tells a model from others in a key, known before it is loaded."""

    name: str
    digest: str
    dtype: torch.dtype
    device: str
    arithmetic: str = "stock"  # of the machine that computes, see `kernels.arithmetic`


@dataclass(frozen=True)
class Target:
    """A model to be measured, loaded already, or where it lies; `device` is `load_model`'s."""

    model: LoadedModel | Checkpoint
    identity: Identity
    device: str

    @property
    def name(self) -> str:
        return self.identity.name


@dataclass(frozen=True)
class Ready:
    """A model that is loaded, its view verified and its engine chosen, once for all its units.

    `kept` is what units leave for those after them.
    """

    loaded: LoadedModel
    view: ValueVectorView
    engine: Engine
    kept: dict[str, object] = field(default_factory=dict)


# Computes unit number so-and-so: what fills its directory, and what its record says of it.
Compute = Callable[[Ready, int], tuple[Callable[[Path], None], Mapping[str, object]]]


@dataclass(frozen=True)
class Job:
    """The units of a model: `keys[i]` is that of unit `i`, and `costs[i]` its evaluations.

    `compute` goes to other processes: a function of a module, or a `functools.partial` of one.
    """

    target: Target
    keys: tuple[Mapping[str, object], ...]
    costs: tuple[float, ...]
    compute: Compute


def find_targets(
    models: Sequence[str | LoadedModel], dtype: str = "auto", device: str = "auto"
) -> list[Target]:
    """`find_targets(["smollm2-135m"])`: where models lie, trained or fetched if need be.

    Raises:
        InputError: if one is not found, or named twice.
    """
    require_distinct([model if isinstance(model, str) else model.name for model in models])
    names = [model for model in models if isinstance(model, str)]
    place, kind, way = torch.device("cpu"), torch.float32, "stock"
    if names:
        place, kind = _elsewhere(place_and_dtype, device, dtype)
        way = _elsewhere(arithmetic, kind, place.type)
    found = iter(find_checkpoints(names))
    targets = []
    for model in models:
        if isinstance(model, LoadedModel):
            targets.append(Target(model, identity_of(model), str(model.device)))
            continue
        one = next(found)
        # A worker may have another working directory.
        one = Checkpoint(one.name, one.spec, one.path.absolute())
        digest = digest_files(checkpoint_files(one.path))
        targets.append(Target(one, Identity(one.name, digest, kind, place.type, way), str(place)))
    require_distinct([target.name for target in targets])
    return targets


def run_jobs(jobs: Sequence[Job], store: Store, *, unit: str = "question") -> Counter[str]:
    """`computed = run_jobs(jobs, store)`: compute what is missing; how many units of each model.

    Raises:
        InputError: before any work, if a model cannot be measured, as far as its files' headers
            tell, or is not seen by the workers; what a unit raises, beginning with the model's
            name: what is finished is kept.
    """
    store.remove_leftovers()
    computed: Counter[str] = Counter()
    missing = [[n for n, key in enumerate(job.keys) if store.get(key) is None] for job in jobs]
    title = jobs[0].target.name if len(jobs) == 1 else f"{len(jobs)} models"
    with tqdm(total=sum(sum(job.costs) for job in jobs), desc=title, unit=unit) as bar:
        bar.update(bar.total - sum(job.costs[n] for job, n in _pairs(jobs, missing)))
        handed_out = []
        for job, numbers in zip(jobs, missing, strict=True):
            if numbers and isinstance(job.target.model, Checkpoint):
                handed_out.append((job, numbers, _weights(job.target.model)))
            for number in numbers if isinstance(job.target.model, LoadedModel) else ():
                computed[job.target.name] += _work(job, [number], store)[1]
                bar.update(job.costs[number])
        if handed_out and not on_this_machine():
            _require_shared(store, [job.target.model.path for job, _, _ in handed_out])
        try:
            tasks = [(*chunk, store) for chunk in _chunks(handed_out, worker_count())]
            for (job, numbers), made in hand_out(_work, tasks) if tasks else ():
                computed[job.target.name] += made
                bar.update(sum(job.costs[number] for number in numbers))
        finally:
            _HELD.clear()  # of this process, if it was the worker
    return computed


def stored(store: Store, key: Mapping[str, object], name: str) -> Path:
    """`stored(store, key, name)`: the directory of a unit that was there, or was just computed."""
    path = store.get(key)
    if path is None:
        raise InputError(
            f"{store.root}: a result of {name!r} was damaged or removed as soon as it was written; "
            "check the disk, and run again: what is whole is kept"
        )
    return path


def _pairs(jobs: Sequence[Job], missing: Sequence[Sequence[int]]) -> list[tuple[Job, int]]:
    return [(job, n) for job, numbers in zip(jobs, missing, strict=True) for n in numbers]


def _chunks(
    jobs: Sequence[tuple[Job, Sequence[int], int]], count: int
) -> list[tuple[Job, list[int]]]:
    """Which missing units make a task: of the largest model first, and the costliest of each.

    A unit costs its evaluations, times the model's weights. Small models make one task, large ones
    several; a single worker, which keeps the model, gets units one by one.
    """

    def cost(job: Job, numbers: Sequence[int], weights: int) -> float:
        return (weights + OVERHEAD) * sum(job.costs[n] for n in numbers)

    share = sum(cost(*one) for one in jobs) / (CHUNKS * count)
    chunks = []
    for job, numbers, weights in sorted(jobs, key=lambda one: -one[2]):
        numbers = sorted(numbers, key=lambda n: -job.costs[n])
        parts = math.ceil(cost(job, numbers, weights) / share - 1e-9)
        size = math.ceil(len(numbers) / parts) if count > 1 else 1
        for start in range(0, len(numbers), size):
            chunks.append((job, numbers[start : start + size]))
    return chunks


def _work(job: Job, numbers: Sequence[int], store: Store) -> tuple[tuple[Job, list[int]], int]:
    """A task: compute units of a model; which, and how many were not in the store yet."""
    begin_work()
    computed, waiting = 0, list(numbers)
    for wait in (False, True):  # what another run computes just now is there by the end
        left, waiting = waiting, []
        for number in left:
            key = job.keys[number]
            with store.turn(key, wait=wait) as mine:
                if not mine:
                    waiting.append(number)
                elif store.get(key) is None:
                    with naming(job.target.name):
                        ready = _hold(job.target)
                        write, record = job.compute(ready, number)
                    store.put(key, write, unit_record(ready.loaded, ready.engine) | record)
                    computed += 1
            release_memory()  # a packed copy of the weights
    return (job, list(numbers)), computed


# The model that a process computed with last: the next unit is most likely about the same.
_HELD: dict[tuple[object, ...], Ready] = {}


def _hold(target: Target) -> Ready:
    loaded = isinstance(target.model, LoadedModel)
    which = (id(target.model) if loaded else target.model.path, target.identity, target.device)
    if which not in _HELD:
        _HELD.clear()  # before another one takes memory
        model = target.model if loaded else _load(target)
        view = value_vector_view(model.model)
        _HELD[which] = Ready(model, view, choose_engine(view))
    return _HELD[which]


def _load(target: Target) -> LoadedModel:
    dtype = str(target.identity.dtype).removeprefix("torch.")
    loaded = load_model(target.model, dtype=dtype, device=target.device)
    if loaded.digest != target.identity.digest:
        raise InputError(
            f"{target.model.path}: not the files that the study began with, or not those that the "
            "machine has which began it; let them be the same, and run again"
        )
    here = identity_of(loaded).arithmetic
    if here != target.identity.arithmetic:  # its numbers would be stored as another's
        raise InputError(
            f"this machine computes {target.identity.dtype} as {here!r}, the one asked at the "
            f"start as {target.identity.arithmetic!r}; use float32, or machines of one kind"
        )
    return loaded


def _weights(checkpoint: Checkpoint) -> int:
    """Refuse a model that cannot be measured, as far as its files' headers tell; its weights."""
    network = check_checkpoint(checkpoint)
    if network is None:
        return checkpoint.path.stat().st_size  # of a GGUF file: a byte or less for each
    down_projections(network)
    return network.num_parameters()


def _elsewhere(function: Callable[..., object], *arguments: object) -> object:
    """Call it where tasks will run: the machines of a cluster may have other GPUs than this."""
    if on_this_machine():
        return function(*arguments)
    return next(iter(hand_out(function, [arguments])))


def _require_shared(store: Store, paths: Sequence[Path]) -> None:
    """A cluster's workers read models from, and write results to, directories that they share."""
    with writing_to(store.root):
        store.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".shared-", dir=store.root) as name:
            unseen = _elsewhere(_unseen, [Path(name), *paths])
    if unseen:
        place, remedy = unseen[0], "copy the model to a directory that all machines see"
        if place.name.startswith(".shared-"):
            place, remedy = store.root, "choose a store in a directory that all machines see"
        raise InputError(f"{place}: not seen by a worker of the cluster; {remedy}")


def _unseen(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if not path.exists()]


# --- what a result is of ------------------------------------------------------------------------


def identity_of(loaded: LoadedModel) -> Identity:
    """`identity_of(loaded)`: of a model in memory."""
    device = loaded.device.type
    way = arithmetic(loaded.dtype, device)
    return Identity(loaded.name, loaded.digest, loaded.dtype, device, way)


def result_basis(identity: Identity, questions: Sequence[Question]) -> dict[str, object]:
    """`result_basis(identity, questions)`: what every result of a model on questions depends on.

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


def unit_record(loaded: LoadedModel, engine: Engine | None = None) -> dict[str, object]:
    """`unit_record(loaded, engine)`: what a unit's record says of the model.

    `execution.provenance` names the fields.
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
