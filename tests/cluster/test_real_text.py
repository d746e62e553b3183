"""The three phases on real files, from the shipped config to the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from medlora.runs.files import read_json
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import read_manifest
from tests.support import ROOT


def test_real_text_goes_from_config_to_table(
    cluster: dict[str, str], bases: dict[str, str], real_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(real_data)
    config = ["--config", str(ROOT / "configs" / "real-text.yaml"), "--run-dir", str(tmp_path / "run")]
    few = [
        f"--set={key}"
        for key in ("phase_defaults.max_steps=3", "evaluation.tests.0.limit=16", f"base.model={bases['gemma']}")
    ]
    command = [sys.executable, str(ROOT / "jobs" / "curriculum.py"), *config, *few]
    done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "real-text" not in done.stderr and "kormedmcqa" in done.stdout and "95 % interval" in done.stdout
    run = RunFolder(tmp_path / "run")
    counts = {name: (read_manifest(run.phase(name).root) or {})["counts"]["normal"] for name in ("00", "01", "02")}
    read = {
        name: {key.partition(":")[2]: part["examples"] for key, part in parts.items()} for name, parts in counts.items()
    }
    text, pairs, questions = (
        "data/covid19_cdc.ko",
        "data/covid19_cdc.en|data/covid19_cdc.ko",
        "data/kormedmcqa/train.jsonl",
    )
    # 2 of the 909 questions are asked in dev or test, too: two questions each on one case.
    assert read == {"00": {text: 258}, "01": {pairs: 516, questions: 907, text: 258}, "02": {questions: 907}}
    rows = read_json(run.evaluation / "report.json")["stages"]
    assert [(row["stage"], row["n"]) for row in rows] == [("base", 16), ("00", 16), ("01", 16), ("02", 16)]
