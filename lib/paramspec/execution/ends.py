"""How processes begin and end: a command that is ended leaves nothing running.

    mind_signals()          # the command, first of all: SIGTERM, SIGINT and SIGHUP end it, whole
    watch_parent(pid)       # a process that it started: ends within seconds of process `pid`
    collect_seldom()        # both: they import for seconds

Files are written aside and renamed, so that SIGKILL may come at any moment.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import select
import signal
import threading
import time

import psutil  # here, not where it is used: the end may come in the middle of any other import

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds that killed processes have to be gone, on a machine that is busy

_minding = False


def mind_signals() -> None:
    """From now on, a signal ends this process and all that it started.

    The exit status is 128 plus the signal's number. A signal that was ignored when this process
    began, as `nohup` does, stays ignored. A thread ends the processes, so that it does not wait
    for a long computation; meanwhile the main thread stops at its next step, so that it neither
    reports the killed processes nor starts more.
    """
    global _minding
    _minding = True
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_end_on_signal, args=(read_end,), daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
        # Called last: the work is done, and the status is that of the command.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    # The trackers of joblib clean up after killed processes: no user needs their warnings.
    given = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, given))


def collect_seldom() -> None:
    """From now on, look for cycles of dead objects seldom: while torch and transformers are
    imported, Python's own setting spends a quarter of the time on it, and finds none.
    """
    gc.set_threshold(50_000, 20, 20)


def _stop(number: int, frame: object) -> None:
    while True:
        signal.pause()


def keep_interrupts_from_children() -> None:
    """Processes started from now on never get Ctrl-C: `mind_signals` alone handles it."""
    if _minding:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # it is started with workers, and lets interrupts through
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def watch_parent(pid: int) -> None:
    """End this process and all that it started once its parent is not `pid`.

    The parent was killed then: whoever adopts its children has another number.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(1)
        _kill_descendants()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_on_signal(read_end: int) -> None:
    number = 0
    while number not in SIGNALS:  # other signals that have a handler arrive here as well
        (number,) = os.read(read_end, 1)
    try:
        terminal = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # so that no other thread has a last word
        _kill_descendants()
        line = (
            f"paramspec: ended by {signal.Signals(number).name}; finished work is kept, "
            "run the same command again to continue"
        )
        with contextlib.suppress(OSError):  # the terminal is gone
            if select.select([], [terminal], [], 1)[1]:  # else a write would not return
                os.write(terminal, f"\n{line}\n".encode())  # below a progress bar
    finally:
        os._exit(128 + number)


def _kill_descendants() -> None:
    """Kill all processes that this one started; return when they are gone.

    All are stopped before any is killed, since a stopped process starts no other.
    """
    deadline = time.monotonic() + PATIENCE
    stopped: set[psutil.Process] = set()
    while (found := _descendants()) and time.monotonic() < deadline:
        for child in found:
            with contextlib.suppress(psutil.Error):
                child.kill() if found <= stopped else child.suspend()
        stopped |= found
        time.sleep(0.01)


def _descendants() -> set[psutil.Process]:
    """Those that run. The trackers of joblib and multiprocessing are left out: they end with the
    last process that they serve, and remove its semaphores and temporary files.
    """
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            ended = child.status() == psutil.STATUS_ZOMBIE
            if not ended and not any("resource_tracker" in word for word in child.cmdline()):
                found.add(child)
    return found
