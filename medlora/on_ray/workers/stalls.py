"""Workers and actors from which no step comes: reported every minute with a stack, and ended if configured."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medlora import events, pulse
from medlora.config.placement import Placement
from medlora.events import Beat, OnEvent, WatchedProcess
from medlora.on_ray.inbox import Inbox

Found = TypeVar("Found")

NOTE_EVERY_S = 60.0
"""How often a process that stalls is reported."""


_STACK_S = 20.0
"""How long a stack may take to be read."""


_TASK_S = 90.0
"""How long the task that reads it may take, its process's start included."""


_SHOWN_FRAMES = 4


def find_beat_s(placement: Placement) -> float:
    """Seconds between two beats of a process that is watched."""
    return min(5.0, placement.stall_s / 4)


@contextmanager
def beating(inbox: Inbox, who: str, every_s: float) -> Iterator[None]:
    """While inside, a thread sends the driver what this process works at; SIGUSR2 writes the stacks of all threads."""
    ended = threading.Event()
    handle, stacks = tempfile.mkstemp(prefix="medlora-stacks-")
    Path(stacks).unlink()  # it is read by way of the process, and gone with it however that ends
    faulthandler.register(signal.SIGUSR2, file=handle, all_threads=True)
    about: WatchedProcess = {
        "event": "beat",
        "who": who,
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "node": ray.get_runtime_context().get_node_id(),
        "host": socket.gethostname(),
        "stacks": f"/proc/{os.getpid()}/fd/{handle}",
    }

    def send(last: bool = False) -> None:
        now = pulse.read()
        beat: Beat = {**about, "count": now.count, "doing": now.doing, "slow": now.slow, "thread": now.thread}
        inbox.put({**beat, "count": -1, "doing": "", "slow": False} if last else beat)

    def send_all() -> None:
        with suppress(Exception):  # without a driver there is nobody to report to
            while not ended.wait(every_s):
                send()
            send(last=True)

    pulse.begin("has started")
    with suppress(ray.exceptions.RayError):  # as above
        send()  # arrives before the work begins, so that the driver sees a process that hangs in its first second, too
    thread = threading.Thread(target=send_all, name="medlora-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        pulse.begin("")
        ended.set()
        thread.join(timeout=2)
        faulthandler.unregister(signal.SIGUSR2)
        os.close(handle)


@dataclass
class _Watched:
    about: Beat
    moved: float
    """When its work moved last, by the driver's clock."""
    reported: float = -1e9


@dataclass
class StallWatch:
    """What the driver knows of the processes of one phase, evaluation or search; `receive` takes their beats."""

    placement: Placement
    phase: str
    on_event: OnEvent
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("medlora.run"))
    look: Callable[[Beat], dict[str, str] | None] | None = None
    """Reads state and stacks of a process where it runs; unset = by a task on its node."""
    end: Callable[[Beat], None] | None = None
    """Ends it there."""
    known: dict[tuple[str, int], _Watched] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def receive(self, event: Beat) -> None:
        """Take a beat; silence and a beat without progress are the same."""
        key = (event["node"], event["pid"])
        with self.lock:
            before = self.known.get(key)
            if not event["doing"]:
                self.known.pop(key, None)
            elif before is None or before.about["count"] != event["count"]:
                self.known[key] = _Watched(event, time.monotonic())

    def forget(self) -> None:
        """Before another attempt: the processes of the last one are gone."""
        with self.lock:
            self.known.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, look at what is known every second or so."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, self.placement.stall_s / 4)):
                try:
                    self.check(time.monotonic())
                except Exception:  # the work continues without it
                    self.log.exception("looking for stalls failed")

        thread = threading.Thread(target=watch, name="medlora-stalls", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=1)

    def check(self, now: float) -> None:
        """Report and end what has not moved for too long."""
        with self.lock:
            stalled = [(key, each) for key, each in self.known.items() if now - each.moved > self.placement.stall_s]
        for key, each in stalled:
            silent_s, limit_s = now - each.moved, self.placement.stall_kill_s
            over = limit_s is not None and silent_s > limit_s
            if not over and now - each.reported < NOTE_EVERY_S:
                continue
            each.reported = now
            seen = (self.look or _look_there)(each.about)
            if seen is None:  # the process is gone, which whoever started it finds out
                self._drop(key)
                continue
            with self.lock:
                if self.known.get(key) is not each:  # it has moved since
                    continue
            self._report(each.about, silent_s, seen)
            if over:
                name = f"{each.about['who']} (process {each.about['pid']} on {each.about['host']})"
                self._note(f"{name} is ended after {silent_s:.0f} s without a step (placement.stall_kill_s)")
                (self.end or _end_there)(each.about)
                self._drop(key)

    def _drop(self, key: tuple[str, int]) -> None:
        with self.lock:
            self.known.pop(key, None)

    def _report(self, about: Beat, silent_s: float, seen: Mapping[str, str]) -> None:
        took = f"{silent_s / 60:.0f} min" if silent_s >= 120 else f"{silent_s:.0f} s"
        what = f"{about['who']} (process {about['pid']} on {about['host']})"
        if about["slow"]:
            text = f"{what} {about['doing']} for {took} now; steps come after that"
        else:
            text = f"no step from {what} for {took}; the last it reported: {about['doing']}"
        if seen.get("state") == "stopped":
            text += "; its process is stopped (SIGSTOP), kill -CONT resumes it"
        place = find_place(seen["stacks"], about["thread"])
        self._note(text + (f"; it is in {place}" if place else ""))
        self.log.warning("stacks of %s:\n%s", what, seen["stacks"])

    def _note(self, text: str) -> None:
        self.on_event(events.note(self.phase, text))


