"""A few of the faults of benchmarks/faults: at every file event of a driver's start, at some of a phase's end."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from bench import drive, hash_weights, is_one_message, is_whole, run_in_fork
from events import drive_with_fault, list_events, try_every_event
from injection import KILL, POWER, TEAR, Injector
from two_drivers import race

from medlora.curriculum.jobs import make_job
from medlora.drivers.curriculum import begin
from medlora.errors import InputError
from medlora.runs.environment import log_to
from medlora.runs.files import write_bytes, write_json
from medlora.runs.folders import PhaseFolder, open_run
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import check_files
from medlora.training.callbacks import CheckpointCallback
from medlora.training.phase import run_phase
from tests.support.tiny_run import configure


@pytest.fixture(scope="module")
def config(bases: dict[str, str], data: Path) -> Any:
    """One phase of two checkpoints."""
    made = configure(bases["gemma"], data, p00={"max_steps": 8, "checkpoint_every_steps": 4})
    return made.model_copy(update={"phases": made.phases[:1]})


def _start(config: Any, folder: Path, injector: Injector | None = None) -> None:
    if injector:
        injector.arm()
    run = open_run(folder)
    with hold_file_lock(run.lock, f"run {run.root}"), log_to((logging.getLogger("medlora.run"), run.log)):
        begin(config, run, None, lambda event: None)
    if injector:
        injector.on = False
        print("EVENTS", *(kind for kind, _ in injector.events))


@pytest.mark.parametrize(
    "fault", [KILL, *(pytest.param(each, marks=pytest.mark.slow) for each in (TEAR, errno.ENOSPC))]
)
def test_a_driver_may_fail_at_every_file_event_of_its_start(fault: str | int, config: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    _start(config, tmp_path / "warm")
    status, text = run_in_fork(lambda: _start(config, tmp_path / "dry", Injector(tmp_path / "dry", None)), log)
    kinds = text.rpartition("EVENTS ")[2].split()
    assert status == 0 and len(kinds) > 20 and "write" in kinds
    # Where nothing is written, a torn write is the death that is tried first.
    for at in [at for at, kind in enumerate(kinds, 1) if fault != TEAR or kind == "write"]:
        folder = tmp_path / str(at)
        first, text = run_in_fork(lambda: _start(config, folder, Injector(folder, at, fault)), log)  # noqa: B023
        right = first == 137 if isinstance(fault, str) else is_one_message(first, text)
        assert right, (at, first, text)
        _start(config, folder)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs fail as they are finished; holds one that did not."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def events(config: Any, scratch: Path) -> list[tuple[str, str]]:
    """The file events at the end of a phase."""
    return list_events(config, "commit", scratch)


@pytest.mark.parametrize("fault", [POWER, pytest.param("ENOSPC", marks=pytest.mark.slow)])
def test_a_phase_may_fail_as_it_is_finished(
    fault: str, config: Any, scratch: Path, events: list[tuple[str, str]]
) -> None:
    assert ("fsync", "adapter_model.safetensors") in events
    row = try_every_event(config, "commit", fault, scratch, every=len(events) // 4, events=events)
    assert row.wrong == [] and row.tried >= 4


def test_a_phase_dies_of_bad_writes_by_torch_with_one_message(config: Any, tmp_path: Path) -> None:
    events = list_events(config, "save", tmp_path)
    at = [kind for kind, _ in events].index("torch.save") + 1
    folder = tmp_path / "run"
    injector = Injector(folder, at, errno.EIO)
    status, text = run_in_fork(lambda: drive_with_fault(config, folder, "save", injector), tmp_path / "log")
    assert status == 2 and is_one_message(status, text) and "could not be written" in text, text
    status, text = run_in_fork(lambda: drive(config, folder), tmp_path / "log")
    assert status == 0 and is_whole(folder) and hash_weights(folder), text


def test_two_drivers_at_once_and_one_names_the_other(tmp_path: Path) -> None:
    assert race(tmp_path, 4, apart_ms=5, holds_s=1.0).wrong == []


def test_a_refused_driver_waits_for_the_name_of_a_holder_that_only_just_took_the_lock(tmp_path: Path) -> None:
    from filelock import FileLock

    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    write_json(tmp_path / "lock.json", {"pid": 2**22 + 1, "host": os.uname().nodename, "since": "long ago"})
    log = tmp_path / "log"
    code = "from pathlib import Path; from medlora.runs.locks import hold_file_lock\nwith hold_file_lock(Path(r'%s'), 'run x'): pass"
    import subprocess
    import sys
    import time

    other = subprocess.Popen([sys.executable, "-c", code % (tmp_path / "lock")], stderr=log.open("w"))
    time.sleep(2)
    assert other.poll() is None, log.read_text()
    write_json(tmp_path / "lock.json", {"pid": os.getpid(), "host": os.uname().nodename, "since": "2026-11-26"})
    other.wait(30)
    lock.release()
    assert f"run x is in use by process {os.getpid()} on {os.uname().nodename} since 2026-11-26" in log.read_text()


def test_temp_files_of_a_killed_process_are_swept_and_never_hashed(config: Any, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    write_bytes(run.root / ".run.json.4194305.tmp", b"{torn")
    assert open_run(run.root) == run  # no stranger
    _start(config, run.root)
    assert not list(run.root.glob(".*.tmp"))
    phase = run.phase("00")
    for name in (".fingerprint.json.4194305.tmp", "adapter/.adapter_config.json.4194305.tmp"):
        write_bytes(phase.root / name, b"{torn")
    manifest = run_phase(make_job(config, config.phases[0], ()), phase, lambda event: None)
    assert not [name for name in manifest["files"] if name.endswith(".tmp")]
    assert not list(phase.root.rglob("*.tmp")) and check_files(phase.root, manifest) is None


def test_a_users_file_is_a_stranger_still(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        open_run(tmp_path)


def test_a_checkpoint_is_sealed_after_its_lines_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), real(file))[1])
    phase = PhaseFolder(tmp_path / "00")
    checkpoint = phase.checkpoints / "normal" / "checkpoint-4"
    write_bytes(checkpoint / "optimizer.pt", b"1")
    phase.metrics.write_text("{}\n")
    synced.clear()
    state = type("State", (), {"global_step": 4, "is_world_process_zero": True})
    arguments = type("Arguments", (), {"output_dir": checkpoint.parent, "world_size": 1})
    CheckpointCallback(phase).on_save(arguments, state, None)  # type: ignore[arg-type]
    names = [Path(path).name for path in synced]
    sealed = next(i for i, name in enumerate(names) if name.startswith(".manifest.json."))
    assert {"metrics.jsonl", "optimizer.pt", "checkpoint-4", "normal"} <= set(names[:sealed])
    assert names[-1] == "checkpoint-4"  # the folder, once the manifest has its name
