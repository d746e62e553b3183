"""The command lines: what is wrong is said in one message with exit code 2, before torch or Ray is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import QUESTION, run, write_run


@pytest.mark.parametrize("job", ["curriculum", "evaluate_mcq", "sweep"])
def test_help_is_light(job: str) -> None:
    done = run(job, "--help")
    assert done.returncode == 0 and "--set KEY=VALUE" in done.stdout and done.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([QUESTION], {"sede": 1}, "sede: unknown key; did you mean 'seed'?"),
        ([QUESTION], {"base": {"model": "./nowhere"}}, "base.model: there is no folder ./nowhere"),
        ([QUESTION, {**QUESTION, "id": "q2", "answer": 3}], {}, "rows.jsonl:2: answer 3 is outside 1..2"),
        ([QUESTION, QUESTION], {}, "rows.jsonl:2: id 'q1' is at"),
        ([{**QUESTION, "question": ""}], {}, "rows.jsonl:1: `question` is empty"),
        ([{k: v for k, v in QUESTION.items() if k != "B"}], {}, "nearest: letters, without B"),
        ([], {}, "rows.jsonl: the file is empty"),
        ([{"stem": "x"}], {}, "rows.jsonl:1: unknown schema (columns stem)"),
        ([QUESTION], {"name": "../out"}, "name: must be a name of letters"),
        ([QUESTION], {"start": ["nowhere"]}, "start.0: "),
        (
            [QUESTION],
            {"base": {"model": "miniature", "extra_tokens": ["x"]}},
            "base.extra_tokens: no phase trains them",
        ),
    ],
)
def test_bad_input_ends_with_code_2_and_one_message(
    tmp_path: Path, rows: list[Any], changes: dict[str, Any], said: str
) -> None:
    done = run("curriculum", "--config", str(write_run(tmp_path, rows, **changes)))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.startswith("medlora: ") and "Traceback" not in done.stderr
    assert done.stdout == "HEAVY []\n"
    # There is no run's folder, or nothing in it but the rows that are wrong, for the user to look at.
    if "all of them: " in done.stderr:
        left = {path.name for path in (tmp_path / "runs").glob("*/*")}
        assert {"quarantine.jsonl"} <= left <= {"quarantine.jsonl", "run.json", "lock", "lock.json", "run.log"}
    else:
        assert not (tmp_path / "runs").exists()


def test_a_hub_model_without_a_hub_is_said(tmp_path: Path) -> None:
    done = run("curriculum", "--config", str(write_run(tmp_path, [QUESTION], base={"model": "medlora-tests/none"})))
    assert (
        done.returncode == 2
        and "medlora-tests/none is no folder here" in done.stderr
        and "--set base.model=" in done.stderr
    )


def test_an_evaluation_without_its_run_is_refused(tmp_path: Path) -> None:
    done = run("evaluate_mcq", "--set", f"stages=['{tmp_path}/none:base']", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "names no run; write FOLDER:STAGE" in done.stderr
    assert done.stdout == "HEAVY []\n" and not (tmp_path / "out").exists()
