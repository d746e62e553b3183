"""Rows of files, folders, globs, object stores and the hub, one by one: where each stands and what it holds."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from medlora.errors import InputError
from medlora.records import MAX_TEXT_CHARS

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PACKED = (".gz", ".zst")
"""Endings that may stand behind SUFFIXES: pyarrow unpacks them."""
STORES = ("s3://", "gs://")
_GLOB = re.compile(r"[*?\[]")
_MAX_ARRAY_BYTES = 256 * 2**20
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive", b"%PDF": "a PDF", b"\x1f\x8b": "gzip"}
"""First bytes of what is no UTF-8 text, whatever its name says."""

Row = tuple[str, Any]
"""Where a row stands (`file:line`) and what it holds: a mapping of columns, a Broken, or a finished record."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not even be taken apart; `kind` is the class of the reason, `content` the row as text."""

    kind: str
    reason: str
    content: str


def list_files(name: str, kind: str = "auto") -> list[str]:
    """What a source is made of, in order: paths and URIs of files, or the source's own name where it is no file.

    `kind` `text` lets a file of any ending be lines of text. Raises InputError when nothing is there.
    """
    if name.startswith(("hf:", "miniature:")) or "|" in name:
        return [name]
    if name.startswith(STORES):
        return _list_store(name, kind)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if _has_known_ending(p.name) and p.is_file())
        if not files:
            raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if not path.is_file() and _GLOB.search(name):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not files:
            raise InputError(f"{name}: no file matches; sources are read relative to {Path.cwd()}")
    elif not path.is_file():
        raise InputError(f"{path}: there is no such file or folder; sources are read relative to {Path.cwd()}")
    else:
        files = [str(path)]
    for file in files:
        _check_ending(file, kind)
    return files


def _strip_packing(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".zst")


def _has_known_ending(name: str) -> bool:
    return _strip_packing(name).endswith(SUFFIXES)


def _check_ending(name: str, kind: str) -> None:
    if not _has_known_ending(name) and kind != "text":
        ending = Path(name).suffix or "a file without ending"
        raise InputError(
            f"{name}: cannot tell what {ending} holds; known: {', '.join(SUFFIXES)}, also {' and '.join(PACKED)} of them; "
            "lines of plain text need `kind: text`"
        )


def _list_store(name: str, kind: str) -> list[str]:
    from pyarrow import ArrowException, fs

    try:
        store, path = fs.FileSystem.from_uri(name)
        found = store.get_file_info(path)
        if found.type == fs.FileType.Directory:
            inside = store.get_file_info(fs.FileSelector(path, recursive=True))
            files = sorted(file.path for file in inside if file.is_file and _has_known_ending(file.path))
        else:
            files = [path] if found.type == fs.FileType.File else []
    except (OSError, ArrowException) as error:
        raise InputError(f"{name}: cannot be listed: {str(error).splitlines()[0]}") from None
    if not files:
        raise InputError(f"{name}: there is no such file, or no {', '.join(SUFFIXES)} file in this folder")
    scheme = name.partition("://")[0]
    query = f"?{name.partition('?')[2]}" if "?" in name else ""
    files = [f"{scheme}://{file}{query}" for file in files]
    for file in files:
        _check_ending(file.partition("?")[0], kind)
    return files