def find_place(stacks: str, thread: tuple[str, int, int]) -> str:
    """The innermost frames of a thread in the output of py-spy or faulthandler, the innermost first."""
    name, identity, native = thread
    marks = (f'"{name}"', f"0x{identity:016x}", f"0x{identity:x}", f"Thread {native} ")
    lines = iter(stacks.splitlines())
    for line in lines:
        if "hread" in line and any(mark in line or mark.lower() in line.lower() for mark in marks):
            frames = []
            for frame in lines:
                if not frame.startswith(" "):
                    break
                frames.append(" ".join(frame.split()))
            return " < ".join(frames[:_SHOWN_FRAMES])
    return ""


def look_at(about: Beat) -> dict[str, str] | None:
    """State and stacks of a process of this machine; None where it is gone.

    By py-spy, which needs nothing of the process; where that may not attach, the process is asked to write them itself.
    """
    process = _find(about)
    if process is None:
        return None
    stopped = process.status() == psutil.STATUS_STOPPED
    state = "stopped" if stopped else process.status()
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    why = "py-spy is not installed"
    if spy:
        command = [spy, "dump", "--pid", str(about["pid"]), *(["--nonblocking"] if stopped else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_STACK_S)
            if done.returncode == 0 and done.stdout.strip():
                return {"state": state, "stacks": done.stdout}
            why = f"py-spy: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        except subprocess.TimeoutExpired:
            why = f"py-spy did not end in {_STACK_S:.0f} s"
    written = "" if stopped else _ask(process, Path(about["stacks"]))
    return {"state": state, "stacks": written or f"no stack could be read ({why})"}


def _ask(process: psutil.Process, stacks: Path) -> str:
    """What faulthandler writes in the process at SIGUSR2; empty where it writes nothing."""
    if not stacks.is_file():  # its handler is gone with it, and the signal would end the process
        return ""
    before = stacks.stat().st_size
    process.send_signal(signal.SIGUSR2)
    end, size = time.monotonic() + 5, before
    while time.monotonic() < end:
        time.sleep(0.2)
        if size == (size := stacks.stat().st_size) and size > before:
            break
    return stacks.read_text(encoding="utf-8", errors="replace")[before:]


def kill_process(about: Beat) -> None:
    """Kill a process of this machine, if it is still the one."""
    process = _find(about)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _find(about: Beat) -> psutil.Process | None:
    try:
        process = psutil.Process(about["pid"])
        same = abs(process.create_time() - about["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None
    except psutil.NoSuchProcess:
        return None


def _run_there(work: Callable[[Beat], Found], about: Beat) -> Found:
    """Run on the node of a process, beside all that runs there."""
    strategy = NodeAffinitySchedulingStrategy(about["node"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(work).remote(about)
    found: Found = ray.get(task, timeout=_TASK_S)
    return found


def _look_there(about: Beat) -> dict[str, str] | None:
    try:
        return _run_there(look_at, about)
    except ray.exceptions.RayError as error:
        return {"state": "unknown", "stacks": f"no stack could be read: {error!r}"}


def _end_there(about: Beat) -> None:
    with suppress(ray.exceptions.RayError):
        _run_there(kill_process, about)
