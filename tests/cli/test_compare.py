from __future__ import annotations

import json
from pathlib import Path

import pytest

from medlora.cli.compare import main

HEADER = "id,category,trial,answer,pred,response\n"


def write_log(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.csv"
    path.write_text(HEADER + text, encoding="utf-8")
    return str(path)


def test_logs_are_paired_question_by_question_and_gaps_are_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_log(tmp_path, "one", "d_0,d,0,A,A,A\nd_1,d,0,B,C,C\nd_2,d,0,C,C,C\nd_2,d,0,C,C,C\n")
    two = write_log(tmp_path, "two", "d_1,d,0,B,B,B\nd_0,d,0,A,A,A\n")
    assert main([one, two, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    rows = {row["stage"]: row for row in report["stages"]}
    assert [(rows[s]["correct"], rows[s]["n"], rows[s]["failed"]) for s in ("one", "two")] == [(2, 3, 0), (2, 3, 1)]
    (pair,) = report["comparisons"]
    assert [q[-1] for q in pair["gained"]] == ["d_1"] and [q[-1] for q in pair["lost"]] == ["d_2"]
    assert report["notes"] == ["one: 4 rows, 3 questions; 1 repeated rows", "two: 2 rows, 3 questions; 1 missing"]
    assert "beware: two: 2 rows, 3 questions; 1 missing" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "async function copy" in page  # medlora's own
    assert report["paired"] == ["d: 3 questions are paired across 2 stages"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(
            "figures",
            "predictions.parquet",
            "questions.html",
            "report.html",
            "report.json",
            "table.csv",
            "table.md",
            "table.tex",
        )
    ]


def test_answers_in_numbers_are_compared(tmp_path: Path) -> None:
    right = write_log(tmp_path, "right", "".join(f"d_{i},d,0,{i},{i},정답: {i}번\n" for i in range(1, 6)))
    wrong = write_log(tmp_path, "wrong", "".join(f"d_{i},d,0,{i},{i % 5 + 1}번,정답: {i}번\n" for i in range(1, 6)))
    assert main([right, wrong, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["correct"] for row in report["stages"]] == [5, 0]


def test_responses_are_read_anew_when_asked(tmp_path: Path) -> None:
    log = write_log(tmp_path, "one", "d_0,d,0,B,A,정답은 B입니다\n")
    right = []
    for name, more in (("stated", []), ("read", ["--reparse"])):
        assert main([log, "--out", str(tmp_path / name), *more]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        right.append(report["stages"][0]["correct"])
    assert right == [0, 1]


def test_what_is_wrong_is_said_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_log(tmp_path, "one", "d_0,d,0,A,A,A\n")
    other = write_log(tmp_path, "other", "d_0,d,0,B,A,A\n")
    (tmp_path / "there").mkdir()
    for logs, out, said in (
        ([one], "there", "is there already; name a new folder"),
        ([one, one], "new", "one: several files of that name"),
        ([one, other], "new", "question d_0 has gold B, expected was A"),
        ([str(tmp_path / "none.csv")], "new", "none.csv: is not there; give an evaluation's or a run's folder"),
    ):
        assert main([*logs, "--out", str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
