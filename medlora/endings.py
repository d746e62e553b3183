"""How a job ends: its exit code and its one message, after an error of the user's, Ctrl-C, SIGTERM or a closed terminal.

Every thread blocks the signals, and a thread of their own takes them with `sigwait`. So no handler of another library runs:
Ray installs several, one of which prints a C++ stack. What Ray starts here inherits the block. A signal to the whole
process group, as `timeout` and Slurm send it, therefore ends Ray only after the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from medlora.errors import InputError, RunError
from medlora.runs.disk_errors import explain

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "the end of its terminal (SIGHUP)"}
_WAKE = signal.SIGURG
"""Interrupts what the main thread waits for; ignored wherever nobody handles it."""
UNWIND_S = 3.0
"""How long a job may take to close its files and to end Ray before it is ended by force."""
_STOP_MARGIN_S = 1.2
"""Of the time that `ray job stop` leaves, how much is reserved for the message and the end itself."""


@dataclass
class _Saver:
    ask: Callable[[], None]
    grace_s: float
    saved: threading.Event = field(default_factory=threading.Event)


class _Job:
    """The process's job: what it would report, who can save something, and whether a signal has come."""

    def __init__(self, signals: set[signal.Signals]) -> None:
        self.signals, self.signum, self.done = signals, 0, False
        self.describe: Callable[[], str] | None = None
        self.log: Path | None = None
        self.savers: list[_Saver] = []
        self.works, self.reported = True, threading.Event()
        self.terminal = os.dup(2)

    @property
    def code(self) -> int:
        """The exit code of a job that a signal ended."""
        return 128 + self.signum

    def watch(self) -> None:
        """Wait for the first signal and end the job: checkpoint, message, and the main thread's way out."""
        signum = signal.sigwait(self.signals)
        if self.done:
            return
        began, limit_s = time.monotonic(), _find_stop_limit()
        self.signum = signum
        if signum != signal.SIGINT:
            self._wait_for_checkpoints(limit_s - _STOP_MARGIN_S)
        self._silence()
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
        self.print_line(f"ended by {_NAMES[signal.Signals(signum)]}; {self._describe()}")
        self.reported.set()
        left_s = min(UNWIND_S, max(0.2, limit_s - (time.monotonic() - began) - 0.5))
        signal.sigtimedwait(self.signals, left_s)  # asked once more, it ends at once
        end_process(self.code)

    def _wait_for_checkpoints(self, limit_s: float) -> None:
        savers, began = [saver for saver in self.savers if not saver.saved.is_set()], time.monotonic()
        for saver in savers:
            threading.Thread(target=_ask, args=(saver,), daemon=True).start()
        while any(
            not saver.saved.is_set() and time.monotonic() - began < min(saver.grace_s, limit_s) for saver in savers
        ):
            if signal.sigtimedwait(self.signals, 0.05):
                return

    def _silence(self) -> None:
        """Send what is still written to stderr, by Ray's cut-off parts above all, to the job's log."""
        try:
            target = os.open(self.log or os.devnull, os.O_WRONLY | os.O_APPEND)
        except OSError:
            target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, 2)
        os.close(target)

    def _describe(self) -> str:
        try:
            return self.describe() if self.describe else "nothing was written; the same command starts again"
        except Exception as error:  # a message with less in it is better than none
            return f"the same command resumes ({error!r})"

    def print_line(self, text: str) -> None:
        """Print one line on the terminal, even where stderr was redirected."""
        os.write(self.terminal, f"medlora: {text}\n".encode())


_JOB: _Job | None = None


def run_job(work: Callable[[], int]) -> int:
    """Do a job's work and return its exit code.

    It is 2 where the user has to fix something (InputError, a full disk), and 1 where an exception ended the work
    (RunError). It is 128 + n where signal n ended the job: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal.
    A job ended by a signal has at most UNWIND_S seconds for its way out. The process takes no further signals, so this
    is for its main thread and its whole life.
    """
    global _JOB
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        signals.remove(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(_WAKE, _interrupt)
    job = _JOB = _Job(signals)
    threading.Thread(target=job.watch, name="medlora-signals", daemon=True).start()
    code = 2
    try:
        try:
            code = work()
        finally:
            job.works = False
    except InputError as error:  # the one place where a job's messages and their exit code are made
        if not job.signum:
            print(f"medlora: {error}", file=sys.stderr)
    except RunError as error:
        code = 1
        if not job.signum:
            print(f"medlora: {error}", file=sys.stderr)
    except BaseException as error:
        job.works = False
        if not job.signum:
            explained = explain(error)
            if explained is None:
                raise
            print(f"medlora: {explained}", file=sys.stderr)
    if not job.signum:
        job.done = True
        return code
    job.reported.wait()
    sys.stdout.flush()
    # Not by way of the interpreter's end: threads that still talk to Ray would meet one that has shut down, which exits with 1.
    end_process(job.code)


def describe_progress(describe: Callable[[], str], log: Path) -> None:
    """From here on `describe` reports what is saved and how to resume if a signal ends the job; `log` is the job's."""
    if _JOB:
        _JOB.describe, _JOB.log = describe, log


@contextmanager
def saving(ask: Callable[[], None], grace_s: float) -> Iterator[threading.Event]:
    """While inside, SIGTERM calls `ask` and waits up to `grace_s` seconds for the event that all is saved.

    It is set at first: who begins something that would be lost clears it. Code that leaves the block after a signal
    must call `check` before anything else is begun.
    """
    saver = _Saver(ask, grace_s)
    saver.saved.set()
    if _JOB:
        _JOB.savers.append(saver)
    try:
        yield saver.saved
    finally:
        saver.saved.set()
        if _JOB:
            _JOB.savers.remove(saver)


def is_ending() -> bool:
    """Whether a signal has come that ends this job."""
    return _JOB is not None and _JOB.signum != 0


def check() -> None:
    """Raise KeyboardInterrupt where a signal ends this job."""
    if is_ending():
        raise KeyboardInterrupt


def fail(text: str) -> None:
    """End the job with a message and code 2 from any thread, even if the main one hangs; outside a job do nothing."""
    if _JOB and not _JOB.signum:
        _JOB.print_line(text)
        end_process(2)


def end_process(code: int) -> NoReturn:
    """End this process and all that it started, at once."""
    end_children()
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(code)


def end_children() -> None:
    """Kill every process that this one started, and theirs."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _interrupt(signum: int, frame: object) -> None:
    if _JOB and _JOB.works:
        raise KeyboardInterrupt


def _ask(saver: _Saver) -> None:
    try:
        saver.ask()
    except Exception:  # who cannot be asked has nothing to save
        saver.saved.set()


def _find_stop_limit() -> float:
    """Seconds until SIGKILL follows; known for jobs that were submitted to Ray alone."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return float("inf")
    return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or 3)
