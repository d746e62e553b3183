"""Tables for a paper: the report's own figures, whatever its names hold."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medlora.evaluation.predictions import Prediction
from medlora.reporting.report import build_report
from medlora.reporting.results.paper import write_tables
from tests.support.predictions import TWO_TESTS, answer


def write(folder: Path, predictions: list[Prediction]) -> tuple[dict[str, Any], dict[str, str]]:
    report = build_report(predictions, {}, seed=0)
    write_tables(folder, report)
    return report, {kind: (folder / f"table.{kind}").read_text(encoding="utf-8") for kind in ("md", "tex", "csv")}


def test_the_csv_holds_the_figures_of_the_report(tmp_path: Path) -> None:
    report, texts = write(tmp_path, TWO_TESTS)
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert [(row["test"], row["stage"]) for row in rows] == [
        (test, stage) for test in ("one", "two", "all tests") for stage in ("base", "00")
    ]
    for row in report["stages"]:
        (line,) = [x for x in rows if (x["test"], x["stage"]) == (row["test"], row["stage"])]
        assert [float(line[key]) for key in ("accuracy", "low", "high")] == [row["accuracy"], *row["interval"]]
        assert [int(line[key]) for key in ("n", "correct", "unparsed", "failed")] == [
            row[key] for key in ("n", "correct", "unparsed", "failed")
        ]
    (pair,) = [p for p in report["comparisons"] if p["test"] == "two"]
    line = next(x for x in rows if (x["test"], x["stage"]) == ("two", "00"))
    assert (line["compared_with"], line["gained"], line["lost"]) == ("base", "6", "0")
    assert [float(line[f"difference{x}"]) for x in ("", "_low", "_high")] == [
        pair[x] for x in ("difference", "low", "high")
    ]


def test_markdown_and_latex_have_a_row_for_each_stage_and_test(tmp_path: Path) -> None:
    report, texts = write(tmp_path, TWO_TESTS)
    lines = [line for line in texts["md"].splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and {line.count("|") for line in lines} == {10}
    assert "| two | 00 | 8 | 100.0 | 67.6 to 100.0 | 25.0 | +75.0 |" in texts["md"]
    assert texts["tex"].count(r" \\") == 1 + 6 and texts["tex"].count("\\midrule") == 3
    assert report["verdict"].split(":")[0] in texts["md"] and "\\toprule" in texts["tex"]


@pytest.mark.parametrize("nasty", ["a_b & 50% #1 {x} $y$ \\end{table} ~^|", "<b>*x* `y` [z](w)", "줄\n바꿈"])
def test_names_stay_text_in_every_format(tmp_path: Path, nasty: str) -> None:
    _, texts = write(tmp_path, [replace(p, stage=p.stage + nasty, test=p.test + nasty) for p in TWO_TESTS])
    lines = [line for line in texts["md"].splitlines() if line.startswith("|")]
    assert len(lines) == 8 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert "<b>" not in texts["md"]
    body = texts["tex"].split("\\begin{tabular}")[1]
    assert texts["tex"].count("\\end{table}") == 1
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {8}
    parsed = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert [row["stage"] for row in parsed][:2] == ["base" + nasty, "00" + nasty]


def test_no_name_becomes_a_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    _, texts = write(tmp_path, [replace(p, stage="=1+1", test="@x") for p in answer("base", "one", "ABCDABCA")])
    assert "'=1+1" in texts["csv"] and "\n'@x" in texts["csv"]


def test_a_verdict_names_interval_and_n() -> None:
    better = build_report([p for p in TWO_TESTS if p.test == "two"], {}, seed=0)["verdict"]
    assert re.fullmatch(
        r"On test two, 00 is better than base: \+75\.0 points \(95 % interval \+\d+\.\d to \+100\.0, n = 8, p = 0\.031\)\.",
        better,
    )
    both = build_report(TWO_TESTS, {}, seed=0)["verdict"]
    assert both.startswith("On all tests together, 00 and base cannot be told apart: +37.5 points") and "n = 16" in both
    alone = build_report(answer("00", "one", "ABCDABCA"), {}, seed=0)["verdict"]
    assert alone.startswith("00 answers 87.5% of 8 questions right (95 % interval 52.9% to 97.8%; chance is 25.0%)")


def test_an_interval_always_has_a_width() -> None:
    same = [*answer("a", "t", "AAAA", gold="BBBB"), *answer("b", "t", "BBBB", gold="BBBB")]
    for predictions, sign in ((same, 1), ([*same[4:], *same[:4]], -1)):
        (pair,) = build_report(predictions, {}, seed=0)["comparisons"]
        assert pair["difference"] == sign and pair["low"] < pair["high"] and pair["low"] <= sign <= pair["high"]


def test_what_was_chosen_is_counted_against_what_was_right() -> None:
    (row,) = build_report(answer("00", "one", "AACDAB-!"), {}, seed=0)["stages"]
    assert row["confusion"] == {"A": {"A": 2}, "B": {"A": 1, "B": 1}, "C": {"": 1, "C": 1}, "D": {"": 1, "D": 1}}


def test_accuracy_where_the_format_was_kept_is_counted() -> None:
    predictions = [replace(p, format_score=float(i < 5)) for i, p in enumerate(answer("00", "one", "ABCDBBCD"))]
    (row,) = build_report(predictions, {}, seed=0)["stages"]
    kept = row["format_kept"]
    assert (kept["answers"], kept["correct"], kept["accuracy"]) == (5, 4, 0.8) and kept["interval"][0] < 0.8
    (row,) = build_report([replace(p, format_score=0.5) for p in predictions], {}, seed=0)["stages"]
    assert row["format_kept"] == {"answers": 0, "correct": 0, "accuracy": None, "interval": None}
