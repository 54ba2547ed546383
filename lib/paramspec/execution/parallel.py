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
import warnings
from collections.abc import Callable, Iterator, Sequence

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from paramspec.errors import InputError
from paramspec.execution.ends import keep_interrupts_from_children, watch_parent
from paramspec.execution.limits import cores

ANSWER_WITHIN = 10  # seconds that a scheduler has, and then a worker of it


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
    if jobs < 0:
        raise InputError(f"jobs {jobs}: give a number of processes, or 0 for as many as there are")
    if scheduler is not None:
        with _dask(scheduler):
            yield
        return
    count = jobs or _devices()
    threads = max(1, cores() // count)
    if count > 1:
        keep_interrupts_from_children()
    with (
        joblib.parallel_config(
            backend="loky",
            n_jobs=count,
            inner_max_num_threads=threads if count > 1 else None,
            initializer=watch_parent,
            initargs=(os.getpid(),),
        ),
        _at_most(threads) if count == 1 else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Torch takes a thread for each core of the host, whatever share of them this process has."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(min(own, threads))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def hand_out(
    function: Callable[..., object], tasks: Sequence[Sequence[object]]
) -> Iterator[object]:
    """`for result in hand_out(measure, [(first, ...), (second, ...)])`: as each is done.

    Args:
        function: of a module, so that another process finds it; begins with `begin_work()`.
        tasks: the arguments of each call; the longest should stand first.

    Raises:
        InputError: if workers were killed, again and again; what a task raises, as it is.
    """
    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    try:
        yield from parallel(joblib.delayed(function)(*task) for task in tasks)
    except TerminatedWorkerError as error:
        raise InputError(
            "a worker process was killed, most likely for want of memory; run again with fewer "
            "jobs: what is finished is kept"
        ) from error
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # importing it would import all of distributed
            raise
        raise InputError(
            "one task killed several workers of the cluster, most likely for want of memory; give "
            "workers more of it and run again: what is finished is kept"
        ) from error


def begin_work() -> None:
    """`begin_work()`: called first in each task; makes a worker process fit to share a machine.

    In this process it does nothing. A worker is told to be quiet, and to use its share: a Dask
    worker the cores of its `dask worker` command, divided by the workers of it (Dask itself sets
    one thread); a process of joblib has its share of cores from joblib, and gets a GPU of its own.
    """
    if not in_worker():
        return
    if _loky_worker():
        watch_parent(os.getppid())
    # A library's advice to programmers; what users must know is raised, or told by the store.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    import torch

    siblings = _dask_siblings()
    if siblings is not None:
        torch.set_num_threads(max(1, cores() // siblings))
    elif torch.cuda.device_count() > 1:
        number = multiprocessing.current_process().name.rpartition("-")[2]
        torch.cuda.set_device(int(number) % torch.cuda.device_count() if number.isdigit() else 0)


def in_worker() -> bool:
    """`in_worker()`: whether this is a task in a process that joblib or Dask started."""
    return _loky_worker() or _dask_worker() is not None


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
def _dask(scheduler: str) -> Iterator[None]:
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells of every attempt; what matters is told in one line
    try:
        _ask(scheduler)
        from distributed import Client

        with Client(scheduler, timeout=ANSWER_WITHIN, set_as_default=False) as client:
            _require_worker(client, scheduler)
            with joblib.parallel_config(backend="dask", client=client):
                yield
    finally:
        log.setLevel(level)


def _ask(scheduler: str) -> None:
    """Whether a scheduler answers: `Client` itself waits for a silent one without end."""
    remedy = "start `dask scheduler` there, or correct the address"

    async def identity() -> dict:
        from distributed.core import rpc
        from distributed.security import Security

        security = Security().get_connection_args("client")
        async with rpc(scheduler, timeout=ANSWER_WITHIN, connection_args=security) as remote:
            return await remote.identity()

    async def limited() -> dict:
        return await asyncio.wait_for(identity(), ANSWER_WITHIN)

    # In a thread of its own: a notebook's thread has an event loop running already.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            answer = thread.submit(lambda: asyncio.run(limited())).result()
        except (ValueError, TypeError) as error:
            raise InputError(f"scheduler {scheduler!r}: {_line(error)}; {remedy}") from error
        except Exception as error:
            raise InputError(
                f"scheduler {scheduler!r}: no answer within {ANSWER_WITHIN} s; {remedy}"
            ) from error
    if not isinstance(answer, dict) or answer.get("type") != "Scheduler":
        raise InputError(f"scheduler {scheduler!r}: something else answers there; {remedy}")


def _require_worker(client: object, scheduler: str) -> None:
    """One worker that answers; a cluster that grows on demand has its chance to."""
    from distributed import TimeoutError as TimedOut

    try:
        client.submit(_answer, pure=False).result(timeout=ANSWER_WITHIN)
    except TimedOut as error:
        raise InputError(
            f"scheduler {scheduler!r}: has no worker that answers within {ANSWER_WITHIN} s; start "
            f"one: `dask worker {scheduler}`"
        ) from error
    except Exception as error:
        raise InputError(
            f"scheduler {scheduler!r}: its workers cannot run paramspec "
            f"({type(error).__name__}: {_line(error)}); install this version of it for them"
        ) from error


def _answer() -> bool:
    return True


def _line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0][:160]


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or cores()


def _loky_worker() -> bool:
    return multiprocessing.current_process().name.startswith("LokyProcess")


def _dask_worker() -> object | None:
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def _dask_siblings() -> int | None:
    """Tasks side by side on the cores of this Dask worker, or None if its threads are its own."""
    worker = _dask_worker()
    if worker is None or worker.nanny is None:  # without a nanny, the user's threads are kept
        return None
    import psutil

    started = psutil.Process().parent().children()
    processes = sum("spawn_main" in " ".join(process.cmdline()) for process in started)
    return max(1, processes) * worker.state.nthreads
