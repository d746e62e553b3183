"""Files and objects as streams of UTF-8 text: unpacked, recoded, bounded; errors name the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from medlora.bounds import check_growth
from medlora.data.reading.encodings import Recoded, recognise
from medlora.errors import InputError
from medlora.runs.object_store import is_store, open_store

PACKED = (".gz", ".zst")
"""Endings that may follow SUFFIXES: pyarrow unpacks them."""


_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "a PDF",
    b"\x1f\x8b": "gzip",
}
"""First bytes of files that are no UTF-8 text, whatever their name."""


def open_text(name: str, encoding: str = "auto") -> io.BufferedReader[Any]:
    """A binary stream of a file, unpacked and in UTF-8, that holds something and begins like text."""
    packed = name.partition("?")[0].endswith(PACKED)
    try:
        if packed or is_store(name):
            store, path = open_store(name if is_store(name) else str(Path(name).absolute()))
            raw: io.RawIOBase = _RawStream(store, path, name, packed)
        else:
            raw = _PlainFile(name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or str(error).splitlines()[0]}") from None
    file = io.BufferedReader(raw, 2**20)
    _check_beginning(name, file.peek(1))
    chosen = recognise(file.peek(1)) if encoding == "auto" else encoding.replace("euc-kr", "cp949")
    return file if chosen == "utf-8" else io.BufferedReader(Recoded(file, chosen), 2**20)


class _PlainFile(io.FileIO):
    """A file whose errors name it."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from None


class _RawStream(io.RawIOBase):
    """A pyarrow stream for io.BufferedReader, unpacked while it grows like text; its errors name the file."""

    def __init__(self, store: Any, path: str, name: str, packed: bool) -> None:
        import pyarrow

        self.packed = _Counted(store.open_input_stream(path, compression=None))
        kind = "gzip" if path.endswith(".gz") else "zstd"
        self.stream = (
            pyarrow.CompressedInputStream(pyarrow.PythonFile(self.packed, "r"), kind) if packed else self.packed
        )
        self.file, self.unpacked = name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self.stream.read(len(buffer))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be unpacked: {str(error).splitlines()[0]}") from None
        self.unpacked += len(content)
        if self.stream is not self.packed:
            check_growth(self.file, self.packed.taken, self.unpacked)
        buffer[: len(content)] = content
        return len(content)


class _Counted(io.RawIOBase):
    """A stream that counts what was taken of it, at first in small pieces: so that a bomb shows before it has grown."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.taken = stream, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content: bytes = self.stream.read(min(size, 2**12) if self.taken < 2**20 and size > 0 else size)
        self.taken += len(content)
        return content


def _check_beginning(name: str, first: bytes) -> None:
    if not first:
        raise InputError(f"{name}: the file is empty")
    if found := next((what for mark, what in _MARKS.items() if first.startswith(mark)), None):
        raise InputError(f"{name}: is {found}, not UTF-8 text; save it as UTF-8, or under the ending of its format")
