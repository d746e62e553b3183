"""Checksums inside our own JSON, of a line or of a whole file: a flipped bit is noticed and never read as a value.

What was written before there were checksums has none and is still read.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping

CRC = "crc"
"""The last key of a line, and a key of a file, that holds the checksum of the rest."""


_CHECKED_LINE = re.compile(rb'(.*?)(?:, )?"([^"]{1,6})": ?"([^"]{0,12})"\}', re.DOTALL)


def make_line(row: Mapping[str, object]) -> str:
    """The row as a line of JSON whose last key is its checksum."""
    text = json.dumps(row, ensure_ascii=False)
    return f'{text[:-1]}{", " if row else ""}"{CRC}": "{_sum(text.encode())}"}}'


def open_line(line: bytes) -> dict[str, object] | None:
    """The row of a line that `make_line` made, or of an older one without checksum; None when it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    found = _CHECKED_LINE.fullmatch(line)
    if found is None or len(found[3]) != 8:
        return None if CRC in row else row
    # A last key that is nearly ours, with what is nearly a checksum, is ours after damage.
    if found[2] != CRC.encode():
        near = any(_is_nearly_ours(key, value) for key, value in row.items())
        return None if near else row
    if _sum(found[1] + b"}") != found[3].decode("utf-8", "replace"):
        return None
    del row[CRC]
    return row


def add_checksum(content: Mapping[str, object]) -> dict[str, object]:
    """A mapping with the checksum of its other keys."""
    return {**content, CRC: _sum_values({key: value for key, value in content.items() if key != CRC})}


def remove_checksum(content: object) -> object:
    """What `add_checksum` was given; None when it is damaged. A value without a checksum is as it is."""
    if not isinstance(content, dict):
        return content
    if CRC not in content:
        return None if any(_is_nearly_ours(key, value) for key, value in content.items()) else content
    rest = {key: value for key, value in content.items() if key != CRC}
    return rest if _sum_values(rest) == content[CRC] else None


def _is_nearly_ours(key: str, value: object) -> bool:
    """Whether a key is ours but for one character, and its value looks like a checksum."""
    near = len(key) == len(CRC) and sum(a != b for a, b in zip(key, CRC, strict=True)) == 1
    return near and isinstance(value, str) and len(value) == 8


def _sum_values(content: Mapping[str, object]) -> str:
    # Through JSON and back: keys are text then, and sort as they will when the file is read.
    plain = json.loads(json.dumps(content))
    return _sum(json.dumps(plain, sort_keys=True).encode())


def _sum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
