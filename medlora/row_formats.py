"""Rows of JSON, CSV and plain lines out of a binary stream; a row that cannot be taken apart becomes a Broken."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from medlora.errors import InputError
from medlora.records import MAX_TEXT_CHARS

HEADERS = {"question", "answer", "text", "id", "english", "korean", "stem", "options", "subject"}
"""A first row that holds one of these is a header, though its last cell may be a letter, too."""
_MAX_ARRAY_BYTES = 256 * 2**20

Row = tuple[str, Any]
"""Where a row stands (`file:line`) and what it holds: a mapping of columns, a Broken, or a finished record."""


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
        reason = f"is not UTF-8 ({error.reason} at byte {error.start + 1} of the line); save the file as UTF-8"
        return Broken("not UTF-8", reason, line.decode("utf-8", "backslashreplace"))


def read_lines(name: str, file: IO[bytes], start: int, is_json: bool) -> Iterator[Row]:
    """JSON lines or lines of plain text, from row `start` on; blank lines are no rows."""
    row = 0
    for number, line in enumerate(file, 1):
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


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_refuse_twice)
    except json.JSONDecodeError as error:
        return Broken("broken JSON", f"not valid JSON at column {error.colno}: {error.msg}", text)
    except _TwiceError as error:
        return Broken("key twice", f"the key {error.args[0]!r} stands twice in one object", text)
    except RecursionError:
        return Broken("broken JSON", "not a row: JSON nested too deeply", text[:1000])


class _TwiceError(Exception):
    pass


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError(next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))
    return found


def read_array(name: str, file: IO[bytes]) -> Iterator[Row]:
    """The items of one JSON array; raises InputError where it is broken, or too large to be held in memory."""
    content = file.read(_MAX_ARRAY_BYTES + 1)
    if len(content) > _MAX_ARRAY_BYTES:
        raise InputError(
            f"{name}: one JSON array of more than {_MAX_ARRAY_BYTES >> 20} MiB would sit in memory as a whole; write its "
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
    except _TwiceError as error:
        raise InputError(f"{name}: the key {error.args[0]!r} stands twice in one object") from None


def _parse_array(name: str, text: str) -> Iterator[Row]:
    """The items of an array with the lines they begin in; `#item` tells those apart that share a line."""
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_twice)
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


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def read_csv(name: str, file: IO[bytes]) -> Iterator[Row]:
    """The rows of a CSV by its header, or by `_name_columns` where it has none."""
    # Bytes that are no UTF-8 become lone surrogates, so that one bad row does not take the others along.
    csv.field_size_limit(MAX_TEXT_CHARS)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{name}:{line}", Broken("broken CSV", f"not valid CSV up to line {reader.line_num}: {error}", "")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _name_columns(cells)
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise InputError(f"{name}:{line}: the column {twice!r} stands twice in the header")
            if [cell.strip() for cell in cells] == header:
                continue
        yield f"{name}:{line}", _take_cells(header, cells)


def _take_cells(header: list[str], cells: list[str]) -> Any:
    if (bad := next((cell for cell in cells if re.search("[\udc80-\udcff]", cell)), None)) is not None:
        content = ",".join(cells).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return Broken("not UTF-8", f"is not UTF-8 ({bad[:20]!a}...); save the file as UTF-8", content)
    if len(cells) != len(header):
        return Broken("cells do not fit", f"{len(cells)} cells, but there are {len(header)} columns", ",".join(cells))
    return dict(zip(header, cells, strict=True))


def _name_columns(cells: list[str]) -> list[str]:
    """The columns of a CSV by its first row: its header, or (as MMLU has it) `question`, letters and `answer`.

    Without a header the last cell is the answer's letter.
    """
    letters = "ABCDEFGHIJ"[: len(cells) - 2]
    names = {cell.strip().lower() for cell in cells}
    if not names & HEADERS and len(letters) >= 2 and len(cells[-1].strip()) == 1 and cells[-1].strip() in letters:
        return ["question", *letters, "answer"]
    return [cell.strip() for cell in cells]
