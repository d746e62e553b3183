"""A named source -> records, one by one; what makes no record is counted, shown and saved for the quarantine file."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from medlora.bounds import MAX_USELESS_ROWS, bound_row, clean, name_type, shorten
from medlora.config.sources import AnswerColumn, SourceConfig, TestConfig
from medlora.data.reading.files import describe_reading, list_files, read_file, sign_file
from medlora.data.reading.formats import Broken
from medlora.data.rows.conversion import find_first_number, get_answer, to_record
from medlora.data.rows.schemas import EXAMS, SCHEMAS, Schema, explain_no_schema, find_schema, make_schema
from medlora.errors import InputError
from medlora.records import McqRecord, Record, RecordError, TextRecord, TranslationRecord

KINDS: dict[type, str] = {TextRecord: "text", TranslationRecord: "translation", McqRecord: "mcq"}


MAX_SHOWN = 10
"""Bad rows that a message shows."""


_REASON_CHARS = 500
"""Most characters of a reason."""


_LOOKED_AT = 100
"""Rows by which a schema is found."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that makes no record: where it is (`file:line`), the class of the reason, the reason, the row."""

    where: str
    kind: str
    reason: str
    row: object

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class Scan:
    """What a source is, after one look through it: counts, schema, hash; a few rows, never all of them."""

    source: str
    schemas: dict[str, str] = field(default_factory=dict)
    """The schema of each file."""
    bases: dict[str, int | None] = field(default_factory=dict)
    """By schema: the number of the first option where the data decided it."""
    root: str = ""
    """The folder from which rows without id are named, where several files have one name."""
    files: list[tuple[str, int]] = field(default_factory=list)
    """Each file with the number of its rows that were looked at, good or bad."""
    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that make no record, by class of reason."""
    flags: Counter[str] = field(default_factory=Counter)
    """What is odd about records that are used."""
    shown: list[BadRow] = field(default_factory=list)
    skipped: set[tuple[str, int]] = field(default_factory=set)
    """File and row (from 0) of every bad row."""
    kind: str = ""
    hash: str = ""
    """As `hash_records` of the records."""
    letters: str = ""
    """The letters of the question with the most options."""
    rationale: set[str] = field(default_factory=set)
    """Rationale fields that any question has."""
    subjects: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    options: Counter[int] = field(default_factory=Counter)

    @property
    def schema(self) -> str:
        """The names of all schemas, in the order of the files."""
        return ", ".join(dict.fromkeys(self.schemas.values()))

    @property
    def base(self) -> int | None:
        """The number of the first option where the data decided it; of several schemas, the first that decides."""
        return next((base for base in self.bases.values() if base is not None), None)

    @property
    def rows(self) -> int:
        """Rows that were looked at."""
        return self.records + self.bad.total()

    def check(self, max_bad_fraction: float) -> None:
        """Raise InputError with the first bad rows when there are too many of them, or when no record is left."""
        bad = self.bad.total()
        if bad > max_bad_fraction * self.rows:
            shown = "\n  ".join(map(str, self.shown))
            more = f"\n  ... and {bad - len(self.shown)} more" if bad > len(self.shown) else ""
            counts = ", ".join(f"{kind} {n}" for kind, n in self.bad.most_common())
            least = min(0.99, -(-bad * 1000 // self.rows) / 1000)
            raise InputError(
                f"{self.source}: {bad} of {self.rows} rows are no valid records ({counts}):\n  {shown}{more}\n"
                "fix them, or leave them out, counted and saved in quarantine.jsonl: "
                f"--set data.max_bad_fraction={least:g}"
            )
        if not self.records:
            raise InputError(f"{self.source}: holds no records; name a source with at least one")


_SCANS: dict[str, Scan] = {}


def scan(source: SourceConfig, on_bad: Callable[[BadRow], None] | None = None) -> Scan:
    """Look through a source once: every row becomes a record or a bad row with its reason.

    Remembered in this process while no file changes; `on_bad`, which is handed every bad row, makes it look again.
    Raises InputError when the source is missing or fits no schema.
    """
    files = list_files(source.source, source.kind)
    key = _sign(source, files)
    if on_bad is not None or key not in _SCANS:
        _SCANS[key] = _scan(source, files, on_bad or (lambda bad: None))
    return _SCANS[key]


def _sign(source: SourceConfig, files: Sequence[str]) -> str:
    read_by = ("source", "kind", "adaptor", "columns", "limit", "unicode", "subject", "encoding", "separator")
    reading = {key: value for key, value in source.model_dump(mode="json").items() if key in read_by}
    return json.dumps([{**reading, "subject": reading.get("subject")}, *map(sign_file, files)], sort_keys=True)


def pack_scan(source: SourceConfig) -> dict[str, object]:
    """The scan of a source as plain values, for a process that shall not look again: `remember` takes it there."""
    found = scan(source)
    plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(found).items()}
    plain |= {"skipped": sorted(found.skipped), "rationale": sorted(found.rationale), "shown": []}
    plain["options"] = list(found.options.items())  # JSON has no numbers for keys
    return {"key": _sign(source, [file for file, _ in found.files]), "scan": plain}


def remember(packed: Mapping[str, Any]) -> None:
    """Take a scan of another process for this one's; it counts only while the files look the same from here."""
    plain = dict(packed["scan"])
    for name, make in (
        ("bad", Counter),
        ("flags", Counter),
        ("subjects", Counter),
        ("answers", Counter),
        ("rationale", set),
    ):
        plain[name] = make(plain[name])
    plain["options"] = Counter(dict(plain["options"]))
    plain["files"] = [(str(file), int(rows)) for file, rows in plain["files"]]
    plain["skipped"] = {(str(file), int(row)) for file, row in plain["skipped"]}
    _SCANS.setdefault(packed["key"], Scan(**plain))


