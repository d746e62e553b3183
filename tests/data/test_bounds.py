"""Hostile files: bounded lines, values, nesting, numbers, headers, archives and messages, each in linear time."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from medlora import bounds
from medlora.bounds import bound_row, clean, list_names, shorten
from medlora.config.sources import SourceConfig
from medlora.data import sources
from medlora.data.quarantine import write_quarantine
from medlora.data.reading import formats, tables
from medlora.data.sources import read, scan
from medlora.errors import InputError

QUESTION = {"question": "Q?", "A": "열", "B": "기침", "answer": 1}
LONGEST_MESSAGE = 2_500


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(SourceConfig(source=str(path), **more))
    assert len(str(caught.value)) < LONGEST_MESSAGE
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("deep.jsonl", '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested more than 64 deep"),
        ("deep900.jsonl", '{"text": "x", "m": ' + "[" * 900 + "]" * 900 + "}", "nested more than 64 deep"),
        ("objects.jsonl", '{"a":' * 10**5 + "1" + "}" * 10**5, "nested more than 64 deep"),
        ("deep.json", "[" * 10**5 + "]" * 10**5, "its items are nested more than 64 deep"),
        ("open.json", "[" * 10**5, "its items are nested more than 64 deep"),
        ("open.jsonl", '{"a": ' + "[" * 10**5, "nested more than 64 deep"),
        ("number.jsonl", '{"text": "x", "n": ' + "9" * 10**5 + "}", "a whole number of 100,000 digits"),
        ("number.json", '[{"text": "x", "n": -' + "9" * 5000 + "}]", "a whole number of 5,001 digits"),
        ("answer.jsonl", json.dumps({**QUESTION, "answer": 10**90}), "answer 1000000"),
        ("infinite.jsonl", '{"question": "q", "A": "열", "B": "기침", "answer": 1e400}', "answer inf is none of"),
        ("twice.jsonl", '{"' + "k" * 10**5 + '": 1, "' + "k" * 10**5 + '": 2}', "99,800 characters more appears twice"),
        ("names.jsonl", json.dumps({"k" * 10**6: "v"}), "unknown schema"),
        ("many.jsonl", json.dumps({f"k{i}": "v" for i in range(10**4)}), "and 9,980 more"),
        (
            "missing.jsonl",
            json.dumps(QUESTION) + "\n" + json.dumps({f"k{i}": 1 for i in range(10**4)}),
            "missing column",
        ),
        ("wrong.jsonl", json.dumps(QUESTION) + "\n" + json.dumps({**QUESTION, "answer": "Z" * 10**6}), "answer 'ZZZ"),
        ("escape.jsonl", json.dumps({**QUESTION, "answer": "\x1b[2J\x07\u202e"}), "\\x1b[2J\\x07"),
        ("column.jsonl", json.dumps({"\x1b[2J": 1}), "\\x1b[2J"),
        (
            "wide.csv",
            ",".join(f"c{i}" for i in range(10**5)) + "\n" + "1," * 10**5,
            "100,000 columns, more than 10,000",
        ),
        ("same.csv", ",".join(["text"] * 9_000) + "\nx\n", "the column 'text' appears twice"),
        ("long.csv", "text," + "h" * 10**6 + "\n" + "x\n", "cells do not fit"),
        ("nul.csv", b"text\na\0b\n", "control character"),
        ("foot.parquet", b"PAR1" + b"x" * 100 + (2**31 - 1).to_bytes(4, "little") + b"PAR1", "no readable parquet"),
    ],
)
def test_a_hostile_row_is_one_short_message(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    started = time.process_time()
    found = refusal(write(tmp_path / name, content))
    assert said in found and "\x1b" not in found and "\u202e" not in found
    assert time.process_time() - started < 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_line_is_bounded_and_no_more_of_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 10_000)
    path = write(tmp_path / name, "text\nfirst\n" if name == "a.csv" else '{"text": "first"}\n')
    with path.open("ab") as file:
        file.write(b'{"text": "')
        file.truncate(2**40)  # a hole: nothing could read it to its end
    assert ":3: the line is longer" in refusal(path) if name == "a.csv" else ":2: the line is longer" in refusal(path)


def test_an_aligned_side_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_LINE_BYTES", 10_000)
    write(tmp_path / "en", "a\n" + "b" * 20_000)
    write(tmp_path / "ko", "가\n나")
    assert "en:2: the line is longer" in refusal(f"{tmp_path / 'en'}|{tmp_path / 'ko'}")


def test_values_of_a_row_are_bounded_but_not_the_words_of_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "m": [' + "1," * 1_100_000 + "1]}")
    assert "values in it, more than 1,000,000" in refusal(path)
    path = write(tmp_path / "b.jsonl", json.dumps({"text": '[1], {2}, \\" ' * 200_000}))
    assert len(read(SourceConfig(source=str(path)))) == 1


def test_an_array_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", "[" + "[]," * 1000 + "[]]")
    monkeypatch.setattr(formats, "_MOST_OPENED", 500)
    assert "1,002 lists and mappings in one array; write its items as lines" in refusal(path)
    monkeypatch.setattr(formats, "MAX_ARRAY_BYTES", 100)
    assert "would sit in memory as a whole" in refusal(path)


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TEXT_CHARS", 50_000)
    path = write(tmp_path / "a.csv", 'text\nfine\n"' + ("a" * 99 + "\n") * 2_000)
    assert f"{path}:3: a cell of more than 50,000 characters begins in this row; close its quote" in refusal(path)


@pytest.mark.parametrize(
    ("name", "unit", "before", "behind"),
    [
        ("line.jsonl", b"a" * 1000, b'{"text":"', b""),
        ("lines.jsonl", b'{"text":"a"}\n' * 80, b"", b""),
        ("blank.txt", b"\n" * 1000, b"", b""),
        ("cell.csv", b"a" * 1000, b'text\n"', b""),
    ],
)
def test_an_archive_that_grows_like_no_text_is_refused(
    tmp_path: Path, name: str, unit: bytes, before: bytes, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_FREE_BYTES", 2**18)
    content = before + unit * 10_000 + behind
    path = write(tmp_path / f"{name}.gz", gzip.compress(content))
    assert "unpacks to more than 200 times its size" in refusal(path)
    with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as file:
        file.write(content)
    assert "unpacks to more than 200 times its size" in refusal(tmp_path / f"{name}.zst")


def test_an_archive_of_plain_text_may_grow(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"환자 {i}는 열이 난다"}) + "\n" for i in range(20_000))
    assert (
        len(read(SourceConfig(source=str(write(tmp_path / "a.jsonl.gz", gzip.compress(rows.encode(), 9)))))) == 20_000
    )


def test_a_parquet_file_of_few_words_written_out_is_refused(tmp_path: Path) -> None:
    word = pyarrow.array(["a" * 2000]).take(pyarrow.array([0] * 100_000))
    pyarrow.parquet.write_table(pyarrow.table({"text": word}), tmp_path / "a.parquet")
    assert "unpacks to more than 200 times its size" in refusal(tmp_path / "a.parquet")
    cells = pyarrow.array(["a" * 5_000_000] * 20, pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "b.parquet", compression="zstd")
    assert "unpacks to more than 200 times its size" in refusal(tmp_path / "b.parquet")


def test_words_of_a_dictionary_are_the_rows_that_plain_ones_are(tmp_path: Path) -> None:
    noise = [os.urandom(20_000).hex() for _ in range(40)]
    table = pyarrow.table({"text": [noise[i % 40] for i in range(100)], "id": [f"{i}" for i in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [record.text for record in read(SourceConfig(source=str(tmp_path / "a.parquet")))] == (  # type: ignore[union-attr]
        table.column("text").to_pylist()
    )


def test_a_file_without_one_record_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_USELESS_ROWS", 500)
    path = write(tmp_path / "a.jsonl", '{"text": 1}\n' + "{bad\n" * 10_000)
    said = refusal(path)
    assert "none of its first 500 rows is a valid record" in said and "must be text, found a number" in said
    good = write(tmp_path / "b.jsonl", '{"text": "x"}\n' + "{bad\n" * 10_000)
    assert "10000 of 10001 rows" in refusal(good)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ("a.jsonl", "{" + ",".join(f'"k{i}":1' for i in range(n)) + f',"k{n - 1}":2}}'),
        lambda n: ("a.csv", ",".join(f"c{i}" for i in range(n // 2)) + "\n" + ",".join("1" for i in range(n // 2))),
        lambda n: ("a.csv", 'text\n"' + ("a" * 99 + "\n") * n),
        lambda n: ("a.jsonl", '{"text": "' + "\\\\" * n * 20),
        lambda n: ("a.jsonl", '{"text": 1}\n' + ("[" * 50 + "\n") * n),
    ],
    ids=["key twice", "wide header", "unclosed quote", "unclosed string", "broken lines"],
)
def test_twice_the_file_takes_about_twice_the_time(tmp_path: Path, make: Callable[[int], tuple[str, str]]) -> None:
    def measure(n: int) -> float:
        name, content = make(n)
        path = write(tmp_path / f"{n}-{name}", content)
        started = time.process_time()
        with pytest.raises(InputError):
            read(SourceConfig(source=str(path)))
        return time.process_time() - started

    measure(100)
    small, large = measure(4_000), measure(16_000)
    assert large < 10 * small + 0.3  # a quadratic reader takes sixteen times as long


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a pipe or a device" in refusal(tmp_path / "a.jsonl")
    assert "is a pipe or a device" in refusal("/dev/zero", kind="text")
    assert "cannot be read: Input/output error" in refusal("/proc/self/mem", kind="text")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "there is no such file" in refusal(tmp_path / "loop.jsonl")


def test_the_quarantine_s_lines_are_bounded_and_keep_their_shape(tmp_path: Path) -> None:
    rows = [
        {**QUESTION, "answer": "Z" * 10**6},
        {**QUESTION, "answer": 9, "more": list(range(10**5))},
        {**QUESTION, "answer": 9, "deep": [[[[[[[[[[1]]]]]]]]]]},
        {**QUESTION, "answer": 9},
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows) + '{"bad ' + "x" * 10**6 + "\n"
    source = SourceConfig(source=str(write(tmp_path / "a.jsonl", content)))
    write_quarantine(tmp_path / "q.jsonl", {"a": source})
    lines = (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 30_000
    found = [json.loads(line) for line in lines]
    assert found[0]["row"]["question"] == "Q?" and "(1,000,000 characters)" in found[0]["row"]["answer"]
    assert found[3]["row"] == rows[3] and "(1,000,006 characters)" in found[4]["row"]
    assert scan(source).bad.total() == 5


def test_values_as_messages_show_them() -> None:
    assert shorten("a") == "'a'" and shorten(["a", 1, None]) == "['a', 1, None]" and shorten(5) == "5"
    assert shorten("x" * 1000) == f"'{'x' * 200}'... and 800 characters more"
    assert len(shorten({"k" * 1000: ["v" * 1000] * 1000})) < 300
    assert clean("a\x1b[2Jb\x9b") == "a\\x1b[2Jb\\x9b" and clean("한글 텍스트") == "한글 텍스트"
    assert list_names(["a", "b"]) == "a, b" and list_names(f"c{i}" for i in range(25)).endswith("c19, and 5 more")
    assert bound_row({"a": 1, "b": ["x"]}) == {"a": 1, "b": ["x"]} and bound_row(b"\xff") == "b'\\xff'"
