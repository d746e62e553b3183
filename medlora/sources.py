"""A named source (file, folder, hub id, miniature) -> records, by the columns that are found there."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medlora.config import SourceConfig, TestConfig
from medlora.errors import InputError
from medlora.records import FIELDS, LETTERS, McqRecord, Record, RecordError, TextRecord, TranslationRecord

KINDS: dict[str, type] = {"text": TextRecord, "translation": TranslationRecord, "mcq": McqRecord}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_RATIONALE_COLUMNS = ("rationale", "reasoning", "explanation", "cot")
_PAIR_COLUMNS = (("english", "korean"), ("en", "ko"))
_MAX_SHOWN = 10

Row = tuple[str, Any]
"""Where a row stands (`file:line`) and what it holds."""


def read(source: SourceConfig) -> list[Record]:
    """All records of a source, in its order.

    Raises InputError when the source is missing, empty or of an unknown schema, or when any row is no valid record: the
    first ten with file, line and reason.
    """
    records: list[Record] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    subject = source.subject if isinstance(source, TestConfig) else None
    for where, row in _read_rows(source):
        if source.limit is not None and len(records) == source.limit:
            break
        try:
            record = row if isinstance(row, Record) else to_record(row, source.kind, _name_row(where), subject)
        except RecordError as error:
            problems.append(f"{where}: {error}")
            continue
        if record.id in seen:
            problems.append(f"{where}: id {record.id!r} stands at {seen[record.id]} already")
            continue
        seen[record.id] = where
        records.append(record)
    if problems:
        more = f"\n  ... and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        shown = "\n  ".join(problems[:_MAX_SHOWN])
        raise InputError(
            f"{source.source}: {len(problems)} of {len(problems) + len(records)} rows are no valid records:\n  {shown}{more}"
        )
    if not records:
        raise InputError(f"{source.source}: holds no records; name a source with at least one")
    kinds = {type(record) for record in records}
    if len(kinds) > 1 or (source.kind != "auto" and kinds != {KINDS[source.kind]}):
        found = ", ".join(sorted(name for name, kind in KINDS.items() if kind in kinds))
        raise InputError(
            f"{source.source}: holds {found} records, but kind is {source.kind}; one source holds one kind"
        )
    return records


def _name_row(where: str) -> str:
    """An id for a row that has none: its file's name and its line."""
    return Path(where).name.replace(":", "-")


def hash_records(records: Iterable[Record]) -> str:
    """sha256 of records in order: the data part of a phase's fingerprint."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _read_rows(source: SourceConfig) -> Iterator[Row]:
    name = source.source
    if name.startswith("miniature:"):
        yield from _read_miniature(name.removeprefix("miniature:"))
    elif name.startswith("hf:"):
        yield from _read_hub(name)
    elif "|" in name:
        yield from _read_aligned(*name.split("|", 1))
    else:
        for path in _find_files(Path(name).expanduser(), source.kind):
            yield from _read_file(path, source.kind)


def _find_files(path: Path, kind: str) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if not path.is_file():
        raise InputError(f"{path}: there is no such file or folder; sources are read relative to {Path.cwd()}")
    if path.suffix not in SUFFIXES and kind != "text":
        raise InputError(
            f"{path}: cannot tell what {path.suffix or 'a file without ending'} holds; known: {', '.join(SUFFIXES)}; lines of plain text need `kind: text`"
        )
    return [path]


def _read_file(path: Path, kind: str) -> Iterator[Row]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: is no readable parquet file: {error}") from None
        yield from ((f"{path}:{i}", row) for i, row in enumerate(table.to_pylist(), 1))
        return
    text = _read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            # The reader's line is the row's last one; cells may hold newlines.
            yield from ((f"{path}:{reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    elif path.suffix == ".json" and text.lstrip().startswith("["):
        yield from ((f"{path}:{i}", row) for i, row in enumerate(_parse_json(text, path, 1), 1))
    elif path.suffix in (".json", ".jsonl"):
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{i}", _parse_json(line, path, i)
    else:
        yield from ((f"{path}:{i}", {"text": line}) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{line + error.lineno - 1}:{error.colno}: not valid JSON: {error.msg}") from None


def _read_aligned(english: str, korean: str) -> Iterator[Row]:
    sides = [
        _read_text(_find_files(Path(name.strip()).expanduser(), "text")[0]).rstrip("\n").split("\n")
        for name in (english, korean)
    ]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{english}|{korean}: {len(sides[0])} and {len(sides[1])} lines; aligned files have the same number"
        )
    for i, (en, ko) in enumerate(zip(*sides, strict=True), 1):
        yield f"{english.strip()}:{i}", {"english": en, "korean": ko}


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


def _read_hub(name: str) -> Iterator[Row]:
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
    yield from ((f"{name}:{i}", row) for i, row in enumerate(rows, 1))


def to_record(row: Any, kind: str = "auto", default_id: str = "1", subject: str | None = None) -> Record:
    """A row as the record that its columns make; raises RecordError with the reason when they make none.

    `subject` names the column of a question's subject.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"a row is a mapping of columns, found {type(row).__name__}")
    identity = row.get("id")
    identity = default_id if identity is None or identity == "" else str(identity)
    pair = next((pair for pair in _PAIR_COLUMNS if all(column in row for column in pair)), None)
    if kind in ("auto", "mcq") and ("question" in row or kind == "mcq"):
        return _to_mcq(row, identity, subject)
    if pair and kind in ("auto", "translation"):
        return TranslationRecord(identity, row[pair[0]], row[pair[1]])
    if "text" in row and kind in ("auto", "text"):
        return TextRecord(identity, row["text"])
    columns = ", ".join(str(column) for column in row) or "none"
    raise RecordError(
        f"unknown schema (columns {columns}); known: text | english, korean | question, A, B, ..., answer"
    )


