"""Options in one column, in every shape that leaderboards, parquet and pandas have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from medlora.config.sources import SourceConfig
from medlora.data.rows.option_lists import list_options
from medlora.data.sources import read
from medlora.records import RecordError

THREE = ("열", "기침", "발진")


@pytest.mark.parametrize(
    ("found", "first"),
    [
        (["열", "기침", "발진"], None),
        ({"A": "열", "B": "기침", "C": "발진"}, None),
        ({"c": "발진", "a": "열", "b": "기침", "d": None}, None),
        ({"1": "열", "2": "기침", "3": "발진"}, 1),
        ({1: "열", 3: "발진", 2: "기침"}, 1),
        ({"0": "열", "1": "기침", "2": "발진"}, 0),
        ({"①": "열", "②": "기침", "③": "발진"}, None),
        ({"가": "열", "나": "기침", "다": "발진"}, None),
        ({"option1": "열", "option2": "기침", "option3": "발진"}, 1),
        ({"보기 1": "열", "보기 2": "기침", "보기 3": "발진"}, 1),
        ({"(A)": "열", "(B)": "기침", "(C)": "발진"}, None),
        ({"text": ["열", "기침", "발진"], "label": ["A", "B", "C"]}, None),
        ({"text": ["발진", "열", "기침"], "label": ["C", "A", "B"]}, None),
        ({"label": ["1", "2", "3"], "text": ["열", "기침", "발진"]}, 1),
        ([("A", "열"), ("B", "기침"), ("C", "발진"), ("D", None)], None),
        ([["1", "열"], ["2", "기침"], ["3", "발진"]], 1),
        ([{"label": "A", "text": "열"}, {"label": "B", "text": "기침"}, {"label": "C", "text": "발진"}], None),
        ([{"key": "B", "value": "기침"}, {"key": "A", "value": "열"}, {"key": "C", "value": "발진"}], None),
        ([{"text": "열"}, {"text": "기침"}, {"text": "발진"}], None),
        ('["열", "기침", "발진"]', None),
        ('{"A": "열", "B": "기침", "C": "발진"}', None),
        ("['열', '기침', '발진']", None),
        ("('열', '기침', '발진')", None),
        ("{'1': '열', '2': '기침', '3': '발진'}", 1),
        ("{'text': array(['열', '기침', '발진'], dtype=object), 'label': array(['A', 'B', 'C'], dtype=object)}", None),
        ("{'text': ['열', '기침', '발진'], 'label': ['A', 'B', 'C']}", None),
        ("① 열\n② 기침\n③ 발진", None),
        ("1. 열\n2. 기침\n3. 발진", None),
        ("(A) 열\n(B) 기침\n(C) 발진", None),
        ("A) 열\r\nB) 기침\r\n\r\nC) 발진\n", None),
        ("가. 열\n나. 기침\n다. 발진", None),
        ("① 열 ② 기침 ③ 발진", None),
        ("(1) 열 (2) 기침 (3) 발진", None),
    ],
)
def test_options_of_every_shape(found: Any, first: int | None) -> None:
    assert list_options(found, "options") == (THREE, first)


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        ("['열' '기침'\n '발진']", "wrong type", "side by side without commas"),
        ("{'열', '기침'}", "wrong type", "is a set, which has no order"),
        ("열, 기침, 발진", "wrong type", "found a text"),
        ("__import__('os').system('x')", "wrong type", "found a text"),
        ("[__import__('os').system('x')]", "wrong type", "found a text"),
        ("[" * 300 + "]" * 300, "wrong type", "which is no list of options"),
        ("[" + "9" * 600_000 + "]", "wrong type", "which is no list of options"),
        ("② 열\n① 기침", "mark and place disagree", "the marks of the options are 2, 1"),
        ({"A": "x", "C": "y"}, "wrong letters", "has the letters A, C, not A, B, ..."),
        ({"2": "x", "3": "y"}, "wrong letters", "has the letters 2, 3"),
        ({"x": "a", "y": "b"}, "wrong letters", "has the letters x, y"),
        ({"A": "x", "a": "y"}, "wrong letters", "has a letter twice"),
        ({"text": ["a", "b"], "label": ["A"]}, "wrong letters", "has 1 labels and 2 texts"),
        ([{"label": "A"}, {"label": "B"}], "wrong type", "parts without a text"),
        (None, "wrong type", "found nothing"),
        (3.5, "wrong type", "found a number"),
    ],
)
def test_what_is_no_list_of_options_is_named(found: Any, kind: str, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        list_options(found, "options")
    assert caught.value.kind == kind and said in str(caught.value) and len(str(caught.value)) < 400


def test_numbers_of_options_say_how_answers_count(tmp_path: Path) -> None:
    def ask(row: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(row, encoding="utf-8")
        return read(SourceConfig(source=str(path)))[0].answer  # type: ignore[union-attr]

    assert ask('{"question": "Q", "choices": {"0": "a", "1": "b", "2": "c"}, "answer": 1}') == "B"
    assert ask('{"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}') == "B"
    assert ask('{"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}') == "B"


def test_options_from_0_and_answers_from_1_are_two_meanings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Q", "options": {"0": "a", "1": "b"}, "answer": 1}', encoding="utf-8")
    columns = {"question": "question", "options": "options", "answer": {"column": "answer", "base": 1}}
    with pytest.raises(Exception, match="numbered from 0, but answers from 1; say columns.answer.base: 0"):
        read(SourceConfig.model_validate({"source": str(path), "columns": columns}))


def test_a_map_column_of_parquet_is_options(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    options = pyarrow.array([[("A", "열"), ("B", "기침")], [("B", "y"), ("A", "x")]], kind)
    table = pyarrow.table({"question": ["Q1", "Q2"], "options": options, "answer": ["B", "A"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(SourceConfig(source=str(tmp_path / "a.parquet")))
    assert [(each.options, each.answer) for each in found] == [(("열", "기침"), "B"), (("x", "y"), "A")]  # type: ignore[union-attr]
