"""Rows of Excel workbooks (.xlsx), through openpyxl: `pip install 'medlora[excel]'`."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from medlora.bounds import MAX_RATIO, clean
from medlora.data.reading.formats import Broken, FileRow
from medlora.data.reading.tables import check_header, take_cells
from medlora.errors import InputError

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

_MAX_BYTES = 2**30
"""Most bytes of a workbook, unpacked."""


def read_workbook(name: str, file: IO[bytes]) -> Iterator[FileRow]:
    """The rows of the one sheet that holds any, by its header; every cell as the text that a CSV would hold.

    Raises InputError without openpyxl, for what is no workbook or grows too much, and where several sheets hold rows.
    """
    try:
        import openpyxl
    except ImportError:
        raise InputError(
            f"{name}: reading .xlsx needs openpyxl: pip install 'medlora[excel]'; or save the sheet as CSV UTF-8"
        ) from None
    try:
        _check_size(name, file)
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        sheets = [sheet for sheet in book.worksheets if _holds_rows(sheet)]
        if len(sheets) != 1:
            titles = ", ".join(repr(sheet.title) for sheet in sheets) or "none"
            raise InputError(
                f"{name}: sheets with rows: {titles}; a source is one sheet: remove the others, or save it as CSV UTF-8"
            )
        yield from _read_sheet(name, sheets[0])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, OSError, SyntaxError) as error:
        reason = clean(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise InputError(f"{name}: is no readable Excel workbook: {reason}") from None


def _check_size(name: str, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    packed, whole = sum(part.compress_size for part in parts), sum(part.file_size for part in parts)
    if whole > _MAX_BYTES or (whole > 2**26 and whole > MAX_RATIO * packed):
        raise InputError(
            f"{name}: unpacks to {whole:,} bytes, more than a workbook of rows; save the sheet as CSV UTF-8"
        )
    file.seek(0)


def _holds_rows(sheet: ReadOnlyWorksheet) -> bool:
    return any(cell not in (None, "") for row in sheet.iter_rows(max_row=100, values_only=True) for cell in row)


def _read_sheet(name: str, sheet: ReadOnlyWorksheet) -> Iterator[FileRow]:
    header: list[str] | None = None
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        where = f"{name}:{number}"
        # Excel counts formatted cells behind the table, too.
        used = list(values[: len(header)]) if header and not any(values[len(header) :]) else list(values)
        if not any(value not in (None, "") for value in used):
            continue
        date = next((value for value in used if isinstance(value, datetime.date | datetime.time)), None)
        if date is not None and header is not None:
            reason = f"holds the date {date}; Excel makes dates of texts such as 1-2: format the cells as text"
            yield where, Broken("wrong type", reason, " | ".join(map(_spell, used)))
            continue
        cells = [_spell(value) for value in used]
        if header is None:
            while cells and not cells[-1].strip():
                cells.pop()
            header = check_header(where, cells)
            if [cell.strip() for cell in cells] == header:
                continue
        yield where, take_cells(header, cells + [""] * (len(header) - len(cells)))


def _spell(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
