"""Work handed out with joblib, on one machine's cores or GPUs, or on a Dask cluster.

`hand_out` names no backend to `joblib.Parallel`: `workers` does, or a user's own
`joblib.parallel_config`. Outside of both, this process does one task after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
from filelock import FileLock, Timeout

from paramspec.errors import InputError
from paramspec.execution.ends import (
    collect_seldom,
    keep_interrupts_from_children,
    watch_parent,
)
from paramspec.execution.limits import cores

ANSWER_WITHIN = 10  # seconds for a scheduler's answer, and then for one of its workers
_ONE_TASK = threading.RLock()


@contextlib.contextmanager
def workers(jobs: int = 0, scheduler: str | None = None) -> Iterator[None]:
    """`with workers(jobs=2): ...`: who does the work that is handed out inside.

    >>> with workers(jobs=1):
    ...     study = measure_pss(["my-checkpoint/"], questions, Choices(ratios=(0.1,), general=5))

    Args:
        jobs: processes side by side; 0 for one per GPU, or without a GPU one per core; 1 for this
            process alone. They share the cores that this process may use.
        scheduler: address of a Dask scheduler, as `tcp://host:8786`; its workers do the work, each
            one unit at a time, and `jobs` is ignored.

    Raises:
        InputError: if `jobs` is negative, or if no scheduler answers there, or no worker of it.
    """
    import torch

    if jobs < 0:
        raise InputError(f"jobs {jobs}: give a number of processes, or 0 for as many as there are")
    gpus = torch.cuda.device_count()
    count = jobs or gpus or cores()
    threads = max(1, cores() // count)
    if scheduler is not None:
        with _cluster(scheduler):
            yield
    elif count > 1:
        keep_interrupts_from_children()
        options = {"initializer": _begin, "initargs": (os.getpid(),)}
        with joblib.parallel_config("loky", n_jobs=count, inner_max_num_threads=threads, **options):
            yield
    else:
        own = torch.get_num_threads()  # one for each core of the host, not of this process's share
        torch.set_num_threads(min(own, threads))
        try:
            with joblib.parallel_config("sequential"):
                yield
        finally:
            torch.set_num_threads(own)


def _begin(parent: int) -> None:
    watch_parent(parent)
    collect_seldom()


def hand_out(function: Callable[..., object], tasks: Sequence[Sequence[object]]) -> Iterator[Any]:
    """`for result in hand_out(measure, [(first, ...), (second, ...)])`: each as it is done.

    Put the longest task first. The function is of a module, so that another process finds it.
    """
    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    home = os.getpid()
    try:
        yield from parallel(joblib.delayed(_task)(home, function, *task) for task in tasks)
    except Exception as error:
        # Of joblib and of distributed, by name: an import of these takes long.
        if type(error).__name__ not in ("TerminatedWorkerError", "KilledWorker"):
            raise
        raise InputError(
            "a worker process was killed, most likely for lack of memory; run again with fewer "
            "workers, or more memory for each: finished units are kept"
        ) from error


def _task(home: int, function: Callable[..., object], *arguments: object) -> object:
    """One at a time, also in a worker of several threads: tasks share the model that the process
    holds, and the state of torch's random numbers.
    """
    with _ONE_TASK:
        if os.getpid() != home:  # else it is the process that hands out, or a thread of it
            _see_one_gpu()
        return function(*arguments)


@functools.cache  # once in a worker, before it uses a GPU
def _see_one_gpu() -> FileLock | None:
    """From now on this process sees one GPU, the first that no other worker of the machine has.

    The lock, which is held until the process ends, says so to the others.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) < 2:
        return None
    folder = Path(tempfile.gettempdir()) / f"paramspec-gpus-of-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    for number in itertools.count():  # with more workers than GPUs, some share one
        lock = FileLock(folder / f"{number}.lock", blocking=False)
        with contextlib.suppress(Timeout):
            lock.acquire()
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            return lock
    raise AssertionError


def on_this_machine() -> bool:
    """False if tasks go to a cluster, whose machines may differ."""
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__name__ != "DaskDistributedBackend"


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    from distributed import Client

    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it reports every attempt; one line says what matters
    with contextlib.ExitStack() as stack:
        stack.callback(log.setLevel, level)
        try:
            with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop running
                thread.submit(asyncio.run, _knock(address)).result()
            connecting = Client(address, timeout=ANSWER_WITHIN, set_as_default=False)
            client = stack.enter_context(connecting)
            # A cluster that grows on demand grows for a task. This one needs paramspec there.
            client.submit(cores, pure=False).result(timeout=ANSWER_WITHIN)
        except Exception as error:
            reason = str(error).partition("\n")[0][:160] or f"no answer within {ANSWER_WITHIN} s"
            raise InputError(
                f"scheduler {address!r}: {reason}; correct the address, or start `dask scheduler` "
                f"there and `dask worker {address}`, with this version of paramspec"
            ) from error
        stack.enter_context(joblib.parallel_config("dask", client=client))
        yield


async def _knock(address: str) -> None:
    """Connect without a `Client`, which waits without end at an address of no scheduler."""
    from distributed.comm.core import connect
    from distributed.security import Security

    async with asyncio.timeout(ANSWER_WITHIN):
        comm = await connect(address, **Security().get_connection_args("client"))
        await comm.close()
