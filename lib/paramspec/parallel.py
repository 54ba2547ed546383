"""Work handed out with joblib, on one machine's cores or GPUs, or on a Dask cluster.

    with workers(jobs=2):                               # processes on this machine
        measure_pss(["zoo-llama-1", "zoo-llama-2"], questions)
    with workers(scheduler="tcp://host:8786"):          # a Dask cluster that is already up
        measure_pss(["llama-2-7b"], questions)

Whoever hands out work calls `joblib.Parallel` without naming a backend; `workers` says what that
means. Outside of it, work is done one piece after the other in this process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import joblib

from paramspec.errors import InputError

ANSWER_WITHIN = 10  # seconds that a scheduler has


@contextlib.contextmanager
def workers(jobs: int = 0, scheduler: str | None = None) -> Iterator[None]:
    """`with workers(jobs=2): ...`: what joblib does with the work that is handed out inside.

    Args:
        jobs: processes side by side; 0 for one a GPU, or without a GPU one a core; 1 for none
            beside this one. The machine's cores are shared out among them.
        scheduler: address of a Dask scheduler, as `tcp://host:8786`; its workers do the work, one
            unit each at a time, and `jobs` means nothing.

    Raises:
        InputError: if `jobs` is negative, or if no scheduler answers there.
    """
    if jobs < 0:
        raise InputError(f"jobs {jobs}: give a number of processes, or 0 for as many as there are")
    if scheduler is not None:
        with _dask(scheduler):
            yield
        return
    count = jobs or _devices()
    threads = max(1, (os.cpu_count() or 1) // count)
    with joblib.parallel_config(
        backend="loky", n_jobs=count, inner_max_num_threads=threads if count > 1 else None
    ):
        yield


@contextlib.contextmanager
def _dask(scheduler: str) -> Iterator[None]:
    from distributed import Client

    try:
        client = Client(scheduler, timeout=ANSWER_WITHIN)
    except (OSError, ValueError) as error:
        raise InputError(
            f"scheduler {scheduler!r}: no answer within {ANSWER_WITHIN} s; "
            "start `dask scheduler` there, or correct the address"
        ) from error
    with client, joblib.parallel_config(backend="dask"):
        yield


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))
