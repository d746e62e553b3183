"""What medlora trains and tests on: frozen records that are valid from birth."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from medlora.bounds import name_type

LETTERS = "ABCDEFGHIJ"
"""Option letters in order; a question has 2 to 10 options."""


FIELDS = ("facts", "candidates", "criteria", "analysis", "evaluation")
"""The fields of a structured rationale, in the order in which a completion shows them."""


MAX_FIELD_CHARS = 50_000
"""Most characters of a question, an option or a side of a translation; more is a file read wrongly, not an exercise."""


MAX_TEXT_CHARS = 20_000_000
"""Most characters of a document of plain text."""


_UNREADABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")
"""ASCII's control characters but for tab, line feed, form feed and carriage return; halves of surrogate pairs."""


class RecordError(ValueError):
    """A row that is no valid record; the message is the reason, ready to follow `file:line: `.

    `kind` is the class of the reason, a few words that do not change with the row: what rows are counted by.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _check_text(value: object, name: str, most: int = MAX_FIELD_CHARS) -> None:
    if not isinstance(value, str):
        raise RecordError(f"`{name}` must be text, found {name_type(value)}", "wrong type")
    if not value.strip():
        raise RecordError(f"`{name}` is empty", "empty field")
    if len(value) > most:
        raise RecordError(f"`{name}` has {len(value):,} characters, more than {most:,}", "absurd length")
    if found := _UNREADABLE.search(value):
        code = f"U+{ord(found[0]):04X} at character {found.start() + 1}"
        if found[0] < "\ud800":
            raise RecordError(f"`{name}` holds the control character {code}", "control character")
        raise RecordError(f"`{name}` holds half of a surrogate pair, {code}", "lone surrogate")


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A document of plain text; raises RecordError when `text` or `id` is empty."""

    id: str
    text: str

    def __post_init__(self) -> None:
        _check_text(self.id, "id")
        _check_text(self.text, "text", MAX_TEXT_CHARS)


@dataclass(frozen=True, slots=True)
class TranslationRecord:
    """An English text and its Korean translation; raises RecordError when one side is empty."""

    id: str
    english: str
    korean: str

    def __post_init__(self) -> None:
        _check_text(self.id, "id")
        _check_text(self.english, "english")
        _check_text(self.korean, "korean")


@dataclass(frozen=True, slots=True)
class McqRecord:
    """A multiple-choice question with one right letter.

    `rationale` is empty, or maps field names out of FIELDS to text; it comes from the data, never from us.
    Raises RecordError when the question or an option is empty, or when there are fewer than 2 or more than 10 options.
    It also does so when the answer is none of the letters of the options.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    subject: str = ""
    rationale: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text(self.id, "id")
        _check_text(self.question, "question")
        if not 2 <= len(self.options) <= len(LETTERS):
            raise RecordError(
                f"{len(self.options)} options; a question needs 2 to {len(LETTERS)}", "too few or too many options"
            )
        for letter, option in zip(LETTERS, self.options, strict=False):
            _check_text(option, f"option {letter}")
        if self.answer not in self.letters or len(self.answer) != 1:
            raise RecordError(
                f"answer {self.answer!r} is none of the options {', '.join(self.letters)}", "answer is no option"
            )
        for name, text in self.rationale.items():
            if name not in FIELDS:
                raise RecordError(f"rationale field {name!r} is none of {', '.join(FIELDS)}", "rationale")
            _check_text(text, f"rationale.{name}", MAX_TEXT_CHARS)

    @property
    def letters(self) -> str:
        """The letters of this question's options, e.g. "ABCDE"."""
        return LETTERS[: len(self.options)]


Record = TextRecord | TranslationRecord | McqRecord
