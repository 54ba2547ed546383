"""An end is an end: a command that is ended leaves nothing running, and a rerun its numbers."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from checkout import HEADER, REPOSITORY, make_checkout
from oracles import same_tables

pytestmark = pytest.mark.slow
MODELS = ["zoo.yaml:llama-1", "zoo.yaml:llama-2"]
CELL = f"""\
from pathlib import Path

import paramspec
from paramspec.studies.sweep import write_study

choices = paramspec.Choices(ratios=(0.25,), general=2)
with paramspec.workers(jobs=jobs):
    study = paramspec.measure_pss({MODELS}, paramspec.study_questions({MODELS}), choices)
write_study(study, Path("out"))
"""
CHAPTER = f"""{HEADER}
# Measured

```{{code-cell}} ipython3
:tags: [parameters]

jobs: int = 2  # processes
```

```{{code-cell}} ipython3
{CELL}
```
"""
OPTIONS = ["--ratios", "0.25", "--general", "2", "--jobs", "2", "--out", "out"]
TUNING = ["--method", "FT-PV", "--concept", "France", "--concept", "gold", "--out", "tuned"]
TUNING += ["--epochs", "40", "--save-every", "1"]
COMMANDS = {
    "build": ["build"],
    "run": ["run", "measured"],
    "pss": ["pss", *MODELS, *OPTIONS],
    "finetune": ["finetune", MODELS[1], *TUNING],
}
# Most of an undisturbed run's computing time, in that of `pss`, whose workers import torch, too.
LENGTHS = {"build": 1.2, "run": 0.85, "pss": 1.0, "finetune": 0.28}
MOMENTS = {"build": 3, "run": 5, "pss": 6, "finetune": 6}
LOOK = 0.25  # seconds between two looks at the progress
WITHIN = 5.0  # seconds until nothing runs, of a process that has a core, see `seconds_given`


@dataclass
class End:
    """What a signal at a moment gave."""

    command: str
    signal: str
    progress: float
    status: int
    seconds: float
    told: str


def make_place(folder: Path) -> Path:
    """A book of one chapter that measures two micro models, and their recipe."""
    make_checkout(folder, measured=CHAPTER)
    shutil.copy(REPOSITORY / "book" / "profiles" / "zoo" / "smoke.yaml", folder / "zoo.yaml")
    return folder


@contextlib.contextmanager
def started(place: Path, *words: str, wrapper: tuple[str, ...] = (), **options):
    """Start `paramspec`, in a session of its own; yield it and a test for what it started."""
    mark = uuid.uuid4().hex
    environment = os.environ | {"STARTED_BY": mark}

    def running() -> list[dict]:
        """What runs now: a process may be gone when it is asked once more."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # not ours, or gone meanwhile
                ours = process.environ().get("STARTED_BY") == mark
                told = process.as_dict(["pid", "ppid", "status", "cmdline"])
                if ours and told["status"] != psutil.STATUS_ZOMBIE:
                    found.append(told)
        return found

    # Also where these tests were started to ignore signals (`nohup`), what they start minds them.
    line = ["env", "--default-signal=HUP,INT", *wrapper, sys.executable, "-m", "paramspec", *words]
    with (place / "told.txt").open("wb") as told:
        process = subprocess.Popen(
            line,
            **{"cwd": place, "env": environment, "start_new_session": True}
            | {"stdin": subprocess.DEVNULL, "stdout": told, "stderr": told}
            | options,
        )
    try:
        yield process, running
    finally:
        for left in running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(left["pid"], signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)  # a look at all processes takes a hundredth


def seconds_given(condition: Callable[[], object]) -> float:
    """Seconds until then, in the computing time that another process had meanwhile.

    On an idle machine these are seconds; on a busy one every process waits for its turn.
    """
    line = [sys.executable, "-S", "-c", "while True: pass"]
    other = subprocess.Popen(line, start_new_session=True)  # as what is waited for
    try:
        wait_until(condition)
        times = psutil.Process(other.pid).cpu_times()
        return times.user + times.system
    finally:
        other.kill()
        other.wait()


def minds_signals(process: subprocess.Popen) -> bool:
    """Whether it has got so far: its interpreter needs a moment to start."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return process.poll() is not None or bool(int(caught, 16) & 1 << signal.SIGHUP - 1)


def computing_time(process: subprocess.Popen, spent: dict[int, float]) -> float:
    """Seconds that it and all that it started have computed, of whom `spent` keeps the account."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                spent[one.pid] = times.user + times.system
    return sum(spent.values())