def _to_mcq(row: Mapping[str, Any], identity: str, subject: str | None = None) -> McqRecord:
    if "question" not in row:
        raise RecordError(f"no `question` column; found {', '.join(map(str, row))}")
    options = _get_options(row)
    if not 2 <= len(options) <= len(LETTERS):
        raise RecordError(f"{len(options)} options; a question needs 2 to {len(LETTERS)}")
    if "answer" not in row:
        raise RecordError(f"no `answer` column; found {', '.join(map(str, row))}")
    answer = _to_letter(row["answer"], options)
    if subject is not None and subject not in row:
        raise RecordError(f"no column {subject!r} for the subject; found {', '.join(map(str, row))}")
    of_subject = str(row.get(subject or "subject") or "")
    return McqRecord(identity, row["question"], options, answer, of_subject, _get_rationale(row))


def _get_options(row: Mapping[str, Any]) -> tuple[str, ...]:
    found = row.get("options")
    if isinstance(found, Mapping):
        row, found = found, None
    if found is None:
        # An option column left empty at the end (four options in a five-column file) is no option.
        found = [row[letter] for letter in LETTERS if letter in row]
        while found and found[-1] in (None, ""):
            found.pop()
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise RecordError(f"`options` must be a list or a mapping, found {type(found).__name__}")
    return tuple(found)


def _to_letter(answer: Any, options: tuple[str, ...]) -> str:
    letters = LETTERS[: len(options)]
    if isinstance(answer, bool) or answer is None:
        raise RecordError(f"`answer` is {answer!r}; give a letter of {letters} or a number from 1")
    if isinstance(answer, float) and not math.isnan(answer) and answer.is_integer():
        answer = int(answer)
    text = str(answer).strip()
    if isinstance(answer, int) or re.fullmatch(r"[0-9]+", text):
        if not 1 <= int(text) <= len(options):
            raise RecordError(f"answer {answer!r} is outside 1..{len(options)}")
        return letters[int(text) - 1]
    if isinstance(answer, str) and len(text) == 1 and text.upper() in letters:
        return text.upper()
    raise RecordError(f"answer {answer!r} is none of the options {', '.join(letters)}")


def _get_rationale(row: Mapping[str, Any]) -> dict[str, str]:
    found = next((row[column] for column in _RATIONALE_COLUMNS if row.get(column)), None)
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return {str(name): text for name, text in found.items() if text}
    if not isinstance(found, str):
        raise RecordError(f"a rationale is text or a mapping of {', '.join(FIELDS)}, found {type(found).__name__}")
    parts = re.split(rf"^({'|'.join(FIELDS)}):[ \t]*", found.strip(), flags=re.MULTILINE)
    if len(parts) > 1 and not parts[0].strip():
        return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()}
    return {"analysis": found.strip()} if found.strip() else {}