def _scan(source: SourceConfig, files: list[str], on_bad: Callable[[BadRow], None]) -> Scan:
    found = Scan(source.source, kind="" if source.kind == "auto" else source.kind)
    chosen = {file: _choose_schema(source, file) for file in files}
    found.schemas = {file: schema.name if schema else "records" for file, schema in chosen.items()}
    if len({Path(file).name for file in files}) < len(files):
        found.root = os.path.commonpath([os.path.dirname(file) for file in files])
    for schema in {schema.name: schema for schema in chosen.values() if schema}.values():
        try:
            found.bases[schema.name] = _find_base(
                source, schema, [file for file in files if found.schemas[file] == schema.name]
            )
        except RecordError as error:
            raise InputError(f"{source.source}: {error}") from None
    digest = hashlib.sha256()
    ids: dict[str, str] = {}
    questions: dict[bytes, tuple[str, str]] = {}
    for file in files:
        rows = 0
        found.flags.update(describe_reading(file, source.encoding, source.separator))
        for number, (where, row) in enumerate(_read(source, file)):
            if source.limit is not None and found.records == source.limit:
                break
            rows = number + 1
            try:
                record, flags = _convert(row, chosen[file], source, where, found)
                _check_against_earlier(record, where, found, ids, questions)
            except RecordError as error:
                content = row.content if isinstance(row, Broken) else row
                bad = BadRow(where, error.kind, clean(str(error), _REASON_CHARS), bound_row(content))
                found.bad[bad.kind] += 1
                found.skipped.add((file, number))
                if len(found.shown) < MAX_SHOWN:
                    found.shown.append(bad)
                on_bad(bad)
                if not found.records and found.bad.total() >= MAX_USELESS_ROWS:
                    raise InputError(
                        f"{source.source}: none of its first {MAX_USELESS_ROWS:,} rows is a valid record, so no more "
                        f"are read; the first: {found.shown[0]}"
                    ) from None
                continue
            found.records += 1
            found.flags.update(flags)
            digest.update(_spell(record))
            if isinstance(record, McqRecord):
                found.letters = max(found.letters, record.letters, key=len)
                found.rationale.update(record.rationale)
                found.subjects[record.subject] += 1
                found.answers[record.answer] += 1
                found.options[len(record.options)] += 1
        found.files.append((file, rows))
    found.hash = digest.hexdigest()
    return found


def _read(source: SourceConfig, file: str, start: int = 0) -> Iterator[tuple[str, object]]:
    return read_file(file, start, source.encoding, source.separator)


def _choose_schema(source: SourceConfig, file: str) -> Schema | None:
    """None where rows are records already, or where there is none."""
    if source.columns is not None or source.adaptor is not None:
        return _get_schema(source, source.adaptor)
    rows = [pair for pair in islice(_read(source, file), _LOOKED_AT) if not isinstance(pair[1], Broken)]
    if not rows or type(rows[0][1]) in KINDS:
        return None
    schema = find_schema((row for _, row in rows), source.kind)
    if schema is None:
        where, row = rows[0]
        raise InputError(f"{where}: {explain_no_schema(row, source.kind)}")
    return schema


def _get_schema(source: SourceConfig, name: str | None) -> Schema:
    if source.columns is not None:
        return make_schema(source.columns)
    named = next((schema for schema in (*SCHEMAS, *EXAMS.values()) if schema.name == name), None)
    if named is None:
        known = ", ".join(schema.name for schema in (*SCHEMAS, *EXAMS.values()))
        raise InputError(f"{source.source}: there is no adaptor {name!r}; known: {known}")
    return named


