"""Many workers end with the numbers of one: killed, doubled, or on a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import dask.config
import joblib
import pandas as pd
import psutil
import pytest
import torch
from distributed import LocalCluster
from distributed.security import Security

from oracles import same_tables
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

pytestmark = pytest.mark.slow
OPTIONS = ("--ratios", "0.1,0.3", "--general", "5")
CHOICES = Choices(ratios=(0.1, 0.3), general=5)
QUESTIONS = toy_questions(8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three models and a question file."""
    place = tmp_path_factory.mktemp("workers")
    for seed, name in enumerate(("one", "two", "three")):
        save_toy(place / name, seed=seed)
    save_questions(place / "questions.jsonl", QUESTIONS)
    return place


@pytest.fixture(scope="module")
def models(place):
    return [str(place / name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module")
def expected(place, models):
    """The study of one process that nobody disturbs, as its files tell it."""
    study = measure_pss(models, QUESTIONS, CHOICES, store=Store(place / "undisturbed"))
    write_study(study, place / "expected")
    return tables(place / "expected")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A cluster may take its time on a busy machine."""
    monkeypatch.setattr(parallel, "ANSWER_WITHIN", 600)


def cluster(workers=2, **options):
    """A scheduler, and workers that are processes of their own, of one thread each."""
    return LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0", **options)


@pytest.fixture(scope="module")
def scheduler():
    with cluster() as two:
        yield two.scheduler_address


def tables(out):
    return pd.read_parquet(out / "pss.parquet"), pd.read_parquet(out / "details.parquet")


def assert_same_numbers(actual, expected):
    """Every accuracy; every log-likelihood to 1e-3, which is what another batch may move."""
    for one, other in zip(actual, expected, strict=True):
        same_tables(one, other)


def finished(root):
    """The units in a store, with the time each was written."""
    found = {}
    for file in root.glob("v*/*/[!.]*/key.json"):
        key = json.loads(file.read_text())
        if key["unit"] == "pss":
            found[key["name"], *key["concepts"]] = file.stat().st_mtime_ns
    return found


def found_in_store(out):
    models = json.loads((out / "run.json").read_text())["models"]
    return [model["units_from_store"] for model in models]


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def start(place, models):
    """`start(out, store, "--jobs", "2")`: the command; what a failed test has started ends too."""
    started = []

    def start(out, store, *options):
        command = [sys.executable, "-m", "paramspec", "pss", *models, *OPTIONS, *options]
        command += ["--questions", "questions.jsonl", "--out", out, "--store", store]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, cwd=place, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_sweep_of_two_processes_killed_midway_continues(start, expected, tmp_path):
    """SIGKILL to all of its processes; the rerun repeats no finished unit."""
    out, store = tmp_path / "out", tmp_path / "store"
    process = start(out, store, "--jobs", "2")
    wait_for(lambda: finished(store))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = finished(store)
    assert 0 < len(before) < 6
    again = start(out, store, "--jobs", "2")
    told = again.communicate(timeout=600)[1]
    assert again.returncode == 0, told
    assert before.items() <= finished(store).items()
    assert_same_numbers(tables(out), expected)
    assert sum(found_in_store(out)) == len(before)
    assert "set aside" not in told  # an unfinished unit is not a damaged one


def test_a_process_killed_beside_the_sweep_is_told_in_one_line(start, tmp_path):
    """As the kernel does where memory runs out; what is finished is kept."""
    store = tmp_path / "store"
    process = start(tmp_path / "out", store, "--controls", "20", "--jobs", "2")
    wait_for(lambda: finished(store))
    before = finished(store)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "LokyProcess" in " ".join(child.cmdline()):
            child.kill()
            break
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 2, told
    # joblib's own tracker may add what it cleaned up after the dead process.
    (line,) = [line for line in told.split("\n") if line.startswith("paramspec: error: ")]
    assert "a worker process was killed, most likely for lack of memory; run again" in line
    assert "Traceback" not in told
    assert before.items() <= finished(store).items()


def test_two_sweeps_at_once_share_the_work_and_lose_nothing(start, expected, tmp_path):
    store = tmp_path / "store"
    both = [start(tmp_path / out, store) for out in ("a", "b")]
    for process in both:
        told = process.communicate(timeout=600)[1]
        assert process.returncode == 0, told
    for out in ("a", "b"):
        assert_same_numbers(tables(tmp_path / out), expected)
    assert sum(found_in_store(tmp_path / "a") + found_in_store(tmp_path / "b")) == 6
    assert len(finished(store)) == 6
    assert not [*store.rglob("*.lock"), *store.rglob(".partial-*")]


def test_a_worker_killed_midway_changes_no_number(models, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SHARD", 1)  # many units, so that midway is a long time
    store, before = tmp_path / "store", {}
    with cluster() as two:

        def kill():
            wait_for(lambda: finished(store))
            os.kill(two.workers[0].pid, signal.SIGKILL)
            before.update(finished(store))

        killer = threading.Thread(target=kill)
        monkeypatch.chdir(tmp_path)  # the workers have another working directory
        with workers(scheduler=two.scheduler_address):
            killer.start()
            study = measure_pss(models, QUESTIONS, CHOICES, store=Store("store"))
        killer.join()
    assert 0 < len(before) < 24
    assert before.items() <= finished(store).items()
    assert_same_numbers((study.pss, study.details), expected)


def test_what_a_worker_refuses_is_told_here_and_finished_units_are_kept(
    scheduler, models, tmp_path
):
    broken = toy_model("llama")
    broken.lm_head.weight[5] = torch.nan
    path = save_toy(tmp_path / "broken")
    broken.save_pretrained(path)
    store = Store(tmp_path / "store")
    with workers(scheduler=scheduler):
        measure_pss(models[:1], QUESTIONS, CHOICES, store=store)
        before = finished(store.root)
        with pytest.raises(InputError, match=r"broken: \w+/\w+: a log-likelihood of Llama"):
            measure_pss([*models[:1], str(path)], QUESTIONS, CHOICES, store=store)
    assert len(before) == 2
    assert before == finished(store.root)


def test_a_store_that_workers_do_not_see_is_refused(scheduler, models, tmp_path, monkeypatch):
    elsewhere = contextlib.nullcontext(tmp_path / "not there")
    monkeypatch.setattr(runner, "TemporaryDirectory", lambda **_: elsewhere)
    with (
        workers(scheduler=scheduler),
        pytest.raises(InputError, match="store: not seen by a worker"),
    ):
        measure_pss(models, QUESTIONS, CHOICES, store=Store(tmp_path / "store"))


def test_a_scheduler_that_is_of_no_use_is_told_in_one_line(
    place, models, tmp_path, command, closed_port, monkeypatch
):
    """Silent, not there, without a worker, or no address: before anything is measured."""
    monkeypatch.setattr(parallel, "ANSWER_WITHIN", 3)
    options = ("--out", tmp_path / "out", "--store", tmp_path / "s", *OPTIONS)
    options += ("--questions", place / "questions.jsonl", "--scheduler")
    with socket.create_server(("127.0.0.1", 0)) as silent, cluster(0) as idle:
        there = (f"tcp://127.0.0.1:{port}" for port in (silent.getsockname()[1], closed_port))
        for address in (*there, "nonsense", idle.scheduler_address):
            status, out, error = command("pss", *models, *options, address)
            assert (status, out, error.count("\n")) == (2, "", 1), error
            assert f"paramspec: error: scheduler {address!r}: " in error
    assert not finished(tmp_path / "s")


def test_a_scheduler_behind_tls_knows_its_own_and_refuses_strangers(
    models, expected, tmp_path, monkeypatch
):
    """With a certificate that is made as the guide says."""
    line = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=dask -keyout {0} -out {1}"
    files = {}
    for who in ("ours", "strangers"):
        files[who] = key, cert = str(tmp_path / f"{who}-key.pem"), str(tmp_path / f"{who}.pem")
        subprocess.run(line.format(key, cert).split(), check=True, capture_output=True)

    def settings(who):
        key, cert = files[who]
        roles = {f"{role}.key": key for role in ("scheduler", "worker", "client")}
        roles |= {name.replace("key", "cert"): cert for name in roles}
        named = {"ca-file": cert, **roles}
        return {f"distributed.comm.tls.{name}": value for name, value in named.items()}

    with dask.config.set(settings("ours")):
        encrypted = {"security": Security(require_encryption=True), "protocol": "tls://"}
        with cluster(1, **encrypted) as behind:
            address = behind.scheduler_address
            with workers(scheduler=address):
                study = measure_pss(models, QUESTIONS, CHOICES, store=Store(tmp_path / "store"))
            monkeypatch.setattr(parallel, "ANSWER_WITHIN", 3)
            nobody = dict.fromkeys(settings("ours"))
            for others in (settings("strangers"), nobody):
                refused = pytest.raises(InputError, match=f"scheduler '{address}'")
                with dask.config.set(others), refused, workers(scheduler=address):
                    pass
    assert_same_numbers((study.pss, study.details), expected)


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


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_workers_are_done_together_when_one_model_is_much_larger(count, monkeypatch):
    """Twenty micro models and one of 135 M weights; a free worker takes the next task."""
    sizes = {str(number): 300_000 for number in range(20)} | {"20": 135_000_000}
    monkeypatch.setattr(runner, "_weights", lambda model: sizes[model.name])
    targets = [runner.Target(Checkpoint(name, None), "cpu", {}) for name in sizes]
    jobs = [runner.Job(one, [{}] * 15, [1] * 15, None, None, range(15)) for one in targets]
    with joblib.parallel_config("loky", n_jobs=count):
        tasks = [(job.target.model.name, job.left) for job in runner._tasks(jobs)]
    busy = [0.0] * count
    for name, units in tasks:
        busy[busy.index(min(busy))] += sizes[name] * len(units)
    assert max(busy) < 1.15 * sum(busy) / count
    done = [(name, number) for name, units in tasks for number in units]
    assert sorted(done) == sorted((name, number) for name in sizes for number in range(15))
    if count == 1:
        assert len(tasks) == 21 * 15  # in one process, the model is kept
    else:
        assert Counter(name for name, _ in tasks if name != "20") == Counter(sizes.keys() - {"20"})


@pytest.mark.parametrize(("visible", "expected"), [(None, "01001"), ("4,GPU-a", "4a44a")])
def test_each_worker_sees_a_gpu_of_its_own(visible, expected, monkeypatch, tmp_path):
    """The third shares one; a worker that takes a dead one's place takes its GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.tempfile, "gettempdir", lambda: str(tmp_path))
    locks, seen = [], []
    for number in range(5):
        if number == 3:
            locks[0].release()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        locks.append(parallel._see_one_gpu.__wrapped__())
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"][-1])
    assert "".join(seen) == expected


def test_a_process_with_one_gpu_or_none_sees_what_it_is_given(monkeypatch):
    for visible, count in (("1", 1), (None, 0), (None, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        assert parallel._see_one_gpu.__wrapped__() is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == (visible or "")
