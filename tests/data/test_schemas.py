"""Which columns make which record, and why a row makes none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from medlora.config.sources import Columns
from medlora.data.rows.conversion import find_first_number, to_record
from medlora.data.rows.schemas import explain_no_schema, find_schema, make_schema
from medlora.records import McqRecord, Record, RecordError, TextRecord, TranslationRecord

QUESTION = {"id": "q1", "question": "Q?", "A": "a", "B": "b", "C": "c", "answer": 2}


def convert(row: Any, columns: dict[str, Any] | None = None, **more: Any) -> tuple[Record, list[str]]:
    schema = make_schema(Columns.model_validate(columns)) if columns else find_schema([row, QUESTION])
    assert schema is not None
    return to_record(row, schema, "file-1", **more)


def ask(row: Any, columns: dict[str, Any] | None = None, **more: Any) -> McqRecord:
    record, _ = convert(row, columns, **more)
    assert isinstance(record, McqRecord)
    return record


def reject(row: Any, columns: dict[str, Any] | None = None, **more: Any) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        convert(row, columns, **more)
    return caught.value.kind, str(caught.value)


LIST = ["Fever", "Cough", "Rash"]


@pytest.mark.parametrize(
    ("row", "name", "answer"),
    [
        (QUESTION, "letters", "B"),
        ({"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 4, "exp": None}, "medmcqa", "D"),
        ({"question": "Q", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}, "medqa", "B"),
        (
            {
                "question": "Q",
                "options": [{"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}],
                "label": ["B"],
            },
            "medxpertqa",
            "B",
        ),
        ({"question": "Q", "answers": {"a": "x", "b": "y"}, "correct_answers": ["b"]}, "frenchmedmcqa", "B"),
        ({"problem_text": "Q", "choices": LIST, "answer": ["c"]}, "cmexam", "C"),
        ({"question": "Q", "choices": LIST, "answer": "Cough", "subject": "s"}, "choices", "B"),
        ({"question": "Q", "options": LIST, "answer": 3}, "options", "C"),
        ({"question": "Q", "options": "(A) x.\n(B) y.\n(C) z.", "answer": "(C)"}, "options", "C"),
    ],
)
def test_the_columns_say_which_schema_it_is(row: dict[str, Any], name: str, answer: str) -> None:
    schema = find_schema([row])
    assert schema is not None and (schema.name, schema.kind) == (name, "mcq")
    assert ask(row).answer == answer


def test_texts_and_pairs() -> None:
    assert convert({"text": "글"})[0] == TextRecord("file-1", "글")
    assert convert({"english": "e", "korean": "한", "id": 7})[0] == TranslationRecord("7", "e", "한")
    assert convert({"en": "e", "ko": "한"})[0] == TranslationRecord("file-1", "e", "한")


def test_columns_of_the_config_make_a_schema() -> None:
    row = {"stem": "Q", "a": "x", "b": "y", "key": 0, "field": "cardiology", "why": "so", "no": 9}
    columns = {"question": "stem", "options": ["a", "b"], "answer": {"column": "key", "base": 0}}
    record = ask(row, {**columns, "subject": "field", "rationale": "why", "id": "no"})
    assert record == McqRecord("9", "Q", ("x", "y"), "A", "cardiology", {"analysis": "so"})
    assert convert({"body": "글"}, {"text": "body"})[0] == TextRecord("file-1", "글")
    assert convert({"src": "e", "tgt": "한"}, {"english": "src", "korean": "tgt"})[0] == TranslationRecord(
        "file-1", "e", "한"
    )
    assert reject({**row, "why": "so"}, {**columns, "rationale": "wy"})[0] == "missing column"
    assert reject({"body": "글"}, {"text": "boddy"}) == (
        "missing column",
        "no `boddy` column; found body; is it `body`?",
    )


@pytest.mark.parametrize(
    "columns", [{}, {"question": "q"}, {"text": "t", "english": "e", "korean": "k"}, {"english": "e"}]
)
def test_half_a_mapping_is_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="name all columns of exactly one kind"):
        Columns.model_validate(columns)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(1, "A"), (3, "C"), ("B", "B"), ("b", "B"), (" C ", "C"), ("2", "B"), (2.0, "B"), ("Ｂ", "B"), (["B"], "B")],
)
def test_an_answer_is_a_letter_or_a_number_from_one(answer: Any, letter: str) -> None:
    assert ask({**QUESTION, "answer": answer}).answer == letter


OPTIONS = {"A": "Fever", "B": "Cough", "C": "fever ", "D": "B"}
MALFORMED = [
    ({"answer": 0}, "answer out of range", "answer 0 is outside 1..3"),
    ({"answer": 4}, "answer out of range", "answer 4 is outside 1..3"),
    ({"answer": -1}, "answer out of range", "answer -1 is outside"),
    ({"answer": "9"}, "answer out of range", "answer '9' is outside 1..3"),
    ({"answer": "E"}, "answer is no option", "answer 'E' is none of the options A, B, C"),
    ({"answer": ""}, "answer is no option", "answer '' is none of"),
    ({"answer": None}, "answer is no option", "`answer` is None"),
    ({"answer": True}, "answer is no option", "`answer` is True"),
    ({"answer": float("nan")}, "answer is no option", "answer nan is none of the options"),
    ({"answer": 1.5}, "answer is no option", "answer 1.5 is none of the options"),
    ({"answer": {"x": 1}}, "answer is no option", "is none of the options"),
    ({"answer": "Headache"}, "answer is no option", "answer 'Headache' is none"),
    ({"answer": "AB"}, "several answers", "several right answers ('AB')"),
    ({"answer": "A, C"}, "several answers", "several right answers ('A, C')"),
    ({"answer": ["A", "C"]}, "several answers", "2 right answers (A, C); a record has one"),
    ({"answer": []}, "several answers", "0 right answers (none)"),
    ({**OPTIONS, "answer": "FEVER"}, "ambiguous answer", "is the text of A and C"),
    ({**OPTIONS, "answer": "B"}, "ambiguous answer", "answer 'B' is the place of B and the text of D"),
    ({"A": "2", "B": "1", "answer": "1"}, "ambiguous answer", "answer '1' is the place of A and the text of B"),
    ({"question": ""}, "empty field", "`question` is empty"),
    ({"question": "  "}, "empty field", "`question` is empty"),
    ({"question": None}, "wrong type", "`question` must be text, found nothing"),
    ({"question": 5}, "wrong type", "`question` must be text, found a number"),
    ({"question": float("nan")}, "wrong type", "`question` must be text, found a number"),
    ({"question": ["Q"]}, "wrong type", "`question` must be text, found a list"),
    ({"question": "x" * 50_001}, "absurd length", "`question` has 50,001 characters"),
    ({"question": "Q\x00"}, "control character", "`question` holds the control character U+0000 at character 2"),
    ({"A": "x\x1b[0m"}, "control character", "`option A` holds the control character U+001B"),
    ({"question": "Q \ud83d"}, "lone surrogate", "`question` holds half of a surrogate pair, U+D83D"),
    ({"B": "", "C": "c"}, "empty field", "`option B` is empty"),
    ({"B": None, "C": None}, "too few or too many options", "1 options; a question needs 2 to 10"),
    ({"B": 7}, "wrong type", "`option B` must be text, found a number"),
    ({"rationale": ["x"]}, "rationale", "a rationale is text or a mapping"),
    ({"rationale": {"guess": "x"}}, "rationale", "rationale field 'guess' is none of facts"),
    ({"id": "\x07"}, "control character", "`id` holds the control character"),
]


@pytest.mark.parametrize(("change", "kind", "reason"), MALFORMED, ids=[reason[:40] for _, _, reason in MALFORMED])
def test_a_row_that_is_no_question_has_a_reason(change: dict[str, Any], kind: str, reason: str) -> None:
    found, said = reject({**QUESTION, **change})
    assert found == kind and reason in said


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"question": "Q", "options": "abc", "answer": 1}, "wrong type", "`options` must be a list or a mapping"),
        ({"question": "Q", "options": 5, "answer": 1}, "wrong type", "found a number"),
        ({"question": "Q", "options": ["x"], "answer": 1}, "too few or too many options", "1 options"),
        ({"question": "Q", "options": list("abcdefghijk"), "answer": 1}, "too few or too many options", "11 options"),
        ({"question": "Q", "options": {"A": "x", "C": "y"}, "answer": "A"}, "wrong letters", "has the letters A, C"),
        (
            {"question": "Q", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "y"},
            "letter and text disagree",
            "answer A is 'x', but `answer` says 'y'",
        ),
        (
            {"question": "Q", "options": [{"letter": "A", "content": "x"}] * 2, "label": "A"},
            "wrong letters",
            "a letter twice",
        ),
        ([1, 2], "no mapping", "a row is a mapping of columns, found a list"),
        ("text", "no mapping", "found a text"),
        ({"text": None}, "wrong type", "`text` must be text, found nothing"),
        (
            {**{k: v for k, v in QUESTION.items() if k != "answer"}, "asnwer": 1},
            "missing column",
            "no `answer` column; found id, question, A, B, C, asnwer; is it `asnwer`?",
        ),
    ],
)
def test_rows_of_other_shapes_have_a_reason(row: Any, kind: str, reason: str) -> None:
    found, said = reject(row)
    assert found == kind and reason in said


def test_options_that_are_letters_or_numbers_are_plain_where_answers_are_places() -> None:
    digits = {"question": "Q", "A": "1", "B": "2", "C": "6", "D": "10", "E": "25"}
    assert ask({**digits, "answer": 4}).answer == "D" and ask({**digits, "answer": "4"}).answer == "D"
    letters = {"question": "Q", "options": {"A": "O", "B": "A"}, "answer_idx": "A", "answer": "O"}
    assert ask(letters).answer == "A"
    columns = {"question": "question", "options": ["A", "B", "C"], "answer": {"column": "answer", "base": 1}}
    assert ask({"question": "Q", "A": "2", "B": "1", "C": "3", "answer": "1"}, columns).answer == "A"


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"C": " A "}, "two options of one text"),
        ({"answer": "b"}, "answer in lower case"),
        ({"B": "Cough", "answer": "cough"}, "answer given as text"),
        ({"A": "1", "B": "2", "C": "3"}, "options are bare numbers or letters"),
        ({"question": "20 \ufffdm"}, "lost characters (U+FFFD, U+0080 to U+009F)"),
        ({"question": "20 \x9dm"}, "lost characters (U+FFFD, U+0080 to U+009F)"),
        ({"question": "\u1112\u1161\u11ab"}, "not composed (Unicode NFC)"),
    ],
)
def test_what_is_odd_is_kept_and_flagged(change: dict[str, Any], flag: str) -> None:
    row = {**QUESTION, "A": "alpha", "B": "beta", "C": "gamma", **change}
    if change == {"C": " A "}:
        row["A"] = "a"
    record, flags = convert(row)
    assert flags == [flag] and isinstance(record, McqRecord)


def test_text_is_composed_only_where_the_config_says_so() -> None:
    row = {**QUESTION, "question": "\u1112\u1161\u11ab", "A": "cafe\u0301"}
    assert ask(row).question == "\u1112\u1161\u11ab" and ask(row, nfc=True).question == "한"
    assert ask(row, nfc=True).options[0] == "café"
    assert ask({**row, "answer": "CAF\u00c9"}).answer == "A"


def test_medxpertqa_repeats_its_options_in_the_question() -> None:
    options = [{"letter": letter, "content": letter * 3} for letter in "ABC"]
    row = {"question": "Stem?\nAnswer Choices: (A) AAA (B) BBB (C) CCC", "options": options, "label": ["C"]}
    assert ask(row).question == "Stem?" and ask(row).options == ("AAA", "BBB", "CCC")


def places(*answers: Any, options: int = 4) -> list[tuple[str, Any, int]]:
    return [(f"f:{i}", answer, options) for i, answer in enumerate(answers, 1)]


def test_the_data_says_whether_the_first_option_is_0_or_1() -> None:
    assert (
        find_first_number(places(1, 2, 4)) == 1
        and find_first_number(places(3, 0, 2)) == 0
        and find_first_number(places("4", "1")) == 1
    )
    assert find_first_number(places("A", "B", None)) is None and find_first_number([]) is None
    with pytest.raises(RecordError, match=r"both 0 \(f:2\) and as many as there are options \(f:3\)"):
        find_first_number(places(1, 0, 4))
    with pytest.raises(RecordError, match="none of them 0 or as many as there are options; say whether"):
        find_first_number(places(1, 2, 3))


def test_a_rationale_is_taken_as_it_is_or_by_its_fields() -> None:
    assert ask({**QUESTION, "cot": " 그래서 B. "}).rationale == {"analysis": "그래서 B."}
    fields = ask({**QUESTION, "rationale": "facts: 열\nanalysis: 그래서\n둘째 줄\n"})
    assert fields.rationale == {"facts": "열", "analysis": "그래서\n둘째 줄"}


def test_what_no_schema_knows_is_told_the_nearest() -> None:
    said = explain_no_schema({"id": 1, "question": "Q", "A": "a", "B": "b", "asnwer": 1})
    assert "unknown schema (columns id, question, A, B, asnwer)" in said
    assert "nearest: letters, without answer (is it asnwer?)" in said and "known: question, opa, opb" in said
    assert explain_no_schema({"stem": "x"}).startswith("unknown schema (columns stem); known: ")
