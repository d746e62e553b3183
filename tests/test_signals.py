"""A run that signals end, one after another, its driver's and its worker's, resumes to the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from test_nodes import one_phase
from test_on_ray import JOB, ROOT, finish, last_step, start, wait_for_step, wait_to_recover, worker_pid, write_config
from tiny_run import run_all, weights

from medlora import runs


def find_checkpoints(run: Path) -> list[int]:
    manifests = runs.RunFolder(run).phase("00").checkpoints.glob("normal/checkpoint-*/manifest.json")
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
    config = one_phase(bases, data, 600, every=600)  # so every checkpoint before the end is a signal's
    written, run = write_config(config, tmp_path / "c.yaml"), tmp_path / "run"

    driver = start(written, run, cluster)
    wait_for_step(run, "00", 10, driver)
    pid = worker_pid(run, "00")
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    wait_to_recover(run, "00", pid, last_step(run, "00"), driver, "SIGTERM to a worker")
    (first,) = find_checkpoints(run)
    wait_for_step(run, "00", first + 10, driver)
    err = end(driver, signal.SIGTERM, 25)
    _, second = find_checkpoints(run)
    assert second > first and f"no phase is finished; the same command resumes phase 00 from step {second}" in err
    said = (run / "run.log").read_text()
    assert "its process got SIGTERM: goes on from the checkpoint just made" in said and "died" not in said

    driver = start(written, run, cluster)
    wait_for_step(run, "00", second + 10, driver)
    assert f"from step {second}" in end(driver, signal.SIGINT, 5)
    assert find_checkpoints(run) == [first, second]

    job = ("ray", "job", "submit", "--address", cluster["DASHBOARD"], "--submission-id", "stopped", "--")
    asked = subprocess.Popen(
        [*job, "env", "-C", str(ROOT), *JOB, "--config", str(written), "--run-dir", str(run)],
        env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while (run / "run.log").read_text().count(f"goes on from step {second}") < 2:  # else the old steps are counted
        assert asked.poll() is None, asked.communicate()
        time.sleep(0.1)
    wait_for_step(run, "00", second + 20, asked)
    stop = ["ray", "job", "stop", "--address", cluster["DASHBOARD"], "stopped"]
    subprocess.run(stop, env=cluster, cwd=ROOT, check=True, capture_output=True)
    out, _ = asked.communicate(timeout=60)
    third = find_checkpoints(run)[-1]
    assert (
        third > second
        and f"medlora: ended by SIGTERM; no phase is finished; the same command resumes phase 00 from step {third}"
        in out
    )
    assert "Traceback" not in out and "*** SIGTERM" not in out and "@     0x" not in out

    out, err = finish(start(written, run, cluster))
    assert [int(step) for step in re.findall(r"goes on from step (\d+) of 600", out)] == [third] and err == ""
    steps = [row["step"] for row in runs.read_json_lines(runs.RunFolder(run).phase("00").metrics)]
    assert steps == list(range(1, 601))
    run_all(config, tmp_path / "undisturbed", ("00",))
    assert weights(run, "00") == weights(tmp_path / "undisturbed", "00")
