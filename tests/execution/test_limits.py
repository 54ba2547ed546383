"""The limits of control groups, of both versions, from files as the kernel shows them."""

from __future__ import annotations

import joblib
import psutil
import pytest
import torch

from paramspec.errors import InputError
from paramspec.execution import limits, parallel, provenance
from paramspec.studies import cost

GIB = 2**30
V2 = "0::/pod/app\n"
FILES = f"inactive_file {3 * GIB}"
V1 = "7:memory:/pod/app\n4:cpu,cpuacct:/pod/app\n0::/\n"
V1_FILES = {
    "memory/pod/app/memory.limit_in_bytes": 6,
    "memory/pod/app/memory.usage_in_bytes": 4,
    "memory/pod/app/memory.stat": f"inactive_file 7\ntotal_{FILES}",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(group, {file: text, or GiB})`: a host of 64 processors and 256 GiB, 100 free."""
    stat = type("Memory", (), {"total": 256 * GIB, "available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", stat)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 64)
    monkeypatch.setattr(limits, "PROC", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "CGROUP", tmp_path / "fs")

    def make(group, files):
        (tmp_path / "cgroup").write_text(group)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text if isinstance(text, str) else text * GIB}\n")

    return make


@pytest.mark.parametrize(
    ("group", "files", "count"),
    [
        (V2, {}, 64),
        (V2, {"pod/app/cpu.max": "max 100000"}, 64),
        (V2, {"pod/app/cpu.max": "150000 100000"}, 2),
        (V2, {"pod/app/cpu.max": "1000 100000"}, 1),
        (V2, {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),
        (V2, {"cpu.max": "400000 100000"}, 4),  # a container that sees its host's path
        ("", {"cpu.max": "100000 100000"}, 64),  # a system without control groups
    ],
)
def test_processors_are_those_of_the_tightest_group(machine, group, files, count, monkeypatch):
    machine(group, files)
    assert limits.cores() == count
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)  # by affinity
    assert limits.cores() == min(count, 3)


@pytest.mark.parametrize(
    ("group", "files", "total", "free"),
    [
        (V2, {}, 256, 100),
        (V2, {"pod/app/memory.max": "max"}, 256, 100),
        (V2, {"pod/memory.max": 8, "pod/memory.current": 3}, 8, 5),
        # Files are read again if need be.
        (V2, {"memory.high": 4, "memory.current": 5, "memory.stat": f"anon 1\n{FILES}"}, 4, 2),
        (V2, {"memory.max": 1, "memory.current": 2}, 1, 0),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, 256, 100),
        (V1, V1_FILES, 6, 5),
    ],
)
def test_memory_is_that_of_the_tightest_group(machine, group, files, total, free):
    machine(group, files)
    assert (limits.memory(), limits.available_memory()) == (total * GIB, free * GIB)


def test_whoever_asks_is_told_the_limits_and_not_the_host(machine, monkeypatch):
    """Workers, threads without workers, a model's weights, the planner, the note on a page."""
    machine(V2, {"cpu.max": "200000 100000", "memory.max": 3})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with parallel.workers():
        assert joblib.effective_n_jobs(None) == 2
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        with parallel.workers(jobs=1):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    with pytest.raises(InputError, match="weights need 4 GB, this process may use 3 GB"):
        limits.require_memory(4 * 10**9)
    cpu = cost.find_gpu("cpu")
    assert cpu.source.startswith("2 cores")
    assert cpu.memory == 3 * GIB
    assert "2 cores, 3 GiB" in provenance.machine(provenance.hardware())
