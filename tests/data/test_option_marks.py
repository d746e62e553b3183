"""Marks in the text of options and answers: taken off, refused, or left where they are the text."""

from __future__ import annotations

from typing import Any

import pytest

from medlora.data.rows.conversion import to_record
from medlora.data.rows.option_marks import names_several, read_answer, read_mark, strip_marks
from medlora.data.rows.schemas import find_schema
from medlora.records import McqRecord, RecordError

TEXTS = ["열", "기침", "발진", "두통", "복통"]
MARKS = {
    "circled": "①②③④⑤",
    "black": "❶❷❸❹❺",
    "dotted": ["1. ", "2. ", "3. ", "4. ", "5. "],
    "closed": ["1)", "2)", "3)", "4)", "5)"],
    "bracketed": ["(1) ", "(2) ", "(3) ", "(4) ", "(5) "],
    "numbered": ["1번 ", "2번 ", "3번 ", "4번 ", "5번 "],
    "lettered": ["A. ", "B. ", "C. ", "D. ", "E. "],
    "close to the text": ["A.", "B.", "C.", "D.", "E."],
    "ideographic comma": ["1、", "2、", "3、", "4、", "5、"],
    "small": ["a) ", "b) ", "c) ", "d) ", "e) "],
    "letters in brackets": ["(A) ", "(B) ", "(C) ", "(D) ", "(E) "],
    "full width": ["Ａ．", "Ｂ．", "Ｃ．", "Ｄ．", "Ｅ．"],
    "hangul": ["가. ", "나. ", "다. ", "라. ", "마. "],
    "hangul in brackets": ["(가) ", "(나) ", "(다) ", "(라) ", "(마) "],
    "jamo": ["ㄱ. ", "ㄴ. ", "ㄷ. ", "ㄹ. ", "ㅁ. "],
    "enclosed letters": "ⓐⓑⓒⓓⓔ",
}


def ask(row: dict[str, Any]) -> tuple[McqRecord, list[str]]:
    schema = find_schema([row])
    assert schema is not None
    record, flags = to_record(row, schema, "row-1")
    assert isinstance(record, McqRecord)
    return record, flags


def reject(row: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        ask(row)
    return caught.value.kind, str(caught.value)


@pytest.mark.parametrize("name", MARKS)
def test_marks_that_agree_with_the_order_are_taken_off(name: str) -> None:
    marked = [f"{mark}{text}" for mark, text in zip(MARKS[name], TEXTS, strict=True)]
    assert strip_marks(marked) == (tuple(TEXTS), True)
    record, flags = ask({"question": "Q", "options": marked, "answer": 3})
    assert record.options == tuple(TEXTS) and record.answer == "C"
    assert flags == ["options carried marks of their own (①, 1., A.)"]


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)])
def test_marks_that_disagree_with_the_place_are_refused(name: str, order: tuple[int, ...]) -> None:
    marked = [f"{MARKS[name][i]}{TEXTS[i]}" for i in order]
    kind, said = reject({"question": "Q", "options": marked, "answer": 2})
    assert kind == "mark and place disagree"
    assert f"option 1 carries the mark of option {order[0] + 1}" in said or "option" in said


def test_columns_are_stripped_as_lists_are() -> None:
    row = {"question": "Q", "A": "① a", "B": "② b", "C": "③ c", "answer": "③ c"}
    assert ask(row)[0].options == ("a", "b", "c") and ask(row)[0].answer == "C"
    assert reject({**row, "A": "② a", "B": "① b"})[0] == "mark and place disagree"


@pytest.mark.parametrize(
    "options",
    [
        ["1.5 mg", "2.5 mg", "3.5 mg"],
        ["1:1", "1:2", "2:1"],
        ["1", "2", "3"],
        ["A", "B", "O", "AB"],
        ["E. coli", "C. difficile", "B. fragilis", "S. aureus"],
        ["1일", "2일", "3일"],
        ["1 - 2 hours", "2 - 4 hours", "4 - 6 hours"],
        ["1 - crown, 2 - screw", "1 - screw, 2 - crown"],
        ["1) a, 2) b", "1) b, 2) a"],
        ["①, ②", "①, ③", "②, ③"],
        ["①②", "③④", "①④"],
        ["ㄱ, ㄴ", "ㄱ, ㄷ", "ㄴ, ㄷ"],
        ["가, 나", "나, 다", "다, 라"],
        ["가. 나", "나. 다"],
        ["A형 간염", "B형 간염", "C형 간염"],
        ["비타민 A", "비타민 B", "비타민 C"],
        ["3번 뇌신경", "5번 뇌신경이 아닌 것"][:1] + ["시신경"],
        ["(가)와 (나)", "(나)와 (다)"],
        ["A-a 기울기", "B-cell", "C-reactive protein"],
    ],
)
def test_what_only_looks_like_a_mark_stays(options: list[str]) -> None:
    assert strip_marks(options) == (tuple(options), False)


