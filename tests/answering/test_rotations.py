"""All cyclic orders of the options: what is asked, how answers come together, what a biased model looks like."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from medlora.answering.answerer import Answer
from medlora.answering.rotations import merge, predict, rotate
from medlora.evaluation import statistics
from medlora.evaluation.predictions import Prediction
from medlora.records import LETTERS, McqRecord
from medlora.reporting.report import build_report

RECORD = McqRecord("q", "?", ("가", "나", "다", "라"), "C", subject="s", rationale={"analysis": "다"})


class Fake:
    """Answers by a function of the record; writes the format where asked."""

    def __init__(self, choose: Any, scoring: str = "letter", style: str = "reasoning", text: str = "") -> None:
        self.choose, self.scoring, self.style, self.text = choose, scoring, style, text
        self.asked: list[McqRecord] = []

    def answer(self, records: Sequence[McqRecord]) -> list[Answer]:
        self.asked += records
        return [self._answer(record) for record in records]

    def _answer(self, record: McqRecord) -> Answer:
        place = self.choose(record)
        if self.scoring == "generate":
            return Answer(None if place is None else LETTERS[place], text=self.text, tokens=3)
        n = len(record.options)
        probabilities = tuple(0.7 if i == place else 0.3 / (n - 1) for i in range(n))
        return Answer(LETTERS[place], probabilities, 0.6, self.text, 3)


def find(word: str) -> Any:
    return lambda record: record.options.index(word)


def ask(fake: Any, *records: McqRecord, rotations: bool = True) -> list[Prediction]:
    return predict(fake, ["t"] * len(records), records, "00", rotations)


@pytest.mark.parametrize("by", range(4))
def test_the_right_answer_moves_with_its_option(by: int) -> None:
    turned = rotate(RECORD, by)
    assert turned.options[LETTERS.index(turned.answer)] == "다"
    assert sorted(turned.options) == sorted(RECORD.options)
    assert turned.options[0] == RECORD.options[by]


def test_every_order_is_asked_once_and_orders_have_ids_of_their_own() -> None:
    fake = Fake(find("다"))
    ask(fake, RECORD, McqRecord("p", "?", ("가", "다"), "A"))
    assert [r.options[0] for r in fake.asked] == ["가", "나", "다", "라", "가", "다"]
    assert len({r.id for r in fake.asked}) == 6


def test_a_model_that_knows_is_consistent() -> None:
    (prediction,) = ask(Fake(find("다")), RECORD)
    assert (prediction.choice, prediction.rotated, prediction.tokens) == ("C", "CBAD", 12)
    assert prediction.probabilities == pytest.approx((0.1, 0.1, 0.7, 0.1))
    found = statistics.rotations([prediction])
    assert found is not None
    assert (found.accuracy, found.consistency, found.orders) == (1, 1, 4)
    assert found.letters.chosen == found.letters.gold == {"A": 1, "B": 1, "C": 1, "D": 1}


def test_a_model_that_always_says_a_is_at_chance_and_seen_through() -> None:
    (prediction,) = ask(Fake(lambda record: 0), RECORD)
    assert prediction.probabilities == pytest.approx((0.25,) * 4)
    found = statistics.rotations([prediction])
    assert found is not None
    assert (found.accuracy, found.consistency) == (0.25, 0)
    assert found.letters.chosen == {"A": 4, "B": 0, "C": 0, "D": 0} and found.letters.gold == {
        "A": 1,
        "B": 1,
        "C": 1,
        "D": 1,
    }


def test_without_probabilities_the_majority_wins_and_silence_does_not_vote() -> None:
    answers = [Answer("B", tokens=1), Answer("A", tokens=1), Answer(None, tokens=1), Answer("A", tokens=1)]
    merged = merge(RECORD, answers)  # 나, 나, nothing, 라
    assert (merged.choice, merged.probabilities, merged.tokens) == ("B", (), 4)
    assert merge(RECORD, [Answer(None)] * 4).choice is None
    (silent,) = ask(Fake(lambda record: None, "generate"), RECORD)
    found = statistics.rotations([silent])
    assert found is not None and (silent.rotated, found.letters.none, found.consistency, found.accuracy) == (
        "----",
        4,
        0,
        0,
    )


def test_one_order_is_the_default_and_leaves_no_rows() -> None:
    (prediction,) = ask(Fake(find("다")), RECORD, rotations=False)
    assert (prediction.choice, prediction.rotated, prediction.subject, prediction.options) == ("C", "", "s", 4)
    assert statistics.rotations([prediction]) is None
    assert build_report([prediction], {}, seed=0)["stages"][0]["rotations"] is None


def test_failed_questions_stay_in_the_denominator_of_rotations() -> None:
    failed = Prediction("x", "t", "00", "A", None, error="out of memory", options=4)
    (row,) = build_report([*ask(Fake(find("다")), RECORD), failed], {}, seed=0)["stages"]
    found = row["rotations"]
    assert (row["n"], found["answers"], found["accuracy"], found["consistency"]) == (2, 8, 0.5, 0.5)
    assert found["letters"]["none"] == 4


def test_the_format_is_that_of_the_record_s_rationale_and_the_total_is_thirds() -> None:
    kept = Fake(find("다"), "reason", text="analysis: 다이다.\nanswer:\nC")
    bare = Fake(find("가"), "reason", text="answer:\nA")
    predictions = ask(kept, RECORD, rotations=False) + ask(bare, McqRecord("p", "?", RECORD.options, "C"))
    assert [p.format_score for p in predictions] == [1.0, pytest.approx(1 / 6)]  # five fields and the letter were asked
    (row,) = build_report(predictions, {}, seed=0)["stages"]
    assert row["format_score"] == pytest.approx((1 + 1 / 6) / 2)
    assert row["total"] == pytest.approx((1 + 1 / 6 / 3) / 2)


@pytest.mark.parametrize(("scoring", "style"), [("letter", "reasoning"), ("generate", "kormedmcqa"), ("reason", "x")])
def test_no_format_where_none_was_asked_for(scoring: str, style: str) -> None:
    fake: Any = SimpleNamespace(scoring=scoring, style=style, answer=lambda records: [Answer("C")] * len(records))
    (prediction,) = ask(fake, RECORD, rotations=False)
    (row,) = build_report([prediction], {}, seed=0)["stages"]
    assert prediction.format_score is None and row["format_score"] is None and row["total"] is None
