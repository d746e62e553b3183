"""A run that signals end, one after another, its driver's and its worker's, resumes to the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from medlora.evaluation.ledger import LEDGER, read_ledger
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from medlora.sweep.ledger import Ledger
from tests.support import ROOT
from tests.support.curriculum import (
    JOB,
    finish,
    last_step,
    one_phase,
    start,
    wait_for_step,
    wait_to_recover,
    worker_pid,
    write_config,
)
from tests.support.sweeps import start as start_sweep
from tests.support.sweeps import write_sweep
from tests.support.tiny_run import run_all, weights


def find_checkpoints(run: Path) -> list[int]:
    manifests = RunFolder(run).phase("00").checkpoints.glob("normal/checkpoint-*/manifest.json")
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in manifests)


def end(driver: subprocess.Popen[str], signum: int, most_s: float) -> str:
    """End a driver by a signal; the one line that it says."""
    began = time.monotonic()
    driver.send_signal(signum)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signum and time.monotonic() - began < most_s
    assert err.startswith("medlora: ended by ") and err.count("\n") == 1, err
    return err


def test_signals_to_worker_and_driver_make_checkpoints_that_resume_to_the_same_bytes(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    config = one_phase(bases, data, 300, every=300)  # so every checkpoint before the end is a signal's
    written, run = write_config(config, tmp_path / "c.yaml"), tmp_path / "run"

    job = ("ray", "job", "submit", "--address", cluster["DASHBOARD"], "--submission-id", "stopped", "--")
    asked = subprocess.Popen(
        [*job, "env", "-C", str(ROOT), *JOB, "--config", str(written), "--run-dir", str(run)],
        env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_step(run, "00", 10, asked)
    pid = worker_pid(run, "00")
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    wait_to_recover(run, "00", pid, last_step(run, "00"), asked, "SIGTERM to a worker")
    (first,) = find_checkpoints(run)
    wait_for_step(run, "00", first + 10, asked)
    stop = ["ray", "job", "stop", "--address", cluster["DASHBOARD"], "stopped"]
    subprocess.run(stop, env=cluster, cwd=ROOT, check=True, capture_output=True)
    out, _ = asked.communicate(timeout=60)
    _, second = find_checkpoints(run)
    said = f"medlora: ended by SIGTERM; no phase is finished; the same command resumes phase 00 from step {second}"
    assert second > first and said in out
    assert "Traceback" not in out and "*** SIGTERM" not in out and "@     0x" not in out
    said = (run / "run.log").read_text()
    assert "its process got SIGTERM: resumes from the checkpoint just made" in said and "died" not in said

    driver = start(written, run, cluster)
    wait_for_step(run, "00", second + 10, driver)
    assert f"from step {second}" in end(driver, signal.SIGINT, 5)
    assert find_checkpoints(run) == [first, second]

    out, err = finish(start(written, run, cluster))
    assert [int(step) for step in re.findall(r"resumes from step (\d+) of 300", out)] == [second] and err == ""
    steps = [row["step"] for row in read_json_lines(RunFolder(run).phase("00").metrics)]
    assert steps == list(range(1, 301))
    run_all(config, tmp_path / "undisturbed", ("00",))
    assert weights(run, "00") == weights(tmp_path / "undisturbed", "00")


def test_a_sweep_s_trials_make_checkpoints_and_resume(
    cluster: dict[str, str], bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    """One trial after another in one process; SIGTERM goes to the driver itself."""
    steps = {"max_steps": 150, "checkpoint_every_steps": 150, "log_every_steps": 1}
    more = {"search": "grid", "trials": 2, "start": str(finished), "dev": {"every_steps": 150}, "best": 1}
    more |= {"concurrency": 1}
    config = write_sweep(tmp_path, bases, data, {"lora.r": [2, 4]}, steps, **more)
    out = tmp_path / "sweep"
    trial = RunFolder(out / "trials" / "000").phase("02")

    driver = start_sweep(config, out, cluster)
    while len(read_json_lines(trial.metrics)) < 20:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    err = end(driver, signal.SIGTERM, 25)
    assert "; 0 of 1 trials are over; the same command resumes the others" in err
    assert list(trial.checkpoints.glob("normal/checkpoint-*/manifest.json"))

    said, err = finish(start_sweep(config, out, cluster))
    assert "resumes from step" in (out / "trials" / "000" / "phases" / "02" / "phase.log").read_text() and err == ""
    known = Ledger(out / "trials.jsonl").trials
    assert len(known) == 2 and all(each.state == "finished" and each.deaths == 0 for each in known.values())


def test_an_evaluation_keeps_its_answers(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    evaluation = {"tests": [{"name": "mcq", "source": str(data / "mcq.jsonl")}], "scoring": "generate", "batch_size": 1}
    evaluation |= {"max_tokens": 50}
    config = {"name": "e", "base": {"model": bases["gemma"]}, "stages": [{"name": "base"}], "evaluation": evaluation}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "jobs/evaluate_mcq.py", "--config", str(tmp_path / "e.yaml"), "--out", str(out)]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    job = begin()
    while len(read_ledger(out / LEDGER, ["base"])) < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    err = end(job, signal.SIGINT, 5)
    saved = len(read_ledger(out / LEDGER, ["base"]))
    assert f"; {saved} answers are saved; the same command asks the rest" in err and 2 <= saved < 24
    said, err = finish(begin())
    assert f"{saved} of 24 questions are answered already" in said and err == ""
