"""Many workers end with the numbers of one: killed, doubled, or on a cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import joblib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from cluster import cluster
from paramspec.errors import InputError
from paramspec.execution import parallel
from paramspec.execution.parallel import workers
from paramspec.execution.store import Store
from paramspec.method.pss import Choices
from paramspec.models.checkpoints import Checkpoint
from paramspec.studies import runner, sweep
from paramspec.studies.sweep import measure_pss, write_study
from toy_study import save_questions, save_toy, toy_questions
from toys import toy_model

OPTIONS = ("--ratios", "0.1,0.3", "--general", "5")
CHOICES = Choices(ratios=(0.1, 0.3), general=5)
MODELS = ("one", "two", "three")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three models and a question file."""
    place = tmp_path_factory.mktemp("workers")
    for seed, name in enumerate(MODELS):
        save_toy(place / name, seed=seed)
    save_questions(place / "questions.jsonl", toy_questions(8))
    return place


@pytest.fixture(scope="module")
def models(place):
    return [str(place / name) for name in MODELS]


@pytest.fixture(scope="module")
def expected(place, models):
    """The study of one process that nobody disturbs, as its files tell it."""
    study = measure_pss(models, toy_questions(8), CHOICES, store=Store(place / "undisturbed"))
    write_study(study, place / "expected")
    return tables(place / "expected")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A cluster may take its time on a busy machine."""
    monkeypatch.setattr(parallel, "ANSWER_WITHIN", 600)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("dask")) as dask:
        yield dask


def tables(out):
    return pd.read_parquet(out / "pss.parquet"), pd.read_parquet(out / "details.parquet")


def assert_same_numbers(actual, expected):
    """Every accuracy; every log-likelihood to 1e-3, which is what another batch may move."""
    pd.testing.assert_frame_equal(actual[0], expected[0])
    pd.testing.assert_frame_equal(
        actual[1].drop(columns="option_logprobs"), expected[1].drop(columns="option_logprobs")
    )
    one, other = (np.stack(table[1]["option_logprobs"]) for table in (actual, expected))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def finished(root):
    """The units in a store, with the time each was written."""
    found = {}
    for file in root.glob("v*/*/*/key.json"):
        if not file.parent.name.startswith("."):
            key = json.loads(file.read_text())
            if key["unit"] == "pss":
                found[key["name"], *key["concepts"]] = file.stat().st_mtime_ns
    return found


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def start(place, models, out, *options):
    command = [sys.executable, "-m", "paramspec.cli", "pss", *models, *OPTIONS]
    command += ["--questions", str(place / "questions.jsonl"), "--out", str(out), *options]
    process = subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def ended():
    """What a failed test has started ends with it."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_sweep_of_two_processes_killed_midway_continues(place, models, expected, tmp_path):
    """SIGKILL to all of its processes; the rerun repeats no finished unit."""
    store = ("--store", str(tmp_path / "store"), "--jobs", "2")
    process = start(place, models, tmp_path / "out", *store)
    wait_for(lambda: finished(tmp_path / "store"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = finished(tmp_path / "store")
    assert 0 < len(before) < 6
    again = start(place, models, tmp_path / "out", *store)
    told = again.communicate(timeout=600)[1]
    assert again.returncode == 0, told
    assert before.items() <= finished(tmp_path / "store").items()
    assert_same_numbers(tables(tmp_path / "out"), expected)
    records = json.loads((tmp_path / "out" / "run.json").read_text())["models"]
    assert sum(record["units_from_store"] for record in records) == len(before)
    assert "Traceback" not in told
    assert "set aside" not in told  # an unfinished unit is not a damaged one


def test_a_process_killed_beside_the_sweep_is_told_in_one_line(place, models, tmp_path):
    """As the kernel does where memory runs out; the rerun continues with what is finished."""
    store = ("--store", str(tmp_path / "store"), "--controls", "20")
    process = start(place, models, tmp_path / "out", *store, "--jobs", "2")
    wait_for(lambda: finished(tmp_path / "store"))
    before = finished(tmp_path / "store")
    for child in psutil.Process(process.pid).children(recursive=True):
        if "LokyProcess" in " ".join(child.cmdline()):
            child.kill()
            break
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 2, told
    # joblib's own tracker may add what it cleaned up after the dead process.
    (line,) = [line for line in told.split("\n") if line.startswith("paramspec: error: ")]
    assert "a worker process was killed, most likely for want of memory; run again" in line
    assert "Traceback" not in told
    assert before.items() <= finished(tmp_path / "store").items()


def test_two_sweeps_at_once_share_the_work_and_lose_nothing(place, models, expected, tmp_path):
    both = [
        start(place, models, tmp_path / out, "--store", str(tmp_path / "store"))
        for out in ("a", "b")
    ]
    computed = 0
    for process, out in zip(both, ("a", "b"), strict=True):
        told = process.communicate(timeout=600)[1]
        assert process.returncode == 0, told
        assert_same_numbers(tables(tmp_path / out), expected)
        records = json.loads((tmp_path / out / "run.json").read_text())["models"]
        computed += sum(record["units"] - record["units_from_store"] for record in records)
    assert computed == len(finished(tmp_path / "store")) == 6
    assert not list((tmp_path / "store").rglob("*.lock"))
    assert not list((tmp_path / "store").rglob(".partial-*"))


def test_a_cluster_gives_the_numbers_of_one_process(dask, models, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers have another working directory
    with workers(scheduler=dask.address):
        study = measure_pss(models, toy_questions(8), CHOICES, store=Store("store"))
    assert len(finished(tmp_path / "store")) == 6
    assert_same_numbers((study.pss, study.details), expected)
    assert [record["units_from_store"] for record in study.run["models"]] == [0, 0, 0]


def test_a_worker_killed_midway_changes_no_number(models, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SHARD", 1)  # many units, so that midway is a long time
    before = {}
    with cluster(tmp_path / "dask") as dask:

        def kill():
            wait_for(lambda: finished(tmp_path / "store"))
            dask.workers[0].kill()
            dask.workers[0].wait()
            before.update(finished(tmp_path / "store"))

        killer = threading.Thread(target=kill)
        with workers(scheduler=dask.address):
            killer.start()
            study = measure_pss(models, toy_questions(8), CHOICES, store=Store(tmp_path / "store"))
        killer.join()
        assert dask.workers[0].returncode == -signal.SIGKILL
        assert dask.workers[1].poll() is None
    assert 0 < len(before) < 24
    assert before.items() <= finished(tmp_path / "store").items()
    assert_same_numbers((study.pss, study.details), expected)


def test_what_a_worker_refuses_is_told_here_and_finished_units_are_kept(dask, models, tmp_path):
    broken = toy_model("llama")
    broken.lm_head.weight[5] = torch.nan
    path = save_toy(tmp_path / "broken")
    broken.save_pretrained(path)
    store = Store(tmp_path / "store")
    message = r"broken: \w+/\w+: a log-likelihood of LlamaForCausalLM is not a finite number"
    with workers(scheduler=dask.address):
        measure_pss(models[:1], toy_questions(8), CHOICES, store=store)
        before = finished(store.root)
        with pytest.raises(InputError, match=message) as caught:
            measure_pss([*models[:1], str(path)], toy_questions(8), CHOICES, store=store)
    assert "\n" not in str(caught.value)
    assert len(before) == 2
    assert before == finished(store.root)


def test_a_scheduler_that_is_of_no_use_is_told_in_one_line(
    place, models, tmp_path, command, closed_port, monkeypatch
):
    """Silent, not there, without a worker, or no address: before anything is measured."""
    with socket.create_server(("127.0.0.1", 0)) as silent, cluster(tmp_path / "dask", 0) as idle:
        nobody = "no answer within 1 s; start `dask scheduler` there"
        answers = {
            f"tcp://127.0.0.1:{silent.getsockname()[1]}": nobody,
            f"tcp://127.0.0.1:{closed_port}": nobody,
            "nonsense": "missing port number in address 'nonsense'; start `dask scheduler` there",
            idle.address: "no answer within 10 s; start one that has this version of paramspec: ",
        }
        for address, told in answers.items():
            # The idle one must have the time to answer that it is there.
            within = 10 if address == idle.address else 1
            monkeypatch.setattr(parallel, "ANSWER_WITHIN", within)
            options = ("--out", tmp_path / "out", "--store", tmp_path / "s", *OPTIONS)
            options += ("--questions", place / "questions.jsonl", "--scheduler", address)
            status, out, error = command("pss", *models, *options)
            assert (status, out) == (2, "")
            assert error.count("\n") == 1, error
            assert error.startswith("paramspec: error: ")
            assert f"scheduler {address!r}: {told}" in error
    assert not finished(tmp_path / "s")


def sleep_alone(place, number):
    """Fails where another task of the process runs at the same time."""
    (place / "running").mkdir()
    time.sleep(0.05)
    (place / "running").rmdir()
    return number


def test_a_process_of_several_threads_does_one_task_at_a_time(tmp_path):
    with joblib.parallel_config("threading", n_jobs=3):
        done = list(parallel.hand_out(sleep_alone, [(tmp_path, number) for number in range(6)]))
    assert sorted(done) == list(range(6))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_workers_are_done_together_when_one_model_is_much_larger(count):
    """Twenty micro models and one of 135 M weights; a free worker takes the next task."""
    jobs = []
    for number, weights in enumerate([300_000] * 20 + [135_000_000]):
        found = Checkpoint(str(number), None)
        target = runner.Target(found, str(number), "", torch.float32, "cpu")
        jobs.append((runner.Job(target, ({},) * 15, (1,) * 15, None), list(range(15)), weights))
    weights = {job.target.name: size + runner.OVERHEAD for job, _, size in jobs}
    chunks = [(job.target.name, numbers) for job, numbers in runner._chunks(jobs, count)]
    assert chunks[0][0] == "20"
    busy = [0.0] * count
    for name, numbers in chunks:
        busy[busy.index(min(busy))] += weights[name] * len(numbers)
    assert max(busy) < 1.15 * sum(busy) / count
    done = [(name, number) for name, numbers in chunks for number in numbers]
    assert sorted(done) == sorted((name, number) for name in weights for number in range(15))
    assert all(sum(name == str(n) for name, _ in chunks) == 1 for n in range(20))
    assert len(runner._chunks(jobs, 1)) == 21 * 15  # in one process, the model is kept
