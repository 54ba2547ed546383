"""An end is an end: a command that is ended leaves nothing running.

    mind_signals()          # the command, first of all: SIGTERM, SIGINT and SIGHUP end it, whole
    watch_parent(pid)       # a process that it started: ends within seconds of process `pid`

Work needs no chance to tidy up: whatever is written is written aside and renamed, so that SIGKILL
may come at any moment. Nothing here happens on import: in a notebook, signals stay the notebook's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil  # here, not where it is used: the end may come in the middle of any other import

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds that killed processes have to be gone, on a machine that is busy

_minding = False
_watched: set[int] = set()


def mind_signals() -> None:
    """`mind_signals()`: from now on, a signal ends this process and all that it started.

    One line on standard error says so, and the exit status is 128 plus the signal's number. A
    signal that was ignored when this process began, as `nohup` does, stays ignored.

    A thread does it, so that it does not wait until a long computation is done; meanwhile the main
    thread stops at its next step, so that it neither reports the killed processes nor starts more.
    """
    global _minding
    _minding = True
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    stopped = threading.Lock()

    def stop(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):  # full: it was told
            os.write(tell, bytes([number]))
        if stopped.acquire(blocking=False):
            while True:
                signal.pause()

    def ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    atexit.register(ignore)  # called last: the work is done, and the status is that of the command
    # What the trackers of joblib clean up after killed processes is nobody's concern.
    given = os.environ.get("PYTHONWARNINGS")
    ours = "ignore:resource_tracker"
    os.environ["PYTHONWARNINGS"] = f"{given},{ours}" if given else ours


def keep_interrupts_from_children() -> None:
    """`keep_interrupts_from_children()`: Ctrl-C in a terminal, which goes to every process of the
    command, is for `mind_signals` alone; processes started from now on never get it.
    """
    if _minding:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # it is started with workers, and lets interrupts through
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def out_of_the_main_thread(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`out_of_the_main_thread(run, notebook)`: its result, where it can't take the signals over.

    In the main thread, nbclient handles signals itself: it asks its kernel to end, and goes on.
    """
    if not _minding:
        return function(*arguments, **options)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments, **options).result()


def watch_parent(pid: int) -> None:
    """`watch_parent(pid)`: end this process and all that it started once its parent isn't `pid`.

    The parent was killed then: whoever adopts its children has another number.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(1)
        _kill_descendants()
        os._exit(1)

    if pid not in _watched:
        _watched.add(pid)
        threading.Thread(target=watch, daemon=True).start()


def _end_when_told(told: int) -> None:
    number = 0
    while number not in SIGNALS:  # other signals that have a handler are told as well
        (number,) = os.read(told, 1)
    try:
        _freeze_descendants()  # first, so that none of them has a last word
        _say(
            f"paramspec: ended by {signal.Signals(number).name}; finished work is kept, "
            "run the same command again to continue"
        )
        _kill_descendants()
    finally:
        os._exit(128 + number)


def _say(line: str) -> None:
    """One line on standard error, below any progress bar, and nothing after it."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    with contextlib.suppress(OSError):  # the terminal is gone
        if select.select([], [2], [], 1)[1]:  # else nobody reads, and a write would not return
            os.write(2, ("\n" * len(bars) + line + "\n").encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _freeze_descendants() -> list[psutil.Process]:
    """Stop all processes that this one started, and return them: a stopped one starts no other.

    The trackers of joblib and multiprocessing go on: they end with the last process that they
    serve, and remove its semaphores and temporary files.
    """
    frozen: list[psutil.Process] = []
    while new := [child for child in _descendants() if child not in frozen]:
        for child in new:
            with contextlib.suppress(psutil.Error):
                child.suspend()
        frozen += new
    return frozen


def _kill_descendants() -> None:
    """Kill all processes that this one started; return when they are gone."""
    deadline = time.monotonic() + PATIENCE
    while frozen := _freeze_descendants():
        for child in frozen:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _descendants() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            ended = child.status() == psutil.STATUS_ZOMBIE
            if not ended and not any("resource_tracker" in word for word in child.cmdline()):
                found.append(child)
    return found
