"""Rows -> records by their schema: options, answers, rationales, and why a row makes no record."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from medlora.bounds import list_names, name_type, shorten
from medlora.config.sources import AnswerColumn, Columns
from medlora.data.rows.exam_columns import rename_columns
from medlora.data.rows.gold import fold, read_gold, read_number
from medlora.data.rows.option_lists import list_options
from medlora.data.rows.option_marks import read_mark, strip_marks
from medlora.data.rows.schemas import EXAMS, LETTER_COLUMNS, Schema, suggest
from medlora.records import FIELDS, LETTERS, McqRecord, Record, RecordError, TextRecord, TranslationRecord

_LOST = re.compile("[\ufffd\x80-\x84\x86-\x9f]")
"""What replaces a character that was lost: the replacement character, or a byte of cp1252 that was read as Latin-1."""


_RATIONALE_COLUMNS = ("rationale", "reasoning", "explanation", "cot")


_PICTURES = re.compile(
    r"(?:images?|img|figures?|pictures?|photos?|그림|사진|이미지)(?:[_ ]?(?:\d+|path|file|url))?", re.I
)


def find_first_number(answers: Iterable[tuple[str, object, int]]) -> int | None:
    """Number of the first option by the data: `answers` are (place, answer, number of options) of every row.

    None where no answer is a number. Raises RecordError where the numbers show neither 0 nor as many as there are
    options, or both.
    """
    zero = full = None
    numbers = False
    for where, answer, count in answers:
        number = read_number(answer)
        if number is None:
            continue
        numbers = numbers or 0 <= number <= count
        zero = where if number == 0 and zero is None else zero
        full = where if number == count and full is None else full
        if zero is not None and full is not None:
            break
    if zero is not None and full is not None:
        raise RecordError(
            f"answers are both 0 ({zero}) and as many as there are options ({full}); say whether the first option is 0 or "
            "1: columns.answer.base",
            "unclear base",
        )
    if zero is None and full is None and numbers:
        raise RecordError(
            "answers are numbers, none of them 0 or as many as there are options; say whether the first option is 0 or 1: "
            "columns.answer.base",
            "unclear base",
        )
    return None if not numbers else 0 if zero is not None else 1


def get_answer(row: Any, schema: Schema) -> tuple[object, int] | None:
    """The answer of a row as written and the number of its options, for `find_base`; None where there is neither."""
    try:
        row = _rename(row, schema)
        options, start = _get_options(row, schema.columns)
        return (row[_answer_of(schema).column], len(options)) if start is None else None
    except (RecordError, KeyError, TypeError):
        return None


def _answer_of(schema: Schema) -> AnswerColumn:
    answer = schema.columns.answer
    return answer if isinstance(answer, AnswerColumn) else AnswerColumn(column=str(answer))


def to_record(
    row: Any, schema: Schema, default_id: str, base: int | None = None, subject: str | None = None, nfc: bool = False
) -> tuple[Record, list[str]]:
    """A row as the record its schema makes of it, and its flags: what is odd about it though it is valid.

    `base` is the number of the first option, `subject` names the column of a question's subject, `nfc` composes all text.
    Raises RecordError with the reason when the row makes no record.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"a row is a mapping of columns, found {name_type(row)}", "no mapping")
    row = _rename(row, schema)
    for column in schema.needs:
        if column not in row and column not in LETTER_COLUMNS[2:]:
            close = suggest(column, row)
            hint = f"; is it `{close}`?" if close else ""
            raise RecordError(f"no `{column}` column; found {list_names(row)}{hint}", "missing column")
    if nfc:
        row = _compose(row)
    columns = schema.columns
    flags: list[str] = []
    identity = row.get(columns.id) if columns.id else None
    identity = default_id if identity is None or identity == "" else str(identity)
    record: Record
    if columns.text:
        record = TextRecord(identity, row[columns.text])
        texts: tuple[str, ...] = (record.text,)
    elif columns.english and columns.korean:
        record = TranslationRecord(identity, row[columns.english], row[columns.korean])
        texts = (record.english, record.korean)
    else:
        record, flags = _to_mcq(row, schema, identity, base, subject)
        texts = (record.question, *record.options)
    if any(_LOST.search(text) for text in texts):
        flags.append("lost characters (U+FFFD, U+0080 to U+009F)")
    if not all(unicodedata.is_normalized("NFC", text) for text in texts):
        flags.append("not composed (Unicode NFC)")
    flags += [f"column `{name}` is not empty, and pictures are not read" for name in row if _holds_picture(name, row)]
    return record, flags