def sign_file(name: str) -> str:
    """What changes when a file changes, without reading it: path, size and time; the name alone where it is no file."""
    if name.startswith(STORES):
        from pyarrow import fs

        store, path = fs.FileSystem.from_uri(name)
        found = store.get_file_info(path)
        return f"{name} {found.size} {found.mtime_ns}"
    if name.startswith(("hf:", "miniature:")):
        return name
    paths = [Path(part.strip()).expanduser() for part in name.split("|")]
    return "\n".join(f"{p.absolute()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths if p.exists())


def read_file(name: str, start: int = 0) -> Iterator[Row]:
    """The rows of one of `list_files`, from its row `start` (0 is the first) on, as a stream.

    A row that cannot be taken apart is a Broken; InputError is raised for what makes the whole file unreadable.
    """
    if name.startswith("miniature:"):
        yield from islice(_read_miniature(name.removeprefix("miniature:")), start, None)
    elif name.startswith("hf:"):
        yield from _read_hub(name, start)
    elif "|" in name:
        yield from islice(_read_aligned(*name.split("|", 1)), start, None)
    elif (plain := _strip_packing(name.partition("?")[0])).endswith(".parquet"):
        yield from islice(_read_parquet(name), start, None)
    else:
        with _open(name) as file:
            first = file.peek(1)
            if plain.endswith(".csv"):
                yield from islice(_read_csv(name, file), start, None)
            elif plain.endswith(".json") and first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from islice(_read_array(name, file), start, None)
            else:
                yield from _read_lines(name, file, start, plain.endswith((".json", ".jsonl")))


def _open(name: str) -> io.BufferedReader[Any]:
    """A binary stream of a file, unpacked, that holds something and begins like text."""
    packed = name.partition("?")[0].endswith(PACKED)
    try:
        if packed or name.startswith(STORES):
            from pyarrow import fs

            store, path = fs.FileSystem.from_uri(name if name.startswith(STORES) else str(Path(name).absolute()))
            raw: io.RawIOBase = _RawStream(store.open_input_stream(path, compression="detect"), name)
        else:
            raw = io.FileIO(name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or str(error).splitlines()[0]}") from None
    file = io.BufferedReader(raw, 2**20)
    _check_beginning(name, file.peek(1))
    return file


class _RawStream(io.RawIOBase):
    """A pyarrow stream for io.BufferedReader; its errors name the file."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.file = stream, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self.stream.read(len(buffer))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be unpacked: {str(error).splitlines()[0]}") from None
        buffer[: len(content)] = content
        return len(content)


def _check_beginning(name: str, first: bytes) -> None:
    if not first:
        raise InputError(f"{name}: the file is empty")
    if found := next((what for mark, what in _MARKS.items() if first.startswith(mark)), None):
        raise InputError(
            f"{name}: is {found}, not UTF-8 text; save it as UTF-8, or under the ending that says what it is"
        )


def _decode(line: bytes) -> str | Broken:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 ({error.reason} at byte {error.start + 1} of the line); save the file as UTF-8"
        return Broken("not UTF-8", reason, line.decode("utf-8", "backslashreplace"))


def _read_lines(name: str, file: IO[bytes], start: int, is_json: bool) -> Iterator[Row]:
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
        text = _decode(line)
        if isinstance(text, Broken):
            yield f"{name}:{number}", text
        else:
            yield f"{name}:{number}", _parse_json(text) if is_json else {"text": text}


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


def _read_array(name: str, file: IO[bytes]) -> Iterator[Row]:
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
    space = re.compile(r"[ \t\r\n]*")
    at, line, before = text.index("[") + 1, 1, 0
    counted = item = 0
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]" and item == 0:
            break
        row, end = decoder.raw_decode(text, at)
        item += 1
        line += text.count("\n", counted, at)
        counted = at
        yield (f"{name}:{line}" if line > before else f"{name}:{line}#{item}"), row
        before = line
        at = space.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at += 1
    if rest := text[at + 1 :].strip():
        raise json.JSONDecodeError(f"Extra data behind the array ({rest[:20]!r})", text, at + 1)


def _read_csv(name: str, file: IO[bytes]) -> Iterator[Row]:
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
    if len(letters) >= 2 and len(cells[-1].strip()) == 1 and cells[-1].strip() in letters:
        return ["question", *letters, "answer"]
    return [cell.strip() for cell in cells]


def _read_parquet(name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import fs, parquet

    try:
        store, path = fs.FileSystem.from_uri(name if name.startswith(STORES) else str(Path(name).absolute()))
        with parquet.ParquetFile(store.open_input_file(path)) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: is no readable parquet file: {error}") from None


def _read_aligned(english: str, korean: str) -> Iterator[Row]:
    sides = []
    for name in (english.strip(), korean.strip()):
        if len(files := list_files(name, "text")) != 1:
            raise InputError(f"{name}: one side of an aligned pair is one file, found {len(files)}")
        sides.append(_read_side(files[0]))
    for count, (en, ko) in enumerate(zip_longest(*sides), 1):
        if en is None or ko is None:
            longer = count + sum(1 for _ in sides[1 if en is None else 0])
            counts = (count - 1, longer) if en is None else (longer, count - 1)
            raise InputError(
                f"{english}|{korean}: {counts[0]} and {counts[1]} lines; aligned files have the same number"
            )
        if en == ko == "":
            continue
        broken = next((side for side in (en, ko) if isinstance(side, Broken)), None)
        yield f"{english.strip()}:{count}", broken or {"english": en, "korean": ko}


def _read_side(name: str) -> Iterator[str | Broken]:
    """The lines of a file, empty ones too: they are what keeps two files aligned."""
    with _open(name) as file:
        for number, line in enumerate(file, 1):
            yield _decode(line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n"))


def _read_miniature(name: str) -> Iterator[Row]:
    from medlora.miniature import corpus

    if name not in corpus.NAMES:
        raise InputError(f"miniature:{name}: no such part; known: {', '.join(corpus.NAMES)}")
    yield from ((f"miniature:{name}:{i}", record) for i, record in enumerate(corpus.load(name), 1))


def parse_hub_id(name: str) -> tuple[str, str | None, str, str | None]:
    """`hf:owner/name[/config]:split[@revision]` as (owner/name, config, split, revision); raises InputError."""
    match = re.fullmatch(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?:([\w.\[\]%:+-]+?)(?:@([\w./-]+))?", name)
    if not match:
        raise InputError(
            f"{name}: write hf:owner/name/config:split, e.g. hf:sean0042/KorMedMCQA/doctor:train, with @revision behind it to pin one"
        )
    path, config, split, revision = match.groups()
    return path, config, split, revision


def go_offline_without_hub() -> None:
    """Tell the Hugging Face libraries to use their cache alone where the hub's name does not even resolve.

    They would try for 24 seconds, with a line for each time. Works before they are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _read_hub(name: str, start: int) -> Iterator[Row]:
    path, config, split, revision = parse_hub_id(name)
    go_offline_without_hub()
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(path, config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: cannot be loaded ({reason}); without a hub, download the data and name its files instead"
        ) from None
    yield from ((f"{name}:{i + 1}", rows[i]) for i in range(start, len(rows)))
