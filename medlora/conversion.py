"""Rows -> records by their schema: options, answers, rationales, and why a row makes no record."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medlora.config_sources import AnswerColumn, Columns
from medlora.records import FIELDS, LETTERS, McqRecord, Record, RecordError, TextRecord, TranslationRecord
from medlora.schemas import LETTER_COLUMNS, Schema

_LOST = re.compile("[\ufffd\x80-\x84\x86-\x9f]")
"""What stands where a character was lost: the replacement character, or a byte of cp1252 that was read as Latin-1."""
_RATIONALE_COLUMNS = ("rationale", "reasoning", "explanation", "cot")


def find_base(answers: Iterable[tuple[str, Any, int]]) -> int | None:
    """Number of the first option by the data: `answers` are (place, answer, number of options) of every row.

    None where no answer is a number. Raises RecordError where the numbers show neither 0 nor as many as there are
    options, or both.
    """
    zero = full = None
    numbers = False
    for where, answer, count in answers:
        number = _read_number(answer)
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


def get_answer(row: Any, schema: Schema) -> tuple[Any, int] | None:
    """The answer of a row as it stands and the number of its options, for `find_base`; None where there is neither."""
    try:
        return row[_answer_of(schema).column], len(_get_options(row, schema.columns))
    except (RecordError, KeyError, TypeError):
        return None


def _answer_of(schema: Schema) -> AnswerColumn:
    answer = schema.columns.answer
    return answer if isinstance(answer, AnswerColumn) else AnswerColumn(column=str(answer))


def to_record(
    row: Any, schema: Schema, default_id: str, base: int | None = None, subject: str | None = None, nfc: bool = False
) -> tuple[Record, list[str]]:
    """A row as the record its schema makes of it, and its flags: what is odd about it though it is kept.

    `base` is the number of the first option, `subject` names the column of a question's subject, `nfc` composes all text.
    Raises RecordError with the reason when the row makes no record.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"a row is a mapping of columns, found {type(row).__name__}", "no mapping")
    for column in schema.needs:
        if column not in row and column not in LETTER_COLUMNS[2:]:
            close = difflib.get_close_matches(column, [str(name) for name in row], 1, 0.7)
            hint = f"; is it `{close[0]}`?" if close else ""
            raise RecordError(f"no `{column}` column; found {', '.join(map(str, row))}{hint}", "missing column")
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
    return record, flags


