"""`medlora.load_results`: frames of a run, an evaluation, a sweep and a comparison that exist."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import medlora
from medlora.errors import InputError
from tests.support import ROOT

ARCHIVE = ROOT / "tests" / "fixtures" / "before_the_move" / "before_the_move.tar.xz"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, an evaluation and a sweep, in the working folder: their configs have relative paths."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_has_predictions_with_their_questions(before: Path) -> None:
    results = medlora.load_results("runs/tiny")
    report = json.loads((before / "runs/tiny/evaluation/report.json").read_text(encoding="utf-8"))
    right = results.predictions.groupby(["stage", "test"])["correct"].sum()
    assert {(row["stage"], row["test"]): row["correct"] for row in report["stages"]} == right.to_dict()
    asked = {row["id"]: row for row in map(json.loads, (before / "data/test.jsonl").read_text("utf-8").splitlines())}
    for row in results.predictions.itertuples():
        assert row.question == asked[row.id]["question"] and row.option_texts[0] == asked[row.id]["A"]
    assert list(results.phases["phase"])[:2] == ["00", "01"] and (results.phases["steps"] > 0).all()
    assert results.phases["chain"].iloc[0] == "00"
    assert set(results.metrics["phase"]) >= set(results.phases["phase"]) and results.metrics["loss"].notna().all()
    assert results.trials.empty


def test_texts_of_another_source_are_not_shown(before: Path) -> None:
    path = before / "data/test.jsonl"
    path.write_text(path.read_text("utf-8").replace('"question": "', '"question": "other '), encoding="utf-8")
    changed = medlora.load_results(before / "runs/tiny").predictions
    path.unlink()
    absent = medlora.load_results(before / "runs/tiny").predictions
    for found in (changed, absent):
        assert len(found) and found["question"].isna().all() and found["correct"].notna().all()


def test_evaluations_and_sweeps_are_read(before: Path) -> None:
    evaluation = medlora.load_results("evaluations/finished")
    assert len(evaluation.predictions) and evaluation.predictions["question"].notna().all() and evaluation.phases.empty
    (table,) = before.glob("sweeps/*/trials.parquet")
    sweep = medlora.load_results(table.parent)
    assert len(sweep.trials) and "trial" in sweep.trials.columns


def test_a_comparison_is_read(tmp_path: Path) -> None:
    from medlora.cli.compare import main

    log = tmp_path / "one.csv"
    log.write_text("id,category,trial,answer,pred,response\nd_0,d,0,A,A,A\n", encoding="utf-8")
    assert main([str(log), "--out", str(tmp_path / "out")]) == 0
    found = medlora.load_results(tmp_path / "out").predictions
    assert list(found["correct"]) == [True] and found["question"].isna().all()


def test_wrong_folders_and_a_missing_pandas_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is no folder of a run, an evaluation or a sweep"):
        medlora.load_results(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="load_results needs pandas: pip install pandas"):
        medlora.load_results(tmp_path)


def test_importing_medlora_brings_no_pandas() -> None:
    code = "import sys, medlora, medlora.evaluation.results; print(sorted({'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_json_is_alone_on_stdout(command: str, before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medlora.cli.main import import_module

    log = before / "one.csv"
    log.write_text("id,category,trial,answer,pred,response\nd_0,d,0,A,A,A\n", encoding="utf-8")
    arguments = {
        "evaluate": ["--config", "evaluate.yaml", "--out", "evaluations/finished"],
        "compare": [str(log), "--out", "compared"],
    }
    assert import_module(f"medlora.cli.{command}").main([*arguments[command], "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["stages"] and "accuracy" in shown.err
