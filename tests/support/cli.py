"""Run the jobs as users do, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT

QUESTION = {"id": "q1", "question": "Q?", "A": "a", "B": "b", "answer": 1}


def run(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The job in a process of its own, which says at its end whether torch or ray came along."""
    code = f"import sys, runpy; sys.argv = {['x', *arguments]!r}\ntry: runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
    code += "finally: print('HEAVY', sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def write_run(tmp_path: Path, rows: list[Any], **changes: Any) -> Path:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    phase = {"name": "00", "chain": "new", "sources": [{"source": str(data)}]}
    config = {
        "name": "bad",
        "base": {"model": "miniature"},
        "phases": [phase],
        "storage": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
        **changes,
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
