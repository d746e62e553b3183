"""Rows of files, folders, globs, object stores and the hub, one by one: where each is and what it holds."""

from __future__ import annotations

import glob
import os
import re
import socket
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from urllib.parse import urlsplit

from medlora.bounds import read_bounded_lines
from medlora.data.reading.columnar import read_parquet
from medlora.data.reading.encodings import NAMES, recognise
from medlora.data.reading.formats import Broken, FileRow, decode_line, read_array, read_lines
from medlora.data.reading.streams import PACKED, open_text
from medlora.data.reading.tables import SEPARATORS, find_separator, read_csv
from medlora.errors import InputError
from medlora.runs.object_store import is_store, open_store

_IN_FOLDERS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""A workbook often lies beside the CSV that was saved from it, so it is read only where it is named."""


SUFFIXES = (*_IN_FOLDERS, ".xlsx")


_GLOB = re.compile(r"[*?\[]")


def list_files(name: str, kind: str = "auto") -> list[str]:
    """What a source is made of, in order: paths and URIs of files, or the source's own name where it is no file.

    `kind` `text` lets a file of any ending be lines of text. Raises InputError when nothing is there.
    """
    if name.startswith(("hf:", "miniature:")) or "|" in name:
        return [name]
    if is_store(name):
        return _list_store(name, kind)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if _has_known_ending(p.name, _IN_FOLDERS) and p.is_file())
        if not files:
            raise InputError(f"{path}: no {', '.join(_IN_FOLDERS)} file in this folder")
        return files
    if not path.is_file() and _GLOB.search(name):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not files:
            raise InputError(f"{name}: no file matches; sources are read relative to {Path.cwd()}")
    elif not path.is_file() and path.exists():
        raise InputError(f"{path}: is a pipe or a device; save what it gives as a file and name that")
    elif not path.is_file():
        raise InputError(f"{path}: there is no such file or folder; sources are read relative to {Path.cwd()}")
    else:
        files = [str(path)]
    for file in files:
        _check_ending(file, kind)
    return files


def _strip_packing(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".zst")


def _has_known_ending(name: str, endings: tuple[str, ...] = SUFFIXES) -> bool:
    return _strip_packing(name).endswith(endings)


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
        store, path = open_store(name)
        found = store.get_file_info(path)
        if found.type == fs.FileType.Directory:
            inside = store.get_file_info(fs.FileSelector(path, recursive=True))
            files = sorted(file.path for file in inside if file.is_file and _has_known_ending(file.path, _IN_FOLDERS))
        else:
            files = [path] if found.type == fs.FileType.File else []
    except (OSError, ArrowException) as error:
        raise InputError(f"{name}: cannot be listed: {str(error).splitlines()[0]}") from None
    if not files:
        raise InputError(f"{name}: there is no such file, or no {', '.join(_IN_FOLDERS)} file in this folder")
    scheme = name.partition("://")[0]
    query = f"?{name.partition('?')[2]}" if "?" in name else ""
    files = [f"{scheme}://{file}{query}" for file in files]
    for file in files:
        _check_ending(file.partition("?")[0], kind)
    return files


def sign_file(name: str) -> str:
    """What changes when a file changes, without reading it: path, size and time; the name alone where it is no file."""
    if is_store(name):
        store, path = open_store(name)
        found = store.get_file_info(path)
        return f"{name} {found.size} {found.mtime_ns}"
    if name.startswith(("hf:", "miniature:")):
        return name
    paths = [Path(part.strip()).expanduser() for part in name.split("|")]
    return "\n".join(f"{p.absolute()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths if p.exists())


def read_file(name: str, start: int = 0, encoding: str = "auto", separator: str = "auto") -> Iterator[FileRow]:
    """The rows of one of `list_files`, from its row `start` (0 is the first) on, as a stream.

    A row that cannot be taken apart is a Broken; InputError is raised for what makes the whole file unreadable.
    """
    plain = _strip_packing(name.partition("?")[0])
    if name.startswith("miniature:"):
        yield from islice(_read_miniature(name.removeprefix("miniature:")), start, None)
    elif name.startswith("hf:"):
        yield from _read_hub(name, start)
    elif "|" in name:
        english, _, korean = name.partition("|")
        yield from islice(_read_aligned(english, korean, encoding), start, None)
    elif plain.endswith(".parquet"):
        yield from islice(read_parquet(name), start, None)
    elif plain.endswith(".xlsx"):
        from medlora.data.reading.spreadsheets import read_workbook

        store, path = open_store(name if is_store(name) else str(Path(name).absolute()))
        with store.open_input_file(path) as book:
            yield from islice(read_workbook(name, book), start, None)
    else:
        with open_text(name, encoding) as file:
            first = file.peek(1)
            if plain.endswith((".csv", ".tsv")):
                yield from islice(read_csv(name, file, separator), start, None)
            elif plain.endswith(".json") and first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from islice(read_array(name, file), start, None)
            else:
                yield from read_lines(name, file, start, plain.endswith((".json", ".jsonl")))


def describe_reading(name: str, encoding: str = "auto", separator: str = "auto") -> list[str]:
    """How a file is read where that was found out and is not plain UTF-8 with commas; for a note."""
    plain = _strip_packing(name.partition("?")[0])
    if name.startswith(("miniature:", "hf:")) or "|" in name or plain.endswith((".parquet", ".xlsx")):
        return []
    with open_text(name, "utf-8") as file:
        found = recognise(file.peek(1)) if encoding == "auto" else "utf-8"
    notes = [f"file read as {NAMES[found]}"] if found in NAMES else []
    if plain.endswith(".csv") and separator == "auto":
        with open_text(name, encoding) as file:
            delimiter, _ = find_separator(name, file.peek(1))
        if delimiter != ",":
            notes.append(f"cells separated by {SEPARATORS.get(delimiter, repr(delimiter))}")
    return notes


def _read_aligned(english: str, korean: str, encoding: str) -> Iterator[FileRow]:
    sides = []
    for name in (english.strip(), korean.strip()):
        if len(files := list_files(name, "text")) != 1:
            raise InputError(f"{name}: one side of an aligned pair is one file, found {len(files)}")
        sides.append(_read_side(files[0], encoding))
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


def _read_side(name: str, encoding: str) -> Iterator[str | Broken]:
    """The lines of a file, empty ones too, since they align two files."""
    with open_text(name, encoding) as file:
        for number, line in enumerate(read_bounded_lines(name, file), 1):
            yield decode_line(line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n"))


def _read_miniature(name: str) -> Iterator[FileRow]:
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
    """Let the Hugging Face libraries use their cache alone where the hub's name does not even resolve.

    They would try for 24 seconds, with a line for each time. Works before they are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _read_hub(name: str, start: int) -> Iterator[FileRow]:
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