def _find_base(source: SourceConfig, schema: Schema, files: list[str]) -> int | None:
    answer = schema.columns.answer
    if answer is None or (isinstance(answer, AnswerColumn) and answer.base != "data"):
        return None
    rows = islice(((where, row) for file in files for where, row in _read(source, file)), source.limit)
    found = ((where, get_answer(row, schema)) for where, row in rows)
    return find_first_number((where, *pair) for where, pair in found if pair)


def _convert(
    row: Any, schema: Schema | None, source: SourceConfig, where: str, found: Scan
) -> tuple[Record, list[str]]:
    """The row's record and flags; a question without subject has its file's name for one, of several files (MMLU)."""
    if isinstance(row, Broken):
        raise RecordError(row.reason, row.kind)
    if schema is None:
        if type(row) not in KINDS:
            raise RecordError(f"a row is a mapping of columns, found {name_type(row)}", "no mapping")
        return row, []
    subject = source.subject if isinstance(source, TestConfig) else None
    default_id = _name_row(where, found)
    record, flags = to_record(row, schema, default_id, found.bases.get(schema.name), subject, source.unicode == "nfc")
    if len(found.schemas) > 1 and isinstance(record, McqRecord) and not record.subject:
        record = replace(record, subject=Path(where).name.partition(".")[0])
    return record, flags


def _name_row(where: str, found: Scan) -> str:
    """An id for a row that has none: its file's name and its line."""
    name = os.path.relpath(where, found.root) if found.root else os.path.basename(where)
    return name.replace(":", "-")


def _check_against_earlier(
    record: Record,
    where: str,
    found: Scan,
    ids: dict[str, str],
    questions: dict[bytes, tuple[str, str]],
) -> None:
    """Raise RecordError for an id that is taken, a question answered otherwise before, a record of another kind."""
    kind = KINDS[type(record)]
    found.kind = found.kind or kind
    if kind != found.kind:
        raise RecordError(f"is {kind} in a source of {found.kind}; one source holds one kind", "mixed kinds")
    if record.id in ids:
        raise RecordError(f"id {shorten(record.id)} is at {ids[record.id]} already", "id twice")
    if isinstance(record, McqRecord):
        key = hashlib.blake2b(
            repr((record.question, record.options)).encode("utf-8", "replace"), digest_size=16
        ).digest()
        before, answer = questions.setdefault(key, (where, record.answer))
        if answer != record.answer:
            raise RecordError(
                f"the answer is {record.answer}, but {answer} to the same question with the same options at {before}; "
                "one of them is wrong",
                "contradiction",
            )
        if before != where:
            found.flags["same question, options and answer again"] += 1
    if record.id != _name_row(where, found):
        ids[record.id] = where


def stream(source: SourceConfig, found: Scan | None = None) -> Iterator[Record]:
    """The records of a source, in its order, one at a time; bad rows are passed over, as `scan` has counted them."""
    return (record for _, record in stream_placed(source, found))


def stream_placed(source: SourceConfig, found: Scan | None = None) -> Iterator[tuple[str, Record]]:
    """The records of a source and where each is (`file:line`)."""
    found = found or scan(source)
    for file, rows in found.files:
        yield from _stream_piece(source, found, file, 0, rows)


def stream_piece(source: SourceConfig, found: Scan, file: str, start: int, stop: int) -> Iterator[Record]:
    """The records of the rows `start` to `stop` (from 0, without `stop`) of one file of a source that was scanned."""
    return (record for _, record in _stream_piece(source, found, file, start, stop))


def cut_pieces(found: Scan, pieces: int) -> list[tuple[str, int, int]]:
    """A scanned source in about so many pieces of whole rows, at least 1,000 each: (file, first row, row behind the last)."""
    size = max(1000, -(-found.rows // max(1, pieces)))
    return [(file, start, min(start + size, rows)) for file, rows in found.files for start in range(0, rows, size)]


def _stream_piece(source: SourceConfig, found: Scan, file: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
    name = found.schemas[file]
    schema = None if name == "records" else _get_schema(source, name)
    for number, (where, row) in enumerate(islice(_read(source, file, start), stop - start), start):
        if (file, number) not in found.skipped:
            yield where, _convert(row, schema, source, where, found)[0]


def read(source: SourceConfig, max_bad_fraction: float = 0.0) -> list[Record]:
    """All records of a source, in its order.

    Raises InputError when the source is missing, empty or of no known schema. It also does so when more than
    `max_bad_fraction` of its rows are no valid records; the message lists the first ten with file, line and reason.
    """
    found = scan(source)
    found.check(max_bad_fraction)
    return list(stream(source, found))


def hash_records(records: Iterable[Record]) -> str:
    """sha256 of records in order: the data part of a phase's fingerprint."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_spell(record))
    return digest.hexdigest()


def _spell(record: Record) -> bytes:
    return repr(record).encode("utf-8", "surrogatepass") + b"\n"
