"""The benchmark of a GPU runs here with a tiny shape, so that it is ready where one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_script_of_a_gpu_runs_on_cpu_within_its_budget(real_data: Path) -> None:
    command = [sys.executable, "benchmarks/training.py", "--cuda", "--seconds", "60", "--data", str(real_data)]
    env = {**os.environ, "DEV": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours = {line["work"]: line for line in lines if line.get("who") == "medlora, default"}
    assert len(ours) == 5
    for line in lines:
        if "first_loss" in line and "dropout" not in line["who"]:
            assert line["first_loss"] == pytest.approx(ours[line["work"]]["first_loss"], rel=1e-3), line
    assert done.stdout.rstrip().splitlines()[-1].startswith("| ")
