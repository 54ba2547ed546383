"""A Dask cluster of real processes on this machine, started and ended by a test.

with cluster(tmp_path, workers=2) as dask:
    dask.address, dask.workers[0].pid
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distributed import Client


@dataclass
class Cluster:
    """The scheduler's address, and its workers: processes without a nanny to revive them."""

    address: str
    workers: list[subprocess.Popen]


@contextmanager
def cluster(place: Path, workers: int = 2) -> Iterator[Cluster]:
    """`with cluster(tmp_path) as dask:` a scheduler and workers of one thread each."""
    place.mkdir(parents=True, exist_ok=True)
    file, processes = place / "scheduler.json", []

    def start(*words: str) -> subprocess.Popen:
        log = (place / f"{len(processes)}.log").open("wb")
        command = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]]
        scratch = os.environ | {"DASK_TEMPORARY_DIRECTORY": str(place)}
        process = subprocess.Popen(command, cwd=place, env=scratch, stdout=log, stderr=log)
        processes.append(process)
        return process

    try:
        shared = ["--no-dashboard", "--scheduler-file", str(file)]
        start("scheduler", "--host", "127.0.0.1", "--port", "0", *shared)
        options = ["--no-nanny", "--nthreads", "1", "--host", "127.0.0.1"]
        started = [start("worker", *shared, *options) for _ in range(workers)]
        while not file.exists():
            assert processes[0].poll() is None, (place / "0.log").read_text()
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        with Client(address, timeout=600, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers, timeout=600)
        yield Cluster(address, started)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