def _compose(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {name: _compose(part) for name, part in value.items()}
    return [_compose(part) for part in value] if isinstance(value, list) else value


def _to_mcq(
    row: Mapping[str, Any], schema: Schema, identity: str, base: int | None, subject: str | None
) -> tuple[McqRecord, list[str]]:
    columns, answer = schema.columns, _answer_of(schema)
    if subject is not None and subject not in row:
        raise RecordError(f"no column {subject!r} for the subject; found {', '.join(map(str, row))}", "missing column")
    options = _get_options(row, columns)
    if not 2 <= len(options) <= len(LETTERS):
        raise RecordError(
            f"{len(options)} options; a question needs 2 to {len(LETTERS)}", "too few or too many options"
        )
    first = base if answer.base == "data" else answer.base
    letter, flags = _to_letter(row[answer.column], options, 1 if first is None else first, schema.pinned)
    record = McqRecord(
        identity,
        _cut(row[str(columns.question)], schema.cut),
        options,
        letter,
        str(row.get(subject or columns.subject or "subject") or ""),
        _get_rationale(row, columns.rationale),
    )
    if schema.answer_text and isinstance(said := row.get(schema.answer_text), str):
        right = options[LETTERS.index(letter)]
        # Files that give the letter twice mean no text by it.
        if _match(said) not in (_match(right), letter.casefold()):
            raise RecordError(
                f"answer {letter} is {right!r}, but `{schema.answer_text}` says {said!r}", "letter and text disagree"
            )
    plain = [_match(option) for option in options]
    if len(set(plain)) < len(plain):
        flags.append("two options of one text")
    if all(re.fullmatch(r"[0-9]{1,2}|[a-j]", option) for option in plain):
        flags.append("options are bare numbers or letters")
    return record, flags


def _cut(question: Any, pattern: str) -> Any:
    return re.sub(rf"(?s){pattern}\Z", "", question) if pattern and isinstance(question, str) else question


def _match(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().casefold()


def _get_options(row: Mapping[str, Any], columns: Columns) -> tuple[Any, ...]:
    named = columns.options
    found: list[Any]
    if named == LETTER_COLUMNS:
        found = [row[letter] for letter in LETTERS if letter in row]
    elif isinstance(named, str):
        return _list_options(row[named], named)
    else:
        found = [row.get(column) for column in named or ()]
    # An option column left empty at the end (four options in a five-column file) is no option.
    while found and found[-1] in (None, ""):
        found.pop()
    return tuple(found)


def _list_options(found: Any, name: str) -> tuple[Any, ...]:
    """Options out of a list, a list of {letter, content}, a mapping of letters, or lines that begin with (A), B. or C)."""
    if isinstance(found, str):
        lines = [re.fullmatch(r"\s*\(?([A-Ja-j])[).:]\s*(.+?)\s*", line) for line in found.strip().splitlines()]
        if len(lines) < 2 or not all(lines):
            raise RecordError(f"`{name}` must be a list or a mapping, found a text", "wrong type")
        found = {line[1]: line[2] for line in lines if line}
    elif isinstance(found, Sequence) and found and all(isinstance(part, Mapping) for part in found):
        pairs = [(part.get("letter", part.get("key")), part.get("content", part.get("value"))) for part in found]
        found = {str(letter): text for letter, text in pairs}
        if len(found) < len(pairs):
            raise RecordError(f"`{name}` has a letter twice", "wrong letters")
    if isinstance(found, Mapping):
        # parquet and the hub fill up what other rows have
        found = {str(letter).strip().upper(): text for letter, text in found.items() if text is not None}
        letters = "".join(sorted(found))
        if letters != LETTERS[: len(letters)]:
            raise RecordError(f"`{name}` has the letters {', '.join(found)}, not A, B, ... in a row", "wrong letters")
        return tuple(found[letter] for letter in letters)
    if not isinstance(found, Sequence):
        raise RecordError(f"`{name}` must be a list or a mapping, found {type(found).__name__}", "wrong type")
    return tuple(found)


def _read_number(answer: Any) -> int | None:
    """A whole number, also as text or in a list of its own."""
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool):
        return None
    if isinstance(answer, float) and math.isfinite(answer) and answer.is_integer():
        return int(answer)
    if isinstance(answer, str) and re.fullmatch(r"\s*-?[0-9]{1,3}\s*", answer):
        return int(answer)
    return answer if isinstance(answer, int) else None


def _to_letter(answer: Any, options: Sequence[Any], first: int, pinned: bool) -> tuple[str, list[str]]:
    """The letter that an answer means, and flags; raises RecordError where it means none or might mean two."""
    letters = LETTERS[: len(options)]
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        if len(answer) != 1:
            shown = ", ".join(map(str, answer)) or "none"
            raise RecordError(f"{len(answer)} right answers ({shown}); a record has one", "several answers")
        answer = answer[0]
    if isinstance(answer, bool) or answer is None:
        raise RecordError(
            f"`answer` is {answer!r}; give a letter of {letters} or a number from {first}", "answer is no option"
        )
    named = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if isinstance(answer, str) and isinstance(option, str) and _match(option) == _match(answer)
    ]
    number = _read_number(answer)
    if number is not None:
        if not first <= number < first + len(options):
            raise RecordError(
                f"answer {answer!r} is outside {first}..{first + len(options) - 1}", "answer out of range"
            )
        return _agree(answer, letters[number - first], [] if pinned else named), []
    text = unicodedata.normalize("NFKC", str(answer)).strip()
    single = re.fullmatch(r"\(?([A-Za-z])[).]?", text)
    if isinstance(answer, str) and single and single[1].upper() in letters:
        flags = ["answer in lower case"] if single[1].islower() and not pinned else []
        return _agree(answer, single[1].upper(), [] if pinned else named), flags
    if isinstance(answer, str) and not named and re.fullmatch(rf"[{letters}](\s*[,;/]?\s*[{letters}])+", text):
        raise RecordError(f"several right answers ({text}); a record has one", "several answers")
    if len(named) > 1:
        raise RecordError(f"answer {answer!r} is the text of {' and '.join(named)}", "ambiguous answer")
    if named:
        return named[0], ["answer given as text"]
    raise RecordError(f"answer {answer!r} is none of the options {', '.join(letters)}", "answer is no option")


def _agree(answer: Any, letter: str, named: Sequence[str]) -> str:
    if named and letter not in named:
        raise RecordError(
            f"answer {answer!r} is the place of {letter} and the text of {' and '.join(named)}; give a letter, or say "
            "columns.answer.base",
            "ambiguous answer",
        )
    return letter


def _get_rationale(row: Mapping[str, Any], column: str | None) -> dict[str, str]:
    names = (column,) if column else _RATIONALE_COLUMNS
    found = next((row[name] for name in names if row.get(name)), None)
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return {str(name): text for name, text in found.items() if text}
    if not isinstance(found, str):
        raise RecordError(
            f"a rationale is text or a mapping of {', '.join(FIELDS)}, found {type(found).__name__}", "rationale"
        )
    parts = re.split(rf"^({'|'.join(FIELDS)}):[ \t]*", found.strip(), flags=re.MULTILINE)
    if len(parts) > 1 and not parts[0].strip():
        return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()}
    return {"analysis": found.strip()} if found.strip() else {}
