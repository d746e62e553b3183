"""Rows of JSON and plain lines out of a binary stream; a row that cannot be taken apart becomes a Broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from medlora.bounds import MAX_ARRAY_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES, read_bounded_lines, shorten
from medlora.errors import InputError

FileRow = tuple[str, object]
"""Where a row is (`file:line`) and what it holds: a mapping of columns, a Broken, or a finished record."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not even be taken apart; `kind` is the class of the reason, `content` the row as text."""

    kind: str
    reason: str
    content: str


def decode_line(line: bytes) -> str | Broken:
    """A line as text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 ({error.reason} at byte {error.start + 1} of the line); save the file as UTF-8, or give its `encoding`"
        return Broken("not UTF-8", reason, line.decode("utf-8", "backslashreplace"))


def read_lines(name: str, file: IO[bytes], start: int, is_json: bool) -> Iterator[FileRow]:
    """JSON lines or lines of plain text, from row `start` on; blank lines are no rows."""
    row = 0
    for number, line in enumerate(read_bounded_lines(name, file), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        row += 1
        if row <= start:
            continue
        text = decode_line(line)
        if isinstance(text, Broken):
            yield f"{name}:{number}", text
        elif not is_json:
            yield f"{name}:{number}", {"text": text}
        else:
            parsed = _parse_json(text)
            if row == 1 and isinstance(parsed, Broken) and text.strip() == "{":
                raise InputError(
                    f"{name}: is one JSON object over many lines; rows are lines of JSON or the items of one array"
                )
            yield f"{name}:{number}", parsed


def _parse_json(text: str) -> object:
    try:
        _check_shape(text)
        return json.loads(text, object_pairs_hook=_refuse_twice, parse_int=_read_int)
    except json.JSONDecodeError as error:
        return Broken("broken JSON", f"not valid JSON at column {error.colno}: {error.msg}", text)
    except _RefusedError as error:
        return Broken(error.kind, error.reason, text)


class _RefusedError(Exception):
    """JSON that is valid, or may be, and yet no row."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.S)


_MOST_OPENED = 8_000_000
"""Lists and mappings in one JSON array."""


_FEW_BYTES = 2**20
"""A shorter row can hold no more values than MAX_VALUES."""


def _check_shape(text: str) -> None:
    """Raise _RefusedError for more values, or deeper nesting, than a row has; before anything is built of it."""
    opened = text.count("[") + text.count("{")
    if opened <= MAX_DEPTH and len(text) <= _FEW_BYTES:
        return
    bare = _STRING.sub("", text)
    values = bare.count(",") + bare.count("[") + bare.count("{")
    if values > MAX_VALUES:
        raise _RefusedError("absurd length", f"not a row: {values:,} values in it, more than {MAX_VALUES:,}")
    depth = 0
    for mark in re.findall(r"[\[\]{}]", bare):
        depth += 1 if mark in "[{" else -1
        if depth > MAX_DEPTH:
            raise _RefusedError("broken JSON", f"not a row: nested more than {MAX_DEPTH} deep")


def _read_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        raise _RefusedError(
            "absurd length", f"not a row: a whole number of {len(digits):,} digits, more than {MAX_DIGITS}"
        )
    return int(digits)


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError("key twice", f"the key {shorten(twice)} appears twice in one object")
    return found


def read_array(name: str, file: IO[bytes]) -> Iterator[FileRow]:
    """The items of one JSON array; raises InputError where it is broken, or too large to be held in memory."""
    content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise InputError(
            f"{name}: one JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB would sit in memory as a whole; write its "
            "items as lines (`jq -c '.[]' FILE > FILE.jsonl`)"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{name}:{line}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    try:
        yield from _parse_array(name, text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except _RefusedError as error:
        raise InputError(f"{name}: {error.reason}") from None


def _parse_array(name: str, text: str) -> Iterator[FileRow]:
    """The items of an array with the lines they begin in; `#item` distinguishes those that share a line."""
    _check_array(text)
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_twice, parse_int=_read_int)
    at, line, before = text.index("[") + 1, 1, 0
    counted = item = 0
    while True:
        at = _skip_space(text, at)
        if text[at : at + 1] == "]" and item == 0:
            break
        row, end = decoder.raw_decode(text, at)
        item += 1
        line += text.count("\n", counted, at)
        counted = at
        yield (f"{name}:{line}" if line > before else f"{name}:{line}#{item}"), row
        before = line
        at = _skip_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at += 1
    if rest := text[at + 1 :].strip():
        raise json.JSONDecodeError(f"Extra data behind the array ({rest[:20]!r})", text, at + 1)


def _check_array(text: str) -> None:
    """As `_check_shape` for the items of an array: nesting, and so many lists that memory would not hold them."""
    if (opened := text.count("[") + text.count("{")) > _MOST_OPENED:
        raise _RefusedError("absurd length", f"{opened:,} lists and mappings in one array; write its items as lines")
    depth = 0
    for mark in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if mark in "[{" else -1
        if depth > MAX_DEPTH + 1:
            raise _RefusedError("broken JSON", f"its items are nested more than {MAX_DEPTH} deep")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