def finish(place: Path, command: str, wrapper: tuple[str, ...] = (), disturb=None) -> float:
    """Run a command to its end; its computing time."""
    spent: dict[int, float] = {}
    with started(place, *COMMANDS[command], wrapper=wrapper) as (process, _):
        while process.poll() is None:
            computing_time(process, spent)
            if disturb and sum(spent.values()) > 1:
                disturb = disturb(process)
            time.sleep(LOOK)
    assert process.returncode == 0, (place / "told.txt").read_text()
    return sum(spent.values())


def end(place: Path, command: str, number, progress: float, length: float, draw) -> End | None:
    """Send a signal when a share of the work is done; None if the command was done before."""
    # A terminal's signals go to all processes of a command.
    send = os.killpg if number != signal.SIGTERM or draw.random() < 0.5 else os.kill
    times, spent = int(draw.integers(1, 3)), {}
    with started(place, *COMMANDS[command]) as (process, running):
        wait_until(lambda: minds_signals(process))
        due = progress * length
        wait_until(lambda: process.poll() is not None or computing_time(process, spent) >= due)
        if process.poll() is not None:
            return None
        for _ in range(times):
            send(process.pid, number)
        seconds = seconds_given(lambda: not running())
        status = process.wait()
    told = (place / "told.txt").read_text()
    return End(command, number.name, progress, status, seconds, told) if status else None


def lives(folder: Path, command: str, moments: list[float], expected: dict, length: float, draw):
    """End a command at each moment, one after the other in one place, then let it finish.

    A command that is done before its moment has come is held against the undisturbed run, and the
    moment is looked for at half the progress, in a new place.
    """
    ends: list[End] = []
    places = (make_place(folder / str(number)) for number in itertools.count())
    signals = itertools.cycle(draw.permutation([signal.SIGHUP, signal.SIGINT, signal.SIGTERM]))
    place = next(places)
    for progress in sorted(moments):  # what is kept shortens the next run
        number = signal.Signals(next(signals))
        while (one := end(place, command, number, progress, length, draw)) is None:
            assert_same(numbers(place, command), expected)
            place, progress = next(places), progress / 2
            assert progress > 0.001, f"{number.name} does not end `paramspec {command}`"
        ends.append(one)
    finish(place, command)
    assert_same(numbers(place, command), expected)
    return ends


def numbers(place: Path, command: str) -> dict[str, object]:
    """All that a command computed, by name."""
    if command == "finetune":
        losses = pd.read_json(place / "tuned" / "finetune.json", typ="series")["losses"]
        return {"losses": losses, **load_file(place / "tuned" / "model.safetensors")}
    if command != "pss":
        assert (place / "book" / "_executed" / "measured.ipynb").is_file()
    if command == "build":
        assert "Measured" in (place / "_build" / "html" / "book" / "measured.html").read_text()
    tables = {n: pd.read_parquet(place / "out" / f"{n}.parquet") for n in ("pss", "details")}
    return {**tables, **load_file(place / "out" / "masks.safetensors")}


def assert_same(actual: dict[str, object], expected: dict[str, object]) -> None:
    """To the last bit, but for the last of a log-likelihood: linear layers are the faster ones."""
    assert actual.keys() == expected.keys()
    for name, one in expected.items():
        if isinstance(one, pd.DataFrame):
            same_tables(actual[name], one, atol=1e-4, check_exact=True)
        else:
            np.testing.assert_array_equal(actual[name], one)


