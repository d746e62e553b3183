"""How much of a source is read at once, and how much of it a message shows: what docs/data.md calls limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import IO, TypeVar

from medlora.errors import InputError

_Part = TypeVar("_Part")

MAX_LINE_BYTES = 64 * 2**20
"""Longest line; a document of MAX_TEXT_CHARS in Korean fits."""
MAX_ARRAY_BYTES = 256 * 2**20
"""Largest JSON array, which sits in memory as a whole."""
MAX_VALUES = 1_000_000
"""Most lists, mappings and items of one JSON row."""
MAX_DEPTH = 64
"""Deepest nesting of a row."""
MAX_DIGITS = 100
"""Longest whole number, in digits."""
MAX_COLUMNS = 10_000
"""Most columns of a table."""
MAX_RATIO = 200
"""Most times that an archive may grow when it is unpacked, once it gave _FREE_BYTES."""
_FREE_BYTES = 4 * 2**20
MAX_USELESS_ROWS = 100_000
"""Bad rows without one record among them after which a source is not read on."""

_SHOWN_CHARS, _SHOWN_NAMES = 200, 20
_ROW_CHARS, _ROW_PARTS, _ROW_DEPTH = 20_000, 200, 8


def shorten(value: object, chars: int = _SHOWN_CHARS) -> str:
    """A value as a message shows it: as Python writes it, cut where it is long, nothing that a terminal would obey."""
    if isinstance(value, str | bytes):
        cut = len(value) - chars
        return repr(value[:chars]) + (f"... and {cut:,} characters more" if cut > 0 else "")
    if isinstance(value, Mapping | Sequence):
        value = bound_row(value, chars)
    text = repr(value)
    return text if len(text) <= chars else f"{text[:chars]}... and {len(text) - chars:,} characters more"


def clean(text: str, chars: int = _SHOWN_CHARS) -> str:
    """A text as a message shows it without quotes: cut where it is long, control characters spelled out."""
    shown = re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e]", lambda found: repr(found[0])[1:-1], text[:chars])
    return shown + (f"... and {len(text) - chars:,} characters more" if len(text) > chars else "")


def list_names(names: Iterable[object]) -> str:
    """Names of columns, the first of them, for a message."""
    names = list(names)
    shown = ", ".join(clean(str(name), 60) for name in names[:_SHOWN_NAMES])
    return shown + (f", and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else "")


def bound_row(row: object, chars: int = _ROW_CHARS) -> object:
    """A row as the quarantine holds it: the same shape, long texts cut, at most _ROW_PARTS parts, _ROW_DEPTH deep."""
    room = [chars, _ROW_PARTS]

    def bound(value: object, depth: int) -> object:
        if isinstance(value, Mapping | list | tuple) and depth == 0:
            return "..."
        if isinstance(value, Mapping):
            return {bound(str(name), depth): bound(part, depth - 1) for name, part in take(value.items())}
        if isinstance(value, list | tuple):
            return [bound(part, depth - 1) for part in take(value)]
        if isinstance(value, bytes | bytearray):
            value = repr(bytes(value[: max(room[0], 0)]))
        if isinstance(value, str) and len(value) > max(room[0], 0):
            value = f"{value[: max(room[0], 0)]}... ({len(value):,} characters)"
        if isinstance(value, str):
            room[0] -= len(value)
        return value

    def take(parts: Iterable[_Part]) -> Iterator[_Part]:
        for part in parts:
            if room[1] <= 0:
                return
            room[1] -= 1
            yield part

    return bound(row, _ROW_DEPTH)


def read_bounded_lines(name: str, file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; raises InputError at one of more than MAX_LINE_BYTES, of which no more is read."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{name}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB, so this is no file of rows or of "
                "lines; cut it into documents, one a line"
            )
        yield line


def check_growth(name: str, packed: int, unpacked: int) -> None:
    """Raise InputError where an archive has grown more than real text does."""
    if unpacked > _FREE_BYTES and unpacked > MAX_RATIO * max(packed, 1):
        raise InputError(
            f"{name}: unpacks to more than {MAX_RATIO} times its size ({unpacked:,} bytes out of {packed:,}); no text does, "
            "so it may be a bomb; unpack it yourself if it is real"
        )


def name_type(value: object) -> str:
    """What a message calls the kind of a value."""
    kinds: list[tuple[type | UnionType, str]] = [
        (type(None), "nothing"),
        (bool, "true or false"),
        (int | float, "a number"),
    ]
    kinds += [(str, "a text"), (Mapping, "a mapping"), (list | tuple, "a list")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)
