"""The right answer of a row as a letter: letters, numbers, marks of exams, the option's text; or why it is none."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from medlora.bounds import list_names, shorten
from medlora.data.rows.option_marks import HALF_WIDTH, STRONG, Mark, names_several, read_answer
from medlora.records import LETTERS, RecordError


def fold(text: str) -> str:
    """A text as texts are compared: composed, without space around it and without case."""
    return unicodedata.normalize("NFC", text).strip().casefold()


def read_number(answer: object) -> int | None:
    """A whole number, also as text or in a list of its own."""
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool):
        return None
    if isinstance(answer, float) and math.isfinite(answer) and answer.is_integer():
        return int(answer)
    if isinstance(answer, str):
        answer = answer.translate(HALF_WIDTH)
    if isinstance(answer, str) and re.fullmatch(r"\s*-?[0-9]{1,3}(?:\.0{1,6})?\s*", answer):
        return int(float(answer))
    return answer if isinstance(answer, int) else None


def read_gold(answer: Any, options: Sequence[object], first: int, pinned: bool) -> tuple[str, list[str]]:
    """The letter that an answer means, and flags; raises RecordError where it means none or might mean two."""
    letters = LETTERS[: len(options)]
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        if len(answer) != 1:
            shown = list_names(answer) or "none"
            raise RecordError(f"{len(answer)} right answers ({shown}); a record has one", "several answers")
        answer = answer[0]
    if isinstance(answer, bool) or answer is None:
        raise RecordError(
            f"`answer` is {answer!r}; give a letter of {letters} or a number from {first}", "answer is no option"
        )
    named = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if isinstance(answer, str) and isinstance(option, str) and fold(option) == fold(answer)
    ]
    number = read_number(answer)
    if number is not None:
        return _agree(answer, _count_from(first, number, answer, letters), [] if pinned else named), []
    mark = read_answer(answer) if isinstance(answer, str) else None
    if mark and not mark.rest:
        letter = _place(mark, first, answer, letters)
        flags = ["answer in lower case"] if answer.strip(" ().").islower() and not pinned else []
        return _agree(answer, letter, [] if pinned else named), flags
    if isinstance(answer, str) and not named and names_several(answer):
        raise RecordError(f"several right answers ({shorten(answer)}); a record has one", "several answers")
    if len(named) > 1:
        raise RecordError(f"answer {shorten(answer)} is the text of {' and '.join(named)}", "ambiguous answer")
    if named:
        return named[0], ["answer given as text"]
    if mark and mark.rest:
        return _agree_with_text(mark, first, answer, options, letters), []
    raise RecordError(f"answer {shorten(answer)} is none of the options {', '.join(letters)}", "answer is no option")


def _count_from(first: int, number: int, answer: object, letters: str) -> str:
    if not first <= number < first + len(letters):
        raise RecordError(
            f"answer {shorten(answer)} is outside {first}..{first + len(letters) - 1}", "answer out of range"
        )
    return letters[number - first]


def _place(mark: Mark, first: int, answer: str, letters: str) -> str:
    """The letter at a mark's place: a digit counts from `first`, every other mark names its option."""
    family = mark.family.strip("()")
    if family == "digit":
        return _count_from(first, mark.place, answer, letters)
    if family in STRONG and first == 0:
        raise RecordError(
            f"answer {shorten(answer)} is marked as on an exam, but answers count from 0; say columns.answer.base: 1",
            "ambiguous answer",
        )
    if mark.place > len(letters):
        kind = "answer is no option" if family == "letter" else "answer out of range"
        raise RecordError(f"answer {shorten(answer)} is none of the options {', '.join(letters)}", kind)
    return letters[mark.place - 1]


def _agree_with_text(mark: Mark, first: int, answer: str, options: Sequence[object], letters: str) -> str:
    """The letter of an answer such as `C. text`: mark and text must mean the same option."""
    texts = [letter for letter, option in zip(letters, options, strict=True) if fold(str(option)) == fold(mark.rest)]
    if not texts:
        raise RecordError(
            f"answer {shorten(answer)} is none of the options {', '.join(letters)}", "answer is no option"
        )
    letter = _place(mark, first, answer, letters)
    if letter not in texts:
        raise RecordError(
            f"answer {shorten(answer)} has the mark of {letter} and the text of {' and '.join(texts)}",
            "letter and text disagree",
        )
    return letter


def _agree(answer: object, letter: str, named: Sequence[str]) -> str:
    if named and letter not in named:
        raise RecordError(
            f"answer {shorten(answer)} is the place of {letter} and the text of {' and '.join(named)}; give a letter, or say "
            "columns.answer.base",
            "ambiguous answer",
        )
    return letter
