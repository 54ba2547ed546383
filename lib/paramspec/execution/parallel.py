"""Work handed out with joblib, on one machine's cores or GPUs, or on a Dask cluster.

    with workers(jobs=2):                               # processes on this machine
        measure_pss(["zoo-llama-1", "zoo-llama-2"], questions)
    with workers(scheduler="tcp://host:8786"):          # a Dask cluster that is already up
        measure_pss(["llama-2-7b"], questions)

Whoever hands out work calls `hand_out`, which names no backend to `joblib.Parallel`; `workers`, or
a `joblib.parallel_config` of the user's own, says what that means. Outside of both, work is done
one piece after the other in this process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import joblib
import psutil

from paramspec.errors import InputError
from paramspec.execution.ends import keep_interrupts_from_children, watch_parent
from paramspec.execution.limits import cores

ANSWER_WITHIN = 10  # seconds that a scheduler has, and then a worker of it
# Of errors that joblib and distributed raise for a killed worker, by the name of the class:
# importing them would import all of distributed.
KILLED = {
    "TerminatedWorkerError": "a worker process was killed, most likely for want of memory; run "
    "again with fewer jobs: what is finished is kept",
    "KilledWorker": "one task killed several workers of the cluster, most likely for want of "
    "memory; give workers more of it and run again: what is finished is kept",
}
_ONE_TASK = threading.RLock()


@contextlib.contextmanager
def workers(jobs: int = 0, scheduler: str | None = None) -> Iterator[None]:
    """`with workers(jobs=2): ...`: what joblib does with the work that is handed out inside.

    >>> with workers(jobs=1):
    ...     study = measure_pss(["my-checkpoint/"], questions, Choices(ratios=(0.1,), general=5))

    Args:
        jobs: processes side by side; 0 for one a GPU, or without a GPU one a core; 1 for none
            beside this one. The cores that this process may use are shared out among them.
        scheduler: address of a Dask scheduler, as `tcp://host:8786`; its workers do the work, one
            unit each at a time, and `jobs` means nothing.

    Raises:
        InputError: if `jobs` is negative, or if no scheduler answers there, or no worker of it.
    """
    import torch

    if jobs < 0:
        raise InputError(f"jobs {jobs}: give a number of processes, or 0 for as many as there are")
    if scheduler is not None:
        with _cluster(scheduler):
            yield
        return
    count = jobs or torch.cuda.device_count() or cores()
    threads = max(1, cores() // count)
    if count > 1:
        keep_interrupts_from_children()
        options = {"initializer": watch_parent, "initargs": (os.getpid(),)}
        with joblib.parallel_config("loky", n_jobs=count, inner_max_num_threads=threads, **options):
            yield
        return
    own = torch.get_num_threads()  # one for each core of the host, not of this process's share
    torch.set_num_threads(min(own, threads))
    try:
        with joblib.parallel_config("sequential"):
            yield
    finally:
        torch.set_num_threads(own)


def hand_out(function: Callable[..., object], tasks: Sequence[Sequence[object]]) -> Iterator[Any]:
    """`for result in hand_out(measure, [(first, ...), (second, ...)])`: as each is done.

    Args:
        function: of a module, so that another process finds it.
        tasks: the arguments of each call; the longest should stand first.

    Raises:
        InputError: if workers were killed, again and again; what a task raises, as it is.
    """
    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    try:
        yield from parallel(joblib.delayed(_task)(function, *task) for task in tasks)
    except Exception as error:
        if type(error).__name__ not in KILLED:
            raise
        raise InputError(KILLED[type(error).__name__]) from error


def _task(function: Callable[..., object], *arguments: object) -> object:
    """A task in its process. A Dask worker of several threads does one at a time as well: tasks
    share the model that the process holds, and the state of torch's random numbers.
    """
    with _ONE_TASK:
        if in_worker():
            _use_share()
        return function(*arguments)


def _use_share() -> None:
    """Make a worker process quiet, and use its share of the machine.

    A Dask worker uses the cores of its machine, divided by the workers that the same `dask worker`
    command started (Dask itself sets one thread); without a nanny the user's threads are kept. A
    process of joblib has its share of cores from joblib, and gets a GPU of its own.
    """
    # A library's advice to programmers; what users must know is raised, or warned of by the store.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    import torch

    dask = _dask_worker()
    if dask is None:
        watch_parent(os.getppid())
        number = multiprocessing.current_process().name.rpartition("-")[2]
        if torch.cuda.device_count() > 1 and number.isdigit():
            torch.cuda.set_device(int(number) % torch.cuda.device_count())
    elif dask.nanny is not None:
        started = psutil.Process().parent().children()
        siblings = sum("spawn_main" in " ".join(process.cmdline()) for process in started)
        torch.set_num_threads(max(1, cores() // max(1, siblings)))


def in_worker() -> bool:
    """`in_worker()`: whether this is a task in a process that joblib or Dask started."""
    loky = multiprocessing.current_process().name.startswith("LokyProcess")
    return loky or _dask_worker() is not None


def _dask_worker() -> Any:
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def worker_count() -> int:
    """`worker_count()`: how many tasks joblib does side by side here; 1 is this process alone.

    Raises:
        InputError: if a cluster has lost all of its workers.
    """
    try:
        return joblib.effective_n_jobs(None)  # of what is active, where -1 would be every core
    except TimeoutError as error:
        raise InputError(
            "the Dask cluster has no worker any more; start `dask worker` again: what is finished "
            "is kept"
        ) from error


def on_this_machine() -> bool:
    """`on_this_machine()`: False if tasks go to a cluster, whose machines may differ."""
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__name__ != "DaskDistributedBackend"


@contextlib.contextmanager
def _cluster(scheduler: str) -> Iterator[None]:
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it reports every attempt; one line says what matters
    name = f"scheduler {scheduler!r}"
    try:
        # In a thread of its own: a notebook's thread has an event loop running already.
        with (
            _answering(name, "start `dask scheduler` there, or correct the address"),
            concurrent.futures.ThreadPoolExecutor(1) as thread,
        ):
            thread.submit(asyncio.run, _require_scheduler(scheduler)).result()
        from distributed import Client

        with Client(scheduler, timeout=ANSWER_WITHIN, set_as_default=False) as client:
            start = f"start one that has this version of paramspec: `dask worker {scheduler}`"
            with _answering(f"workers of {name}", start):  # a cluster that grows on demand grows
                client.submit(cores, pure=False).result(timeout=ANSWER_WITHIN)
            with joblib.parallel_config("dask", client=client):
                yield
    finally:
        log.setLevel(level)


async def _require_scheduler(address: str) -> None:
    """Ask it without a `Client`, which waits for a silent one without end."""
    from distributed.core import rpc
    from distributed.security import Security

    security = Security().get_connection_args("client")
    async with asyncio.timeout(ANSWER_WITHIN), rpc(address, connection_args=security) as remote:
        if (await remote.identity())["type"] != "Scheduler":
            raise ValueError("something else answers")


@contextlib.contextmanager
def _answering(name: str, remedy: str) -> Iterator[None]:
    """One line on who does not answer, and what to do."""
    try:
        yield
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if isinstance(error, TimeoutError):
            line = f"no answer within {ANSWER_WITHIN} s"
        raise InputError(f"{name}: {line}; {remedy}") from error
