"""Start, kill and watch curricula on a real cluster."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from medlora.config.run import RunConfig
from medlora.runs.files import read_json, read_json_lines
from medlora.runs.folders import RunFolder
from tests.support import ROOT
from tests.support.tiny_run import configure

JOB = [sys.executable, "jobs/curriculum.py"]


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return path


def start(config: Path, run: Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [*JOB, "--config", str(config), "--run-dir", str(run), *more]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def wait_for_step(run: Path, phase: str, step: int, process: subprocess.Popen[str]) -> None:
    metrics = RunFolder(run).phase(phase).metrics
    end = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_json_lines(metrics)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"phase {phase} does not come to step {step}"
        time.sleep(0.02)


def worker_pid(run: Path, phase: str) -> int:
    pid: int = read_json(run / "phases" / f".{phase}.lock.json")["pid"]
    return pid


def last_step(run: Path, phase: str) -> int:
    return max((row["step"] for row in read_json_lines(RunFolder(run).phase(phase).metrics)), default=0)


def wait_to_recover(run: Path, phase: str, pid: int, lost: int, process: subprocess.Popen[str], what: str) -> None:
    """Wait until another worker than `pid` is at the step that was reached when something was lost, and say how long."""
    began = time.monotonic()
    while worker_pid(run, phase) == pid or last_step(run, phase) < lost:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    print(f"{what} at step {lost}: step {lost} was reached again after {time.monotonic() - began:.0f} s")


def recover(
    run: Path, process: subprocess.Popen[str], phase: str, step: int, disturb: Callable[[], None], what: str
) -> int:
    """Disturb a run at that step or later and wait until it is there again; returns where it was disturbed."""
    wait_for_step(run, phase, step, process)
    pid = worker_pid(run, phase)
    disturb()
    time.sleep(0.1)
    lost = last_step(run, phase)
    wait_to_recover(run, phase, pid, lost, process, what)
    return lost


def two_phases(bases: dict[str, str], data: Path, **p01: Any) -> RunConfig:
    """00 in a few steps, then a 01 that is long enough to be killed in."""
    config = configure(
        bases["gemma"], data, p01={"max_steps": 150, "checkpoint_every_steps": 10, "log_every_steps": 1, **p01}
    )
    return config.model_copy(update={"phases": config.phases[:2]})


def one_phase(bases: dict[str, str], data: Path, steps: int, every: int = 20) -> RunConfig:
    config = configure(
        bases["gemma"], data, p00={"max_steps": steps, "checkpoint_every_steps": every, "log_every_steps": 1}
    )
    return config.model_copy(update={"phases": config.phases[:1]})