def undisturbed(folder: Path) -> tuple[dict[str, dict[str, object]], float]:
    """A command's numbers, and the computing time of `pss`, of runs that end by themselves; one
    gets signals that it was told to ignore, as `nohup` does.
    """
    tuned, measured = make_place(folder / "finetune"), make_place(folder / "pss")

    def disturb(process: subprocess.Popen) -> None:
        for number in (signal.SIGHUP, signal.SIGINT):
            os.killpg(process.pid, number)

    ignoring = ("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh")
    with ThreadPoolExecutor(2) as lanes:
        lane = lanes.submit(finish, tuned, "finetune", ignoring, disturb)
        length = finish(measured, "pss")
        lane.result()
    found = {"finetune": numbers(tuned, "finetune"), "pss": numbers(measured, "pss")}
    with contextlib.chdir(measured):
        exec(CELL, {"jobs": 1})
    found["run"] = found["build"] = numbers(measured, "pss")
    return found, length


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[End]]:
    """Ends of each command at as many moments as `MOMENTS` says, two commands side by side."""
    folder = tmp_path_factory.mktemp("ends")
    expected, length = undisturbed(folder)
    with ThreadPoolExecutor(2) as lanes:
        running = {}
        for place, (command, count) in enumerate(MOMENTS.items()):
            draw = np.random.default_rng([0, place])
            rest = (draw.uniform(0, 1, count).tolist(), expected[command])
            running[command] = lanes.submit(
                lives, folder / f"{command}-lives", command, *rest, LENGTHS[command] * length, draw
            )
        return {command: lane.result() for command, lane in running.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_any_moment_ends_everything_and_loses_nothing(ends, command):
    assert len(ends[command]) == MOMENTS[command]
    for one in ends[command]:
        assert one.status == 128 + signal.Signals[one.signal], one
        assert one.seconds < WITHIN, one
        line = f"paramspec: ended by {one.signal}; finished work is kept, run the same command "
        assert one.told.count("ended by") == 1
        assert one.told.split("\n")[-2:] == [line + "again to continue", ""]
        assert "Traceback" not in one.told


def start_of(words: str, running) -> Callable[[], bool]:
    """Whether a process whose command line holds the words was started."""
    return lambda: any(words in " ".join(process["cmdline"] or ()) for process in running())


@pytest.mark.parametrize(
    ("command", "child"),
    [
        ("pss", "LokyProcess-2"),  # a worker that has just begun to import
        ("run", "ipykernel"),  # a kernel that doesn't watch its parent yet
        ("run", "LokyProcess-2"),  # a kernel's worker
        ("build", "jupyter_book"),
    ],
)
def test_what_a_killed_command_started_ends_by_itself(tmp_path, command, child):
    """By SIGKILL, where whoever adopts the orphans isn't process 1."""
    place = make_place(tmp_path / "place")
    if child == "jupyter_book":  # a chapter that is done at once
        (place / "book" / "measured.md").write_text(CHAPTER.replace(CELL, "jobs"))
    adopting = (
        "import ctypes, subprocess, sys;"
        "ctypes.CDLL(None).prctl(36, 1);"  # PR_SET_CHILD_SUBREAPER
        "command = subprocess.Popen(sys.argv[1:]); print(command.pid, flush=True);"
        "command.wait(); sys.stdin.read()"
    )
    wrapper = (sys.executable, "-c", adopting)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started(place, *COMMANDS[command], wrapper=wrapper, **pipes) as (process, running):
        pid = int(process.stdout.readline())
        wait_until(start_of(child, running))
        os.kill(pid, signal.SIGKILL)
        assert seconds_given(lambda: {one["pid"] for one in running()} == {process.pid}) < 10


@contextlib.contextmanager
def in_a_terminal(place: Path, command: str):
    """Start a command in a terminal of its own; yield our end of it, the process and `running`."""
    ours, theirs = pty.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    options = {"preexec_fn": lambda: os.login_tty(theirs), "start_new_session": False}
    with started(place, *COMMANDS[command], **terminal, **options) as (process, running):
        os.close(theirs)
        yield ours, process, running


def test_ctrl_c_in_a_terminal_shows_one_line(tmp_path):
    """It goes to the workers, too, and they don't answer."""
    place = make_place(tmp_path / "place")
    with in_a_terminal(place, "pss") as (ours, process, running):
        wait_until(start_of("LokyProcess-2", running))
        os.write(ours, b"\x03")
        assert seconds_given(lambda: not running()) < WITHIN
        assert process.wait() == 130
        shown = b""
        with contextlib.suppress(OSError):  # all of it was read
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert b"Traceback" not in shown
    assert shown.split(b"\r\n")[-2].startswith(b"paramspec: ended by SIGINT; ")


def test_a_terminal_that_is_closed_ends_the_command(tmp_path):
    place = make_place(tmp_path / "place")
    with in_a_terminal(place, "finetune") as (ours, process, running):
        wait_until(lambda: minds_signals(process))
        os.close(ours)
        assert seconds_given(lambda: not running()) < WITHIN
        assert process.wait() == 129
