"""Exceptions are told from deaths, and what stalls from what works; with plain values, then on a cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora import pulse
from medlora.config.placement import Placement
from medlora.errors import RunError
from medlora.runs.environment import log_to
from medlora.runs.folders import RunFolder
from tests.support.cluster import import_ray
from tests.support.tiny_run import configure

ray = import_ray()
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError  # noqa: E402
from ray.train.v2._internal.exceptions import (  # noqa: E402
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError  # noqa: E402

from medlora.on_ray import train_phase  # noqa: E402
from medlora.on_ray.train_phase import _find_deaths  # noqa: E402
from medlora.on_ray.workers import stalls  # noqa: E402
from medlora.on_ray.workers.failures import WorkerFailed, describe_exception, is_death, is_lost_peer  # noqa: E402
from medlora.on_ray.workers.stalls import StallWatch, find_place, look_at  # noqa: E402
from tests.support import fake_loops  # noqa: E402

LOST = WorkerFailed("RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer", lost_peer=True)
OWN = WorkerFailed("ValueError: a bug")


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("f", "traceback", cause)


@pytest.mark.parametrize(
    ("failures", "died"),
    [
        ({0: ValueError("a bug")}, ""),
        ({0: OWN}, ""),
        ({0: RuntimeError("shape mismatch")}, ""),
        ({0: SystemExit(1)}, ""),
        ({0: OSError(5, "Input/output error")}, ""),
        ({0: UserExceptionWithTraceback(KeyError("x"), "traceback")}, ""),
        ({0: WorkerHealthCheckFailedError("not pickled", task_error(TypeError("cannot pickle")))}, ""),
        ({0: task_error(ValueError("in a task"))}, ""),
        ({0: WorkerHealthCheckFailedError("failed", ActorDiedError())}, "worker 0 died"),
        ({1: WorkerHealthCheckTimeoutError("hangs")}, "worker 1 died"),
        ({0: ActorUnavailableError("gone", None), 2: NodeDiedError("node")}, "worker 0, 2 died"),
        ({0: task_error(ActorDiedError())}, "worker 0 died"),
        # The others of a group lose the one that died; they may be seen first.
        ({0: LOST, 1: WorkerHealthCheckFailedError("failed", ActorDiedError())}, "worker 1 died"),
        ({0: LOST, 2: LOST}, "worker 0, 2 lost the connection to another worker"),
        # An exception of one's own comes again, whoever dies of it.
        ({0: LOST, 1: OWN}, ""),
        ({0: OWN, 1: WorkerHealthCheckFailedError("failed", ActorDiedError())}, ""),
    ],
)
def test_only_what_ray_lost_is_a_death(failures: dict[int, Exception], died: str) -> None:
    assert _find_deaths(WorkerGroupError("text", failures)) == died


def test_a_controller_s_error_is_judged_by_its_cause() -> None:
    assert _find_deaths(ControllerError(ActorDiedError())) == "its workers could not be started"
    assert _find_deaths(ControllerError(ValueError("x"))) == ""
    assert not is_death(None)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1234, remote process exited"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("NCCL"), False),
    ],
)
def test_a_lost_connection_to_another_worker_is_known_by_its_text(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) == lost


def test_an_exception_is_described_with_the_innermost_place_outside_of_libraries() -> None:
    try:
        Placement.model_validate({"workers": 0})
    except Exception as error:
        found = describe_exception(error)
    assert found["text"].startswith("ValidationError: 1 validation error") and "\n" not in found["text"]
    try:
        find_place(None, ("", 0, 0))  # type: ignore[arg-type]
    except Exception as error:
        found = describe_exception(error)
    assert "in find_place" in found["at"] and found["at"].startswith("stalls.py:")
    assert "Traceback (most recent call last)" in found["traceback"]


# ------------------------------------------------------------------------------------------- stalls, with plain values


def beat(count: int, doing: str = "is in step 3 of 9", slow: bool = False, pid: int = 7) -> dict[str, Any]:
    about = {"event": "beat", "who": "worker 0", "pid": pid, "created": 1.0, "node": "n", "host": "h", "stacks": ""}
    return {**about, "count": count, "doing": doing, "slow": slow, "thread": ("Train", 255, 12)}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(stalls.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def make_watch(said: list[str], ended: list[int], **placement: float) -> StallWatch:
    stacks = 'Thread 12 (idle): "Train"\n    wait (threading.py:320)\n    step (training.py:9)\nThread 13: "Other"\n    x (y:1)'
    return StallWatch(
        Placement.model_validate({"stall_s": 100, **placement}),
        "01",
        lambda event: said.append(event["text"]),
        look=lambda about: {"state": "sleeping", "stacks": stacks},
        end=lambda about: ended.append(about["pid"]),
    )


def test_a_worker_without_a_step_is_reported_every_minute_and_one_that_moves_never(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    watch = make_watch(said, [])
    watch.receive(beat(1))
    with caplog.at_level(logging.WARNING):
        for second in range(1, 260):
            clock.now = 1000.0 + second
            watch.receive(beat(2 if second < 40 else 3, pid=7))
            watch.receive(beat(second, pid=8))
            watch.check(clock.now)
    assert len(said) == 2 and "Other" in caplog.text
    assert said[0] == (
        "no step from worker 0 (process 7 on h) for 101 s; the last it reported: is in step 3 of 9; it is in "
        "wait (threading.py:320) < step (training.py:9)"
    )
    watch.receive(beat(4))
    watch.check(clock.now + 50)
    assert len(said) == 2


def test_silence_counts_as_no_step_and_waiting_for_work_does_not(clock: Clock) -> None:
    said: list[str] = []
    watch = make_watch(said, [])
    watch.receive(beat(1, "loads the base model", slow=True))
    watch.receive(beat(1, "", pid=9))
    clock.now += 700
    watch.check(clock.now)
    assert [text.split("; it is in")[0] for text in said] == [
        "worker 0 (process 7 on h) loads the base model for 12 min now; steps come after that"
    ]
    watch.receive(beat(-1, ""))
    watch.check(clock.now + 500)
    assert len(said) == 1


def test_a_stall_is_ended_only_where_the_config_says_so_and_a_process_that_is_gone_is_forgotten(clock: Clock) -> None:
    said: list[str] = []
    ended: list[int] = []
    watch = make_watch(said, ended, stall_kill_s=300)
    watch.receive(beat(1))
    for second in range(1, 500):
        watch.check(clock.now + second)
    assert ended == [7] and said[-1].startswith("worker 0 (process 7 on h) is ended after 30")
    without = make_watch(said, ended)
    without.receive(beat(1))
    without.check(clock.now + 10_000)
    assert ended == [7] and without.known
    without.look = lambda about: None
    without.check(clock.now + 20_000)
    assert not without.known


def test_a_kill_before_the_report_is_refused() -> None:
    with pytest.raises(ValueError, match="stall_kill_s: 60 is less than stall_s: 600"):
        Placement(stall_kill_s=60)


def test_the_work_of_a_process_moves_with_every_beat() -> None:
    pulse.begin("is in step 1 of 2")
    first = pulse.read()
    pulse.beat()
    assert pulse.read().count == first.count + 1 and pulse.read().doing == "is in step 1 of 2"


CHILD = """
import faulthandler, signal, sys, tempfile, threading  # noqa: E402
file = tempfile.TemporaryFile()
faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
print(file.fileno(), threading.get_ident(), threading.get_native_id(), flush=True)
def lock_up():
    lock = threading.Lock(); lock.acquire(); lock.acquire()
