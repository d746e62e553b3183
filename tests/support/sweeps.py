"""Sweeps on tiny data, started as users do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT


def write_sweep(
    folder: Path, bases: dict[str, str], data: Path, space: dict[str, Any], p02: dict[str, Any], **more: Any
) -> Path:
    """A sweep of tests/support/tiny_run.py's run, whose test is of questions that it does not train on."""
    from tests.support.tiny_run import configure, question

    folder.mkdir(exist_ok=True)
    test = "".join(json.dumps(question(i), ensure_ascii=False) + "\n" for i in range(200, 206))
    (folder / "test.jsonl").write_text(test, encoding="utf-8")
    config = configure(bases["gemma"], data, p02=p02).model_dump(mode="json")
    config["evaluation"] = {"tests": [{"name": "t", "source": str(folder / "test.jsonl")}], "scoring": "letter"}
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    sweep = {"name": "s", "config": str(folder / "run.yaml"), "space": space, **more}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return folder / "sweep.yaml"


def start(config: Path, out: Path | str, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/sweep.py", "--config", str(config), "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
