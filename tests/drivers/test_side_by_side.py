"""Several curricula with one command: side by side, told apart, none of them harmed by another."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medlora.config.run import RunConfig
from medlora.reporting.progress import Display
from medlora.reporting.tables import print_reports
from medlora.runs.manifests import read_manifest
from tests.support import ROOT
from tests.support.cli import QUESTION, run, write_run
from tests.support.curriculum import JOB, finish, write_config
from tests.support.tiny_run import configure, question, weights


def test_runs_side_by_side_end_as_each_would_alone_and_a_failing_one_fails_alone(
    cluster: dict[str, str], bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(question(i)) + "\n" for i in range(1000, 1012)), encoding="utf-8")
    evaluation = {"tests": [{"name": "t", "source": str(test)}]}
    diverging = {"learning_rate": 1e30, "warmup_ratio": 0.0}
    changes: dict[str, dict[str, Any]] = {"a": {}, "b": {"seed": 1}, "c": {"p00": diverging}}
    command = list(JOB)
    for name, change in changes.items():
        config = configure(bases["gemma"], data, **change).model_dump(mode="json")
        config |= {"name": name, "phases": config["phases"][:1], "evaluation": evaluation}
        config["storage"]["folder"] = str(tmp_path / "runs")
        command += ["--config", str(write_config(RunConfig.model_validate(config), tmp_path / f"{name}.yaml"))]
    job = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = finish(job, code=2)
    assert "c  run  ends here, the others continue" in out
    assert re.match("medlora: c: phase 00, step .: the loss is ", err) and "Traceback" not in err
    assert weights(tmp_path / "runs" / "a", "00") == weights(finished, "00") != weights(tmp_path / "runs" / "b", "00")
    table = [line for line in out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == ["a", "a", "b", "b"] and out.count("┏") == 1
    for name in "ab":
        log = (tmp_path / "runs" / name / "run.log").read_text()
        assert "00  done in" in log and "evaluation  done in" in log
        assert read_manifest(tmp_path / "runs" / name / "evaluation")


def test_one_bad_config_ends_all_before_anything_starts(tmp_path: Path) -> None:
    good = write_run(tmp_path, [QUESTION])
    (tmp_path / "bad").mkdir()
    bad = write_run(tmp_path / "bad", [QUESTION], sede=1)
    done = run("curriculum", "--config", str(good), "--config", str(bad))
    assert "sede: unknown key" in done.stderr and done.stdout == "HEAVY []\n" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--run-dir", "x"], "--run-dir and --redo are for one run"),
        (["--redo", "00"], "--run-dir and --redo are for one run"),
        ([], "runs side by side need names that differ, found bad, bad"),
    ],
)
def test_what_is_of_one_run_is_not_for_several(tmp_path: Path, more: list[str], said: str) -> None:
    config = str(write_run(tmp_path, [QUESTION]))
    done = run("curriculum", "--config", config, "--config", config, *more)
    assert said in done.stderr and "Traceback" not in done.stderr


def test_one_display_tells_runs_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(Console(width=120, highlight=False)) as first:
        for name in ("4b", "27b"):
            display = Display(name=name, beside=first)
            display.show({"event": "phase", "phase": "00", "device": "L4"})
            assert display.progress is first.progress
    row = {"stage": "base", "test": "t", "accuracy": 0.5, "interval": (0.1, 0.9), "n": 4, "failed": 0}
    print_reports({"4b": {"stages": [row]}, "27b": {"stages": [row], "seconds": 3}, "none": None}, True)
    out = capsys.readouterr().out
    assert out.startswith("4b  00  on L4\n27b  00  on L4\n")
    assert "│ 4b  │ base" in out and "│ 27b │ base" in out and "27b: evaluation: 3 s" in out
