"""The limits of control groups, of both versions, from files as the kernel shows them."""

from __future__ import annotations

import joblib
import psutil
import pytest
import torch

from paramspec.errors import InputError
from paramspec.execution import limits, parallel, provenance
from paramspec.models import devices
from paramspec.studies import cost

GIB = 2**30
V2 = "0::/pod/app\n"
V1 = "7:memory:/pod/app\n4:cpu,cpuacct:/pod/app\n0::/\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(group, {file: text})`: a host of 64 processors and 256 GiB, 100 of them free."""
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
            path.write_text(text + "\n")

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
        (V1, {"cpu/pod/app/cpu.cfs_quota_us": "-1", "cpu/pod/app/cpu.cfs_period_us": "100000"}, 64),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "250000", "cpu/pod/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "2", "cpu,cpuacct/cpu.cfs_period_us": "1"}, 2),
        ("", {"cpu.max": "100000 100000"}, 64),  # a system without control groups
    ],
)
def test_processors_are_those_of_the_tightest_group(machine, group, files, count):
    machine(group, files)
    assert limits.cores() == count


def test_affinity_holds_beside_a_quota(machine, monkeypatch):
    machine(V2, {"pod/app/cpu.max": "800000 100000"})
    assert limits.cores() == 8
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    assert limits.cores() == 3


@pytest.mark.parametrize(
    ("group", "files", "total", "free"),
    [
        (V2, {}, 256, 100),
        (V2, {"pod/app/memory.max": "max"}, 256, 100),
        (V2, {"pod/memory.max": str(8 * GIB), "pod/memory.current": str(3 * GIB)}, 8, 5),
        (
            V2,
            {
                "memory.high": str(4 * GIB),
                "memory.current": str(5 * GIB),
                "memory.stat": f"anon 1\ninactive_file {3 * GIB}",  # read again if need be
            },
            4,
            2,
        ),
        (V2, {"memory.max": str(GIB), "memory.current": str(2 * GIB)}, 1, 0),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, 256, 100),
        (
            V1,
            {
                "memory/pod/app/memory.limit_in_bytes": str(6 * GIB),
                "memory/pod/app/memory.usage_in_bytes": str(2 * GIB),
                "memory/pod/app/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}",
            },
            6,
            5,
        ),
    ],
)
def test_memory_is_that_of_the_tightest_group(machine, group, files, total, free):
    machine(group, files)
    assert (limits.memory(), limits.available_memory()) == (total * GIB, free * GIB)


def test_whoever_asks_is_told_the_limits_and_not_the_host(machine, monkeypatch):
    """Workers, a model's weights, the planner, and the note on a page."""
    machine(V2, {"cpu.max": "200000 100000", "memory.max": str(3 * GIB)})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with parallel.workers():
        assert parallel.worker_count() == 2
    with pytest.raises(InputError, match="weights need 4 GB, this process may use 3 GB"):
        devices.device_map(4 * 10**9, torch.device("cpu"))
    assert "2 cores" in cost.find_gpu("cpu").source
    assert cost.find_gpu("cpu").memory == 3 * GIB
    assert "2 cores, 3 GiB" in provenance.machine(provenance.hardware())


def test_threads_beside_no_other_process_are_as_many_as_the_quota(machine):
    machine(V2, {"cpu.max": "200000 100000"})
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        with parallel.workers(jobs=1):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_workers_are_counted_as_were_asked_for(jobs):
    assert parallel.worker_count() == 1  # outside, this process alone
    with parallel.workers(jobs=jobs):
        assert parallel.worker_count() == jobs
