"""The GPU's benchmark runs from end to end, on CPU with a tiny model: its figures mean nothing there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_every_row_of_the_gpu_s_benchmark_is_measured(real_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/evaluation.py", "--cuda", "--seconds", "400", "--out", str(tmp_path)]
    command += ["--data", str(real_data / "kormedmcqa"), "--quantization", "nf4"]
    environment = {**os.environ, "DEV": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "evaluation-cuda.json").read_text(encoding="utf-8"))
    assert not [row for row in rows if "error" in row]
    assert {row["what"] for row in rows} >= {"device", "letters", "generate", "reason", "generate, transformers"}
    expected = 2 + 3 * (2 + 2) + 2 + 1 + (3 if importlib.util.find_spec("lm_eval") else 1) + 1
    assert len(rows) == expected
    letters = [row for row in rows if row["what"] == "letters"]
    assert all(row["same"].startswith("4 of 4 choices") for row in letters)
    assert done.stdout.rstrip().endswith("|"), "the table is last"