@lru_cache(maxsize=1024)
def _is_picture(name: str) -> bool:
    return _PICTURES.fullmatch(name.strip()) is not None


def _holds_picture(name: object, row: Mapping[str, object]) -> bool:
    if not isinstance(name, str) or len(name) > 40 or not _is_picture(name):
        return False
    value = row[name]
    return bool(value) and value == value and str(value).strip().casefold() not in ("", "nan", "none", "null", "[]")


def _rename(row: object, schema: Schema) -> object:
    """The row of an exam under our names of columns."""
    return (rename_columns(row) or row) if schema.name in EXAMS and isinstance(row, Mapping) else row


def _compose(value: object) -> object:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {name: _compose(part) for name, part in value.items()}
    return [_compose(part) for part in value] if isinstance(value, list) else value


def _to_mcq(
    row: Mapping[str, object], schema: Schema, identity: str, base: int | None, subject: str | None
) -> tuple[McqRecord, list[str]]:
    columns, answer = schema.columns, _answer_of(schema)
    if subject is not None and subject not in row:
        raise RecordError(f"no column {subject!r} for the subject; found {list_names(row)}", "missing column")
    options, start = _get_options(row, columns)
    if not 2 <= len(options) <= len(LETTERS):
        raise RecordError(
            f"{len(options)} options; a question needs 2 to {len(LETTERS)}", "too few or too many options"
        )
    options, marked = strip_marks(options)
    first = base if answer.base == "data" else answer.base
    first = (1 if start is None else start) if first is None else first
    if start not in (None, first) and read_number(row[answer.column]) is not None:
        raise RecordError(
            f"the options are numbered from {start}, but answers from {first}; say columns.answer.base: {start}",
            "ambiguous answer",
        )
    letter, flags = read_gold(row[answer.column], options, first, schema.pinned)
    if marked:
        flags.append("options carried marks of their own (①, 1., A.)")
    record = McqRecord(
        identity,
        _cut(row[str(columns.question)], schema.cut),
        options,
        letter,
        str(row.get(subject or columns.subject or "subject") or ""),
        _get_rationale(row, columns.rationale),
    )
    if schema.answer_text and isinstance(given := row.get(schema.answer_text), str):
        right = options[LETTERS.index(letter)]
        # Files that give the letter twice mean no text by it.
        mark = read_mark(given) if marked else None
        if fold(given) not in (fold(right), letter.casefold()) and not (mark and fold(mark.rest) == fold(right)):
            raise RecordError(
                f"answer {letter} is {shorten(right)}, but `{schema.answer_text}` says {shorten(given)}",
                "letter and text disagree",
            )
    plain = [fold(option) for option in options]
    if len(set(plain)) < len(plain):
        flags.append("two options of one text")
    if all(re.fullmatch(r"[0-9]{1,2}|[a-j]", option) for option in plain):
        flags.append("options are bare numbers or letters")
    return record, flags


def _cut(question: object, pattern: str) -> Any:
    return re.sub(rf"(?s){pattern}\Z", "", question) if pattern and isinstance(question, str) else question


def _get_options(row: Mapping[str, object], columns: Columns) -> tuple[tuple[Any, ...], int | None]:
    """The options in order, and the number of the first where they are keyed by numbers."""
    named = columns.options
    found: list[object]
    if named == LETTER_COLUMNS:
        found = [row[letter] for letter in LETTERS if letter in row]
    elif isinstance(named, str):
        return list_options(row[named], named)
    else:
        found = [row.get(column) for column in named or ()]
    # An option column left empty at the end (four options in a five-column file) is no option.
    while found and found[-1] in (None, ""):
        found.pop()
    return tuple(found), None


def _get_rationale(row: Mapping[str, object], column: str | None) -> dict[str, str]:
    names = (column,) if column else _RATIONALE_COLUMNS
    found = next((row[name] for name in names if row.get(name)), None)
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return {str(name): text for name, text in found.items() if text}
    if not isinstance(found, str):
        raise RecordError(
            f"a rationale is text or a mapping of {', '.join(FIELDS)}, found {name_type(found)}", "rationale"
        )
    parts = re.split(rf"^({'|'.join(FIELDS)}):[ \t]*", found.strip(), flags=re.MULTILINE)
    if len(parts) > 1 and not parts[0].strip():
        return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()}
    return {"analysis": found.strip()} if found.strip() else {}