def test_marks_on_some_options_count_where_they_can_be_nothing_else() -> None:
    assert strip_marks(["① a", "② b", "c"]) == (("a", "b", "c"), True)
    assert strip_marks(["1. a", "2. b", "c"]) == (("1. a", "2. b", "c"), False)
    assert strip_marks(["A. a", "B. b", "C. c", "none"]) == (("a", "b", "c", "none"), True)
    with pytest.raises(RecordError, match="option 5 carries the mark of option 4"):
        strip_marks(["A. a", "B. b", "C. c", "D. d", "D. e"])
    with pytest.raises(RecordError, match="option 1 carries the mark of option 2"):
        strip_marks(["② a", "① b", "c"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[(mark, "C") for mark in ("③", "❸", "➂", "3번", "３번", "3 번", "(3)", "3)", "3.", "3.0", "3.00", "３")],
        *[
            (mark, "C")
            for mark in ("C", "c", "(C)", "C.", "[C]", "Ｃ", "（Ｃ）", "Ⓒ", "ⓒ", "C)", "다", "(다)", "다.", "㉰")
        ],
        *[
            (mark, "C")
            for mark in ("③ 발진", "③발진", "3번 발진", "C. 발진", "(C) 발진", "C: 발진", "3) 발진", "다. 발진")
        ],
        *[
            (mark, "C")
            for mark in (
                "보기 3",
                "선택지 3번",
                "option C",
                "C번",
                "(3)번",
                "③번",
                "[정답] 3",
                "Ans: C",
                "C 발진",
                "3 발진",
                "정답 C",
            )
        ],
        *[(mark, "C") for mark in ("정답: ③", "정답 3", "답: C", "정답은 3번", "Answer: C", "발진", ["③"], [3.0])],
    ],
)
def test_an_answer_is_any_mark_with_one_meaning(answer: Any, letter: str) -> None:
    row = {"question": "Q", **dict(zip("ABCDE", TEXTS, strict=True)), "answer": answer}
    assert ask(row)[0].answer == letter


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("⑥", "answer out of range"),
        ("6번", "answer out of range"),
        ("0번", "answer is no option"),
        ("사", "answer out of range"),
        ("H", "answer is no option"),
        ("③④", "several answers"),
        ("①, ③", "several answers"),
        ("1, 3", "several answers"),
        ("1번, 3번", "several answers"),
        ("가, 다", "several answers"),
        ("A와 C", "several answers"),
        ("A/C", "several answers"),
        ("C 두통", "letter and text disagree"),
        ("3번째", "answer is no option"),
        ("C. 두통", "letter and text disagree"),
        ("③ 두통", "letter and text disagree"),
        ("C. 없는 것", "answer is no option"),
        ("3.5", "answer is no option"),
        ("정답 없음", "answer is no option"),
        ("모두 정답", "answer is no option"),
    ],
)
def test_an_answer_with_no_meaning_or_two_is_refused(answer: str, kind: str) -> None:
    row = {"question": "Q", **dict(zip("ABCDE", TEXTS, strict=True)), "answer": answer}
    assert reject(row)[0] == kind


def test_an_exam_s_mark_and_a_count_from_0_are_two_meanings() -> None:
    row = {"question": "Q", "choices": TEXTS, "answer": "3번"}
    schema = find_schema([row])
    assert schema is not None
    with pytest.raises(RecordError, match="answers count from 0; say columns.answer.base: 1"):
        to_record(row, schema, "r", base=0)


def test_marks_as_they_are_read() -> None:
    assert [read_mark(text) and read_mark(text).rest for text in ("③ 혈청", "(다) x", "3번째", "열", "")] == [  # type: ignore[union-attr]
        "혈청",
        "x",
        None,
        None,
        None,
    ]
    assert read_answer("가") is not None and read_answer("가나") is None
    assert names_several("A, C") and not names_several("A") and not names_several("A형, C형 간염")
