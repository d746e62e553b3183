"""What a report says of predictions, and the file of single answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from medlora.evaluation import statistics
from medlora.evaluation.predictions import Prediction, write_predictions
from medlora.reporting.report import build_report, summarise
from medlora.reporting.tables import print_report
from tests.support.predictions import TWO_TESTS, answer


def test_every_stage_and_test_has_its_figures() -> None:
    report = build_report(TWO_TESTS, {}, seed=0)
    row = next(row for row in report["stages"] if (row["stage"], row["test"]) == ("00", "one"))
    assert (row["n"], row["correct"], row["unparsed"], row["failed"], row["accuracy"]) == (8, 6, 1, 1, 0.75)
    assert row["interval"] == pytest.approx(statistics.wilson(6, 8))
    assert row["chance"] == 0.25
    assert {name: part["value"] for name, part in row["subjects"].items()} == {"x": 0.75, "y": 0.75}
    assert row["macro"] == 0.75
    assert row["letters"]["none"] == 2 and row["letters"]["chosen"] == {"A": 2, "B": 2, "C": 1, "D": 1}
    assert row["calibration"] is None


def test_overall_figures_weigh_questions_or_tests() -> None:
    predictions = [*answer("base", "one", "AACDAACD"), *answer("base", "two", "DD", gold="DA")]
    (row,) = build_report(predictions, {}, seed=0)["overall"]
    assert row["micro"] == pytest.approx(7 / 10) and row["macro"] == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert (row["n"], row["correct"]) == (10, 7) and row["interval"] == pytest.approx(statistics.wilson(7, 10))


def test_comparisons_name_the_questions_gained_and_lost() -> None:
    by_test = {pair["test"]: pair for pair in build_report(TWO_TESTS, {}, seed=0)["comparisons"]}
    assert by_test["one"]["gained"] == [["one", "q1"], ["one", "q5"]]
    assert by_test["one"]["lost"] == [["one", "q6"], ["one", "q7"]]
    assert len(by_test["two"]["gained"]) == 6 and by_test["two"]["difference"] == 0.75
    assert by_test[None]["difference"] == pytest.approx(6 / 16) and by_test[None]["total"] == 16
    assert by_test["two"]["low"] < 0.75 < by_test["two"]["high"]


def test_holm_corrects_for_every_comparison_on_a_single_test() -> None:
    pairs = build_report(TWO_TESTS, {}, seed=0)["comparisons"]
    single = [pair for pair in pairs if pair["test"] is not None]
    assert [p["p_value"] for p in single] == [1.0, 2 / 2**6]
    assert [p["p_holm"] for p in single] == [1.0, 4 / 2**6]  # twice the smaller: two comparisons, not one a test
    together = next(pair for pair in pairs if pair["test"] is None)
    assert together["p_holm"] == together["p_value"]


def test_a_stage_that_was_not_asked_a_test_is_left_out_of_it() -> None:
    report = build_report([p for p in TWO_TESTS if (p.stage, p.test) != ("00", "two")], {}, seed=0)
    assert [(pair["test"], pair["before"], pair["after"]) for pair in report["comparisons"]] == [("one", "base", "00")]
    assert report["forgetting"]["accuracy"] == [[0.75, 0.25], [0.75, None]]
    assert report["forgetting"]["forgotten"] == [0.0, None]


def test_different_questions_of_one_test_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        build_report(TWO_TESTS[:-1], {}, seed=0)


def test_the_report_is_json_and_the_same_every_time() -> None:
    about = {"name": "r", "notes": ("a", "b"), "config": {"limit": None}, "seconds": 1.5}
    report = build_report(TWO_TESTS, about, seed=3)
    assert json.loads(json.dumps(report, allow_nan=False)) == report == build_report(TWO_TESTS, about, seed=3)
    assert report["notes"] == ["a", "b"] and report["config"] == {"limit": None} and report["seed"] == 3


def test_about_cannot_replace_what_is_computed() -> None:
    with pytest.raises(ValueError, match="comparisons, stages"):
        build_report(TWO_TESTS, {"stages": [], "comparisons": [], "name": "r"}, seed=0)


def test_calibration_stands_where_there_are_probabilities() -> None:
    sure = [replace(p, probabilities=(0.7, 0.1, 0.1, 0.1)) for p in answer("base", "one", "AAAAAAAA")]
    (row,) = summarise(sure)
    assert math.isclose(row["calibration"]["ece"], 0.7 - 0.25) and row["calibration"]["counted"] == 8


@pytest.mark.parametrize(
    "predictions",
    [
        TWO_TESTS,
        answer("base", "one", "--------"),  # no choice at all
        [replace(p, probabilities=(0.25,) * 4, text="정답: A") for p in answer("base", "one", "AAAAAAAA")],
    ],
    ids=["letters", "none", "probabilities"],
)
def test_single_answers_come_back_from_their_file(predictions: list[Prediction], tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", predictions)
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    rows: list[dict[str, Any]] = table.to_pylist()
    assert [Prediction(**{**row, "probabilities": tuple(row["probabilities"])}) for row in rows] == predictions
    assert str(table.schema.field("choice").type) == "string"
    assert str(table.schema.field("probabilities").type).startswith("list<") and "double" in str(table.schema)


def reasoned(text: str, choice: str = "B", gold: str = "B", kept: float = 1.0, id: str = "q") -> Prediction:
    """An answer of scoring `reason`: the letter is the most likely one behind the text."""
    shares = tuple(0.7 if letter == choice else 0.1 for letter in "ABCD")
    return Prediction(id, "one", "01", gold, choice, "", shares, text, options=4, tokens=9, format_score=kept)


REASONED = [
    reasoned("facts: 발열\nanswer:\nB", id="q0"),
    reasoned("facts: 발열\nanswer:\nA", choice="A", id="q1"),
    reasoned("정답은 B입니다.", kept=0.0, id="q2"),
    reasoned("facts: 발열이 있고", kept=0.5, id="q3"),
    reasoned("정답은 C가 아니다.", choice="C", kept=0.0, id="q4"),
]


def test_letters_taken_by_likelihood_are_counted_beside_the_kept_format(capsys: pytest.CaptureFixture[str]) -> None:
    report = build_report(REASONED, {}, seed=0)
    assert report["stages"][0]["by_likelihood"] == {
        "answers": 5,
        "unwritten": 2,
        "unwritten_correct": 1,
        "kept": 2,
        "kept_accuracy": 0.5,
    }
    print_report(report, worked=True)
    shown = capsys.readouterr().out
    assert "by likelihood" in shown and "50.0% of 2" in shown and "2 letters were taken by likelihood" in shown
    for other in (replace(REASONED[0], format_score=None), replace(REASONED[0], probabilities=())):
        assert summarise([other])[0]["by_likelihood"] is None


def test_unparsed_answers_are_in_the_table_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(build_report(answer("00", "one", "ABCDAB-!"), {}, seed=0), worked=True)
    assert "unparsed" in capsys.readouterr().out
    print_report(build_report(answer("00", "one", "ABCDABCA"), {}, seed=0), worked=True)
    shown = capsys.readouterr().out
    assert "unparsed" not in shown and "by likelihood" not in shown


def test_a_test_that_all_stages_pass_is_called_saturated(capsys: pytest.CaptureFixture[str]) -> None:
    report = build_report([*answer("base", "one", "ABCDABCD"), *answer("00", "one", "ABCDABCD")], {}, seed=0)
    (said,) = report["remarks"]
    assert said.startswith("test one is saturated: all 2 stages answer 98% or more of its 8 questions right")
    print_report(report, worked=True)
    assert "beware: test one is saturated" in capsys.readouterr().out
    assert build_report(TWO_TESTS, {}, seed=0)["remarks"] == []
