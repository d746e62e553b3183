"""Rows of tables in text: CSV by commas, semicolons or tabs, with or without a header."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from medlora.bounds import MAX_COLUMNS, MAX_LINE_BYTES, list_names, shorten
from medlora.data.reading.formats import Broken, FileRow
from medlora.data.rows.schemas import find_schema
from medlora.errors import InputError
from medlora.records import MAX_TEXT_CHARS

HEADERS = {"question", "answer", "text", "id", "english", "korean", "stem", "options", "subject"}
"""A first row that holds one of these is a header, though its last cell may be a letter, too."""


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


_LOOKED_AT = 50
"""Rows by which a separator is found."""


_SEP_LINE = re.compile(r'"?sep=(.)"?[;,\t]*\r?\n?', re.I)
"""What Excel writes above a table to name its separator."""


def read_csv(name: str, file: io.BufferedReader[Any], separator: str = "auto") -> Iterator[FileRow]:
    """The rows of a CSV by its header, or by `name_columns` where it has none."""
    delimiter, above = find_separator(name, file.peek(1), separator)
    csv.field_size_limit(MAX_TEXT_CHARS)
    lines = _read_text_lines(name, file)
    reader = csv.reader(islice(lines, above, None), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1 + above
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise InputError(
                    f"{name}:{line}: a cell of more than {MAX_TEXT_CHARS:,} characters begins in this row; close its quote"
                ) from None
            reason = f"not valid CSV up to line {reader.line_num + above}: {error}"
            yield f"{name}:{line}", Broken("broken CSV", reason, "")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = check_header(f"{name}:{line}", cells)
            if [cell.strip() for cell in cells] == header:
                continue
        yield f"{name}:{line}", take_cells(header, cells)


def _read_text_lines(name: str, file: io.BufferedReader[Any]) -> Iterator[str]:
    # Bytes that are no UTF-8 become lone surrogates, so that one bad row does not take the others along.
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    number = 0
    while line := text.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{name}:{number}: the line is longer than {MAX_LINE_BYTES:,} characters; no row is")
        yield line


def find_separator(name: str, sample: bytes, wanted: str = "auto") -> tuple[str, int]:
    """What separates the cells of a table, and how many lines are above it, by its first bytes.

    The separator is the one by which the header names a known schema, else the one that cuts all rows alike. Raises
    InputError where two of them do.
    """
    lines = sample.decode("utf-8", "replace").removeprefix("\ufeff").splitlines(keepends=True)
    above = _SEP_LINE.fullmatch(lines[0]) if lines else None
    if wanted != "auto" or above:
        return ("\t" if wanted == "tab" else wanted) if wanted != "auto" or not above else above[1], int(bool(above))
    if re.search(r"\.tsv(\.gz|\.zst)?(\?|$)", name):
        return "\t", 0
    if len(lines) > 2 and not lines[-1].endswith(("\n", "\r")):
        lines.pop()  # perhaps cut off
    tables = {sep: _cut(lines, sep) for sep in SEPARATORS}
    cut = {sep: rows for sep, rows in tables.items() if rows and 1 < len(rows[0]) <= MAX_COLUMNS}
    if len(cut) < 2:
        return next(iter(cut), ","), 0
    known = [sep for sep, rows in cut.items() if find_schema([dict.fromkeys(name_columns(rows[0]), "")])]
    even = [sep for sep, rows in cut.items() if len({len(row) for row in rows}) == 1 and len(rows) > 1]
    found = known if len(known) == 1 else even
    if len(found) > 1:
        both = " and ".join(f"{SEPARATORS[sep]} ({sep!r})" for sep in found)
        raise InputError(
            f"{name}: {both} both cut every row into equally many cells; name the one that is meant: "
            f"separator: {found[0]!r} in the source"
        )
    return found[0] if found else "," if "," in cut else next(iter(cut)), 0


def _cut(lines: Iterable[str], separator: str) -> list[list[str]]:
    """The first rows that are not blank; none where the text is no such table."""
    rows: list[list[str]] = []
    try:
        for cells in csv.reader(lines, strict=True, delimiter=separator):
            if any(cell.strip() for cell in cells):
                rows.append(cells)
            if len(rows) == _LOOKED_AT:
                break
    except csv.Error:
        return rows[:-1] if len(rows) > 1 else rows
    return rows


def check_header(where: str, cells: list[str]) -> list[str]:
    """The columns of a table by its first row; raises InputError where they are too many or one appears twice."""
    if len(cells) > MAX_COLUMNS:
        raise InputError(
            f"{where}: the header has {len(cells):,} columns, more than {MAX_COLUMNS:,}; keep what is needed"
        )
    header = name_columns(cells)
    if twice := [name for name, count in Counter(header).items() if count > 1 and name]:
        raise InputError(f"{where}: the column {shorten(twice[0])} appears twice in the header; rename or remove one")
    return header


def take_cells(header: list[str], cells: list[str]) -> object:
    """A row by its header, or why it is none."""
    if (bad := next((cell for cell in cells if re.search("[\udc80-\udcff]", cell)), None)) is not None:
        content = ",".join(cells).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        reason = f"is not UTF-8 ({bad[:20]!a}...); save the file as UTF-8, or give its `encoding`"
        return Broken("not UTF-8", reason, content)
    if len(cells) != len(header):
        reason = f"{len(cells)} cells, but there are {len(header)} columns ({list_names(header)})"
        return Broken("cells do not fit", reason, ",".join(cells))
    return dict(zip(header, cells, strict=True))


def name_columns(cells: list[str]) -> list[str]:
    """The columns of a CSV by its first row: its header, or (as MMLU has it) `question`, letters and `answer`.

    Without a header the last cell is the answer's letter.
    """
    letters = "ABCDEFGHIJ"[: len(cells) - 2]
    names = {cell.strip().lower() for cell in cells}
    if not names & HEADERS and len(letters) >= 2 and len(cells[-1].strip()) == 1 and cells[-1].strip() in letters:
        return ["question", *letters, "answer"]
    return [cell.strip() for cell in cells]
