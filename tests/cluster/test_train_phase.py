"""Runs as a user starts them, on one real cluster with token authentication, on tiny random models."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from tests.support import ROOT
from tests.support.curriculum import (
    finish,
    last_step,
    start,
    two_phases,
    wait_for_step,
    wait_to_recover,
    worker_pid,
    write_config,
)
from tests.support.tiny_run import configure, run_all, weights

BIN = Path(sys.executable).parent


def test_runs_side_by_side_and_a_killed_driver_leave_the_same_bytes(
    cluster: dict[str, str], bases: dict[str, str], data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A killed worker is the canary's (tests/test_canary.py)."""
    whole = two_phases(bases, data)
    config, run = write_config(whole, tmp_path / "c.yaml"), tmp_path / "run"
    short = write_config(whole.model_copy(update={"phases": whole.phases[:1]}), tmp_path / "short.yaml")
    driver, beside = start(config, run, cluster), start(short, tmp_path / "beside", cluster)
    while not (run / "run.log").exists():
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    _, err = finish(start(config, run, cluster), code=2)
    assert f"is in use by process {driver.pid} on " in err
    wait_for_step(run, "01", 45, driver)
    worker = worker_pid(run, "01")
    driver.kill()
    driver.communicate()
    lost = last_step(run, "01")
    driver = start(config, run, cluster)
    wait_to_recover(run, "01", worker, lost, driver, "driver killed")
    out, _ = finish(driver)
    finish(beside)  # the other driver's death was none of its business
    assert weights(tmp_path / "beside", "00") == weights(undisturbed, "00")
    assert "00  is finished already and reused" in out and "01  resumes from step" in out
    for phase in ("00", "01"):
        assert weights(run, phase) == weights(undisturbed, phase)
    steps = [row["step"] for row in read_json_lines(RunFolder(run).phase("01").metrics)]
    assert steps == list(range(1, 151))
    assert not (run / ".ray").exists()

    out, err = finish(start(config, run, cluster))
    assert "everything is done already" in out and err == ""

    _, err = finish(start(config, run, cluster, "--set", "phases.01.learning_rate=5e-3"), code=2)
    assert "phases.01.learning_rate: was 0.01, now 0.005" in err and "--redo 01" in err and "Traceback" not in err
    before = weights(run, "01")
    finish(
        start(
            config,
            run,
            cluster,
            "--set",
            "phases.01.learning_rate=5e-3",
            "--set",
            "phases.01.max_steps=4",
            "--redo",
            "01",
        )
    )
    kept = run / "phases" / ".replaced" / "01-1" / "adapter" / "adapter_model.safetensors"
    assert kept.read_bytes() == before != weights(run, "01")
    assert weights(run, "00") == weights(undisturbed, "00")


def test_two_workers_learn_what_one_learns(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """One without Ray, the other two as a cluster's; with the same global batch."""
    curves = []
    for workers, accumulation in ((1, 2), (2, 1)):
        config = configure(
            bases["gemma"],
            data,
            lora={"r": 4, "alpha": 8},
            p00={"accumulation": accumulation, "max_steps": 8, "log_every_steps": 1},
        )
        config = config.model_copy(update={"phases": config.phases[:1]})
        run = tmp_path / str(workers)
        if workers == 1:
            run_all(config, run)
        else:
            written = write_config(config, tmp_path / f"{workers}.yaml")
            finish(start(written, run, cluster, "--set", f"placement.workers={workers}"))
        curves.append([(row["loss"], row["grad_norm"]) for row in read_json_lines(RunFolder(run).phase("00").metrics)])
    assert len(curves[0]) == 8
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["placement.gpus_per_worker=1"], "1 workers x 1 GPUs = 1 GPUs asked; the cluster has 1 node, 2 CPUs, 0 GPUs"),
        (["placement.cpus_per_worker=64"], "1 workers x 64 CPUs = 64 CPUs asked; the cluster has 1 node, 2 CPUs"),
        (["placement.label_selector={zone: moon}"], "placement.label_selector: no node has {'zone': 'moon'}"),
        (
            ["base.quantization=int8", "lora.dora=true"],
            "phases.01: lora.dora on an int8 base needs a GPU, and placement has",
        ),
    ],
)
def test_what_the_cluster_cannot_do_is_said_and_ends_with_code_2(
    cluster: dict[str, str],
    bases: dict[str, str],
    data: Path,
    finished: Path,
    tmp_path: Path,
    settings: list[str],
    said: str,
) -> None:
    only_questions = {
        "chain": "new",
        "train_extra_tokens": True,
        "sources": [{"source": str(data / "mcq.jsonl")}],
        "replay": [],
    }
    config = configure(bases["gemma"], data, p01=only_questions)
    config = config.model_copy(update={"phases": config.phases[1:2]})
    changes = [word for setting in settings for word in ("--set", setting)]
    _, err = finish(start(write_config(config, tmp_path / "c.yaml"), tmp_path / "run", cluster, *changes), code=2)
    assert said in err and "Traceback" not in err


def test_stages_are_evaluated_as_a_job_and_only_once(
    cluster: dict[str, str], bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    adapters = {name: str(finished / "phases" / name / "adapter") for name in ("01", "02")}
    config = {
        "name": "tiny",
        "base": {"model": bases["gemma"]},
        "stages": [
            {"name": "base"},
            {"name": "01", "adapters": [adapters["01"]]},
            {"name": "02", "adapters": list(adapters.values())},
        ],
        "evaluation": {
            "tests": [{"name": "mcq", "source": str(data / "mcq.jsonl")}],
            "scoring": "letter",
            "batch_size": 5,
        },
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def evaluate(*more: str, code: int = 0) -> tuple[str, str]:
        command = [
            sys.executable,
            "jobs/evaluate_mcq.py",
            "--config",
            str(tmp_path / "e.yaml"),
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
        return finish(
            subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
            code,
        )

    out, err = evaluate()
    assert err == "" and all(f"│ {stage} " in out for stage in ("base", "01", "02")) and "24" in out
    before = (tmp_path / "out" / "predictions.parquet").read_bytes()
    out, err = evaluate()
    assert "everything is done already" in out and err == ""
    _, err = evaluate("--set", "evaluation.style=answer", code=2)
    assert "was trained with prompt style reasoning, not answer" in err and "Traceback" not in err
    _, err = evaluate("--set", "seed=1", code=2)
    assert "holds another evaluation" in err and "seed: was 0, now 1" in err
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == before
