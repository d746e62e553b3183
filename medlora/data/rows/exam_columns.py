"""Columns of Korean exams, and of tables like them: 문제, 보기1 .. 보기5 or ①..⑤, 정답, 해설, 과목."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from medlora.data.rows.option_marks import read_answer
from medlora.records import LETTERS

_NAMES = {
    "question": ("문제", "문항", "질문", "발문", "문제내용", "문항내용", "질문내용", "question", "stem"),
    "answer": ("정답", "답", "답안", "정답번호", "정답지", "answer", "key"),
    "options": ("보기", "선택지", "선지", "답가지", "options", "choices"),
    "rationale": ("해설", "풀이", "정답해설", "해설내용", "rationale", "explanation", "cot"),
    "subject": ("과목", "과목명", "분야", "영역", "subject"),
    "id": ("id",),
}


_MEANT = {name: column for column, names in _NAMES.items() for name in names}


_OPTION = re.compile(r"(?:(?:보기|선택지|선지|답가지|문항보기|option|choice|opt)\s*[_.-]?\s*)?(\S{1,4})", re.I)


EXAMPLES = {"_OPTION": ("보기3", "보기에 대한 설명")}
"""The header that a pattern must read, and one that it must not; tests/test_patterns.py tries both."""


@lru_cache(maxsize=256)
def match_columns(names: tuple[str, ...]) -> tuple[dict[str, str] | None, str]:
    """Our name for each column that has one; None where they make no question, with the reason if two mean the same."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[\s\ufeff]+", "", name).casefold()
        column = _MEANT.get(plain) or _read_option(plain)
        if column is None:
            continue
        if column in found:
            return None, f"the columns {found[column]} and {name} could both be the {_describe(column)}"
        found[column] = name
    letters = "".join(sorted(column for column in found if column in LETTERS))
    if not {"question", "answer"} <= set(found) or letters != LETTERS[: len(letters)]:
        return None, ""
    if len(letters) < 2 and "options" not in found:
        return None, ""
    if len(letters) >= 2:
        found.pop("options", None)
    return found, ""


def _read_option(name: str) -> str | None:
    match = _OPTION.fullmatch(name)
    mark = read_answer(f"({match[1]})" if match[1].isdecimal() else match[1]) if match else None
    return LETTERS[mark.place - 1] if mark and not mark.rest and mark.place <= len(LETTERS) else None


def _describe(column: str) -> str:
    return f"option {column}" if column in LETTERS else column


def rename_columns(row: Mapping[str, object]) -> dict[str, object] | None:
    """The row under our names of columns; None where it is no question of such a table."""
    found, _ = match_columns(tuple(map(str, row)))
    if found is None:
        return None
    ours = {name: column for column, name in found.items()}
    return {ours.get(str(name), str(name)): value for name, value in row.items()}