lock_up()
"""


@pytest.fixture
def child() -> Any:
    import psutil

    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    handle, identity, native = map(int, process.stdout.readline().split())
    time.sleep(0.2)
    yield {
        "pid": process.pid,
        "created": psutil.Process(process.pid).create_time(),
        "stacks": f"/proc/{process.pid}/fd/{handle}",
        "thread": ("MainThread", identity, native),
    }
    process.kill()
    process.wait()


@pytest.mark.parametrize("spy", [True, False])
def test_the_stack_of_a_deadlock_is_read_by_py_spy_or_by_the_process_itself(
    child: dict[str, Any], monkeypatch: pytest.MonkeyPatch, spy: bool
) -> None:
    if not spy:
        monkeypatch.setattr(stalls.shutil, "which", lambda *_, **__: None)
    found = look_at(child)
    assert found is not None and "lock_up" in find_place(found["stacks"], child["thread"])


def test_the_stack_of_a_stopped_process_is_read_without_waking_it(child: dict[str, Any]) -> None:
    import psutil

    os.kill(child["pid"], signal.SIGSTOP)
    time.sleep(0.2)
    found = look_at(child)
    assert found is not None and found["state"] == "stopped" and "lock_up" in found["stacks"]
    assert psutil.Process(child["pid"]).status() == psutil.STATUS_STOPPED
    stalls.kill_process({**child, "created": child["created"] + 100})
    assert look_at(child) is not None  # another process of that number
    stalls.kill_process(child)
    time.sleep(0.3)
    assert look_at(child) is None


# ----------------------------------------------------------------------------------------------------- on a real cluster


def run_phase_of(
    loop: Callable[[dict[str, Any]], None],
    cluster: Any,
    bases: dict[str, str],
    data: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **placement: Any,
) -> tuple[str, list[str], dict[int, int]]:
    """What the phase ends with, what was said before, and how often each rank was tried."""
    from medlora.curriculum.jobs import make_job

    monkeypatch.setattr(train_phase, "_train_loop", loop)
    config = configure(bases["gemma"], data)
    said: list[str] = []
    run = RunFolder(folder)
    run.root.mkdir()
    with log_to((logging.getLogger("medlora.run"), run.log)), pytest.raises(RunError) as raised:
        train_phase.train_on_ray(
            make_job(config, config.phases[0], ()),
            run,
            Placement.model_validate(placement),
            cluster,
            lambda event: said.append(event.get("text", "")),
        )
    files = (run.root / "phases").glob("tries-*")
    return str(raised.value), said, {int(f.name[6:]): len(f.read_text().splitlines()) for f in files}


@pytest.mark.parametrize(
    ("loop", "text", "workers"),
    [
        (fake_loops.raise_awkward, "phase 00: Awkward: an awkward bug (worker 0 on ", 1),
        (fake_loops.raise_on_one_of_two, "phase 00: ValueError: a bug of rank 1 (worker 1 on ", 2),
    ],
)
def test_an_exception_of_a_phase_runs_once_and_is_named_in_one_line(
    ray_cluster: Any,
    bases: dict[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loop: Any,
    text: str,
    workers: int,
) -> None:
    folder = tmp_path / "run"
    said, _, tries = run_phase_of(loop, ray_cluster, bases, data, folder, monkeypatch, workers=workers)
    assert said.startswith(text) and "\n" not in said and f"{folder / 'run.log'}" in said
    assert tries == dict.fromkeys(range(workers), 1)
    assert "Traceback (most recent call last)" in (folder / "run.log").read_text()


def test_a_worker_that_dies_each_time_is_given_up_in_one_line(
    ray_cluster: Any, bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, notes, tries = run_phase_of(
        fake_loops.die_always, ray_cluster, bases, data, tmp_path / "run", monkeypatch, retries=1
    )
    assert said.startswith("phase 00: worker 0 died, after 1 retries (placement.retries)") and "\n" not in said
    assert tries == {0: 2} and any("worker 0 died; attempt 1 of 1" in note for note in notes)
    # What Ray knows about each death, also of those that are retried.
    assert (tmp_path / "run" / "run.log").read_text().count("phase 00: Training failed due to worker errors:") == 2


def test_a_stopped_worker_and_a_deadlock_are_reported_with_a_stack_and_retried(
    ray_cluster: Any, bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, notes, tries = run_phase_of(
        fake_loops.stall_twice,
        ray_cluster,
        bases,
        data,
        tmp_path / "run",
        monkeypatch,
        stall_s=4,
        stall_kill_s=8,
    )
    assert said.startswith("phase 00: ValueError: came this far") and tries == {0: 3}
    stalled = [note for note in notes if note.startswith("no step from worker 0 (process ")]
    # The worker stops before its work has sent a beat; on a busy machine one may go out all the same.
    stopped = re.compile(r"the last it reported: (has started|is in step 1 of 3); its process is stopped \(SIGSTOP\)")
    assert any(stopped.search(note) for note in stalled)
    assert any("is in step 2 of 3; it is in _lock_up (" in note and "fake_loops.py:" in note for note in stalled)
    assert sum("is ended after " in note for note in notes) == 2
    assert [note for note in notes if "worker 0 died; attempt" in note]
    assert "stacks of worker 0" in (tmp_path / "run" / "run.log").read_text()
