"""Hostile data files, one after another, each read in a process of its own with 6 GB and 60 seconds.

python benchmarks/faults/hostile_data.py                 every case, a table as in docs/data.md; exit 1 if one is wrong
python benchmarks/faults/hostile_data.py bomb parquet    the cases with one of these words in their name

Right is one message of at most 3,000 characters without control characters (`refused`), or the records (`read`).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medlora.config.sources import SourceConfig
from medlora.data import sources
from medlora.errors import InputError

SECONDS, BYTES, CHARS = 60, 6 * 2**30, 3_000
MIB = 2**20
QUESTION = {"question": "Q?", "A": "열", "B": "기침", "answer": 1}


@dataclass(frozen=True)
class Case:
    """A file to write, its name, what must come of it."""

    name: str
    file: str
    write: Callable[[Path], None]
    expected: str = "refused"
    source: str = "{}"
    kind: str = "auto"


def _text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def _repeat(begin: bytes, unit: bytes, times: int, end: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(begin)
            for _ in range(times):
                file.write(unit)
            file.write(end)

    return write


def _bomb(kind: str, begin: bytes, unit: bytes) -> Callable[[Path], None]:
    """10 GiB of the same, packed."""

    def write(path: Path) -> None:
        import pyarrow

        pack = gzip.compress if kind == "gzip" else lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)
        block = pack(unit * (64 * MIB // len(unit)))
        _repeat(pack(begin), block, 160)(path)

    return write


def _sparse(begin: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(begin)
        os.truncate(path, 100 * 2**30)

    return write


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b"0" * 10**8)


def _parquet(rows: int, chars: int, groups: int = 1) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        words = pyarrow.array(["a" * chars], pyarrow.large_string())
        table = pyarrow.table({"text": words.take(pyarrow.array([0] * rows))})
        with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for _ in range(groups):
                writer.write_table(table)

    return write


def _flipped(seed: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(1000)]}), path)
        content, draw = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(40):
            content[draw.randrange(4, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return write


def _folder(fill: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "x.jsonl").write_text('{"text": "x"}\n')
        fill(path)

    return write


def _numbers(keys: int, twice: str = "") -> str:
    return "{" + ",".join(f'"k{i}":1' for i in range(keys)) + twice + "}\n"


def _row(**changes: object) -> str:
    return f"{json.dumps(QUESTION)}\n{json.dumps({**QUESTION, 'question': 'Q2?', **changes})}\n"


CASES = [
    Case("1 GiB in one line, JSON", "a.jsonl", _repeat(b'{"text":"', b"a" * MIB, 1024, b'"}\n')),
    Case("1 GiB in one line, JSON array", "a.json", _repeat(b'[{"text":"', b"a" * MIB, 1024, b'"}]')),
    Case("1 GiB in one line, text", "a.txt", _repeat(b"", b"a" * MIB, 1024)),
    Case("1 GiB in one line, CSV", "a.csv", _repeat(b"text\n", b"a" * MIB, 1024)),
    Case("100 GiB of nothing, text", "a.txt", _sparse(b"a")),
    Case("100 GiB of nothing, JSON", "a.jsonl", _sparse(b'{"text":"')),
    Case("60 MiB of numbers in one line", "a.jsonl", _repeat(b'{"text":[', b"1234567," * 1000, 7_800, b"1]}")),
    Case("250 MiB of lists in an array", "a.json", _repeat(b"[", b"[]," * 1000, 87_000, b"[]]")),
    Case("250 MiB of mappings in an array", "a.json", _repeat(b"[", b"{}," * 1000, 87_000, b"{}]")),
    Case("lists 1,000,000 deep", "a.jsonl", _text('{"text":' + "[" * 10**6 + "]" * 10**6 + "}")),
    Case("mappings 1,000,000 deep", "a.jsonl", _text('{"a":' * 10**6 + "1" + "}" * 10**6)),
    Case("lists 1,000,000 deep in an array", "a.json", _text("[" * 10**6 + "]" * 10**6)),
    Case("lists 900 deep beside a text", "a.jsonl", _text('{"text":"x","m":' + "[" * 900 + "]" * 900 + "}")),
    Case("a number of 1,000,000 digits", "a.jsonl", _text('{"text":"x","n":' + "9" * 10**6 + "}")),
    Case("a number of 5,000 digits in an array", "a.json", _text('[{"text":"x","n":' + "9" * 5000 + "}]")),
    Case("an answer of 4,000 digits", "a.jsonl", _text(_row(answer=10**4000))),
    Case("answers 1e400 and NaN", "a.jsonl", _text(_row(answer=1).replace('"answer": 1}', '"answer": 1e400}'))),
    Case("a key twice among 100,000", "a.jsonl", _text(_numbers(10**5, ',"k99999":2'))),
    Case("a key of 10,000,000 characters", "a.jsonl", _text(json.dumps({"k" * 10**7: 1}))),
    Case("100,000 unknown keys", "a.jsonl", _text(_numbers(10**5))),
    Case("gzip bomb, one line", "a.jsonl.gz", _bomb("gzip", b'{"text":"', b"a")),
    Case("gzip bomb, blank lines", "a.txt.gz", _bomb("gzip", b"x\n", b"\n")),
    Case("gzip bomb, short rows", "a.jsonl.gz", _bomb("gzip", b"", b'{"text":"a"}\n')),
    Case("zstd bomb, one line", "a.jsonl.zst", _bomb("zstd", b'{"text":"', b"a")),
    Case("zstd bomb, one cell", "a.csv.zst", _bomb("zstd", b'text\n"', b"a")),
    Case("zip bomb, workbook", "a.xlsx", _zip),
    Case("zip under another name", "a.jsonl", _zip),
    Case("gzip cut in half", "a.jsonl.gz", _text(gzip.compress(b'{"text":"hello"}\n' * 9999)[:-40])),
    Case("gzip of noise, damaged", "a.jsonl.gz", _text(gzip.compress(os.urandom(10**5))[:5000] + b"\0" * 9000)),
    Case("1,000,000 columns", "a.csv", _text("text," + ",".join(f"c{i}" for i in range(10**6)) + "\nx\n")),
    Case("100,000 columns of one name", "a.csv", _text(",".join(["text"] * 10**5) + "\nx\n")),
    Case("a quote left open for 300 MB", "a.csv", _repeat(b'text\n"', (b"a" * 99 + b"\n") * 1000, 3000)),
    Case("NUL in a cell", "a.csv", _text(b"text\na\0b\n")),
    Case("parquet, size of the footer", "a.parquet", _text(b"PAR1" + b"x" * 99 + b"\xff\xff\xff\x7fPAR1")),
    Case("parquet, 40,000,000 equal rows", "a.parquet", _parquet(2_000_000, 200, 20)),
    Case("parquet, one cell of 1 GB", "a.parquet", _parquet(1, 10**9)),
    Case("parquet, 1,000 cells of 20 MB", "a.parquet", _parquet(20, 20 * 10**6, 50)),
    *(Case(f"parquet, 40 bits flipped ({seed})", "a.parquet", _flipped(seed), "either") for seed in range(5)),
    Case("folder that holds itself", "d", _folder(lambda path: (path / "a").symlink_to(path)), "read"),
    Case("folder with a pipe", "d", _folder(lambda path: os.mkfifo(path / "f.jsonl")), "read"),
    Case("link to itself", "a.jsonl", lambda path: path.symlink_to(path)),
    Case("pipe", "a.jsonl", lambda path: os.mkfifo(path)),
    Case("link to /dev/zero", "a.jsonl", lambda path: path.symlink_to("/dev/zero")),
    Case("/dev/zero", "a", _text(""), source="/dev/zero", kind="text"),
    Case("/proc/self/mem", "a", _text(""), source="/proc/self/mem", kind="text"),
    Case("aligned with /dev/zero", "a.txt", _text("x\n"), source="{}|/dev/zero"),
    Case("aligned with 1 GiB in one line", "a.txt", _repeat(b"", b"a" * MIB, 1024), source="{}|{}"),
    Case("1,000,000 broken lines", "a.jsonl", _text('{"text": 1}\n' + "{bad\n" * 10**6)),
    Case("an answer of 50 MB", "a.jsonl", _text(_row(answer="Z" * 5 * 10**7))),
    Case("terminal escapes in an answer", "a.jsonl", _text(_row(answer="\x1b[2J\x1b]0;owned\x07"))),
    Case("half a surrogate pair", "a.jsonl", _text('{"text":"\\ud800 x"}\n')),
    Case("options as Python, 200 deep", "a.jsonl", _text(_row(options="[" * 300 + "]" * 300, A=None, B=None))),
]


def run_case(case: Case, folder: Path) -> tuple[str, float, float, str]:
    """What came of a case, its seconds, the peak MiB of its process, its message."""
    path, said = folder / case.file, folder / "said"
    if (writer := os.fork()) == 0:
        case.write(path)
        os._exit(0)
    os.waitpid(writer, 0)
    started = time.monotonic()
    if (reader := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os._exit(_read(case, path, said))
    ended, status, usage = 0, 0, None
    while not ended and time.monotonic() - started < SECONDS:
        ended, status, usage = os.wait4(reader, os.WNOHANG)
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if not ended:
        os.kill(reader, signal.SIGKILL)
        _, _, usage = os.wait4(reader, 0)
        return "out of time", seconds, usage.ru_maxrss / 1024, ""
    message = said.read_text(errors="replace") if said.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: "read", 2: "refused"}.get(code, "traceback" if code == 1 else f"died ({code})")
    if outcome == "refused" and (len(message) > CHARS or re.search("[\x00-\x09\x0b-\x1f\x7f]", message)):
        outcome = "message"
    return outcome, seconds, usage.ru_maxrss / 1024 if usage else 0.0, message


def _read(case: Case, path: Path, said: Path) -> int:
    try:
        source = SourceConfig.model_validate({"source": case.source.replace("{}", str(path)), "kind": case.kind})
        sources.scan(source).check(0.0)
        said.write_text(f"{sum(1 for _ in sources.stream(source))} records")
        return 0
    except InputError as error:
        said.write_text(str(error))
        return 2
    except BaseException:
        said.write_text(traceback.format_exc())
        return 1


def run(words: list[str]) -> Iterator[bool]:
    """Every case whose name holds one of `words`, printed as a row; whether it was right."""
    print("| case | outcome | seconds | MiB | message |\n|---|---|---|---|---|", flush=True)
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome, seconds, mib, message = run_case(case, Path(folder))
            right = outcome == case.expected or (case.expected == "either" and outcome in ("read", "refused"))
            shown = " ".join(message.replace(folder, "").replace("|", "\\|").split())[:110]
            print(
                f"| {case.name} | {outcome}{'' if right else ' (wrong)'} | {seconds:.1f} | {mib:,.0f} | {shown} |",
                flush=True,
            )
        yield right


if __name__ == "__main__":
    results = list(run(sys.argv[1:]))
    print(f"\n{sum(results)} of {len(results)} right")
    sys.exit(0 if all(results) else 1)
