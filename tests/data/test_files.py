"""Rows of files of every known ending, packed or not, of folders, globs, object stores and the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from medlora.data.reading.files import list_files, parse_hub_id, read_file
from medlora.data.reading.formats import Broken
from medlora.errors import InputError

ROW = {"id": "q1", "question": "Q,\nsecond line", "A": "가", "B": "b", "answer": "B"}


def read_all(name: str | Path, kind: str = "auto") -> list[Any]:
    return [row for file in list_files(str(name), kind) for _, row in read_file(file)]


def refusal(name: str | Path, kind: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        read_all(name, kind)
    return str(caught.value)


def write_zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(content)


def test_every_ending_holds_the_same_rows_packed_or_not(tmp_path: Path) -> None:
    line = (json.dumps(ROW, ensure_ascii=False) + "\n").encode()
    array = json.dumps([ROW], indent=1).encode()
    table = 'id,question,A,B,answer\nq1,"Q,\nsecond line",가,b,B\n'.encode()
    for name, content in (("rows.jsonl", line), ("rows.json", array), ("lines.json", line), ("rows.csv", table)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        write_zst(tmp_path / f"{name}.zst", content)
        for packed in (name, f"{name}.gz", f"{name}.zst"):
            assert read_all(tmp_path / packed) == [ROW], packed
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "rows.parquet")
    assert read_all(tmp_path / "rows.parquet") == [ROW]
    assert len(read_all(tmp_path)) == 13
    assert len(read_all(f"{tmp_path}/rows.json*")) == 6


def test_a_row_stands_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"one\ntwo",A\n\nthree,B\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('[\n {"a":\n 1},\n\n {"a": 2}, {"a": 3}\n]', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    places = {
        name: [where.rpartition(":")[2] for where, _ in read_file(str(tmp_path / name))]
        for name in ("a.csv", "a.json", "a.jsonl")
    }
    assert places == {"a.csv": ["2", "5"], "a.json": ["2", "5", "5#3"], "a.jsonl": ["1", "3"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt"])
def test_reading_may_begin_at_any_row(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{i}"} for i in range(5)]
    lines = [json.dumps(row) for row in rows]
    content = {
        "a.jsonl": "\n\n".join(lines),
        "a.csv": "text\n0\n1\n\n2\n3\n4\n",
        "a.json": f"[{','.join(lines)}]",
        "a.txt": "0\n1\n \n2\n3\n4",
    }
    (tmp_path / name).write_text(content[name], encoding="utf-8")
    whole = list(read_file(str(tmp_path / name)))
    assert [row for _, row in whole] == rows
    for start in range(6):
        assert list(read_file(str(tmp_path / name), start)) == whole[start:]


def test_a_csv_without_header_is_question_options_answer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"Q\n1",a,b,c,B\nQ2,x,y,z,A\n', encoding="utf-8")
    assert read_all(tmp_path / "a.csv") == [
        {"question": "Q\n1", "A": "a", "B": "b", "C": "c", "answer": "B"},
        {"question": "Q2", "A": "x", "B": "y", "C": "z", "answer": "A"},
    ]


def test_a_text_may_begin_like_an_archive_s_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("PKU는 페닐케톤뇨증이다.\n", encoding="utf-8")
    assert read_all(tmp_path / "a.txt") == [{"text": "PKU는 페닐케톤뇨증이다."}]


def test_a_header_may_end_with_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,A,B\nQ,B,x,y\n", encoding="utf-8")
    assert read_all(tmp_path / "a.csv") == [{"question": "Q", "answer": "B", "A": "x", "B": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "kind", "place"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "broken JSON", 2),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', "not UTF-8", 3),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "key twice", 1),
        ("a.jsonl", b'{"b": 1}\n' + b"[" * 100_000 + b"\n", "broken JSON", 2),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "cells do not fit", 3),
        ("a.csv", b"a,b\n1\n", "cells do not fit", 2),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8", 2),
        ("a.csv", b'a,b\n1,"open\n2,3\n', "broken CSV", 2),
        ("a.txt", b"one\n\xff\xfe two\n", "not UTF-8", 2),
    ],
)
def test_a_row_that_cannot_be_taken_apart_is_broken_where_it_stands(
    tmp_path: Path, name: str, content: bytes, kind: str, place: int
) -> None:
    (tmp_path / name).write_bytes(content)
    broken = [(where, row) for where, row in read_file(str(tmp_path / name)) if isinstance(row, Broken)]
    assert [(where, row.kind) for where, row in broken] == [(f"{tmp_path / name}:{place}", kind)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("a.jsonl", "글".encode("utf-32"), "is UTF-32, not UTF-8 text"),
        ("a.jsonl", gzip.compress(b"x", mtime=0), "is gzip, not UTF-8 text"),
        ("a.txt", b"PK\x03\x04", "is a zip archive"),
        ("a.jsonl.gz", b"{}", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20], "cannot be unpacked"),
        ("a.jsonl.zst", b"no zstd", "cannot be unpacked"),
        ("a.parquet", b"no parquet", "is no readable parquet file"),
        ("a.json", b'[{"a": 1}, {"a" 2}]', ":1:17: not valid JSON"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "Expecting ',' or ']'"),
        ("a.json", b'[{"a": 1}] []', "Extra data behind the array"),
        ("a.json", b'{\n "data": []\n}', "is one JSON object over many lines; rows are lines of JSON or the items"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2: is not UTF-8"),
        ("a.json", b'[{"a": 1, "a": 2}]', "the key 'a' appears twice"),
        ("a.csv", b"a,b,a\n1,2,3\n", "the column 'a' appears twice"),
        ("a.docx", b"x", "cannot tell what .docx holds; known: .jsonl"),
        ("a", b"x", "lines of plain text need `kind: text`"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name)
    assert said in text and str(tmp_path / name) in text


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no such file or folder; sources are read relative to" in refusal(tmp_path / "nope.jsonl")
    assert "no file matches" in refusal(f"{tmp_path}/*.jsonl")
    assert "no .jsonl, .json, .csv, .tsv, .parquet, .txt file in this folder" in refusal(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"text": "a"}'),
        ("a.csv", b"text\na\n"),
        ("a.txt", b"a"),
        ("a.json", b'[{"text":"a"}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert read_all(tmp_path / name) == [{"text": "a"}]


def test_aligned_files_stay_aligned(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.ko").write_text("하나\n\n둘\n", encoding="utf-8")
    name = f"{tmp_path / 'a.en'}|{tmp_path / 'a.ko'}"
    rows = list(read_file(name))
    assert [row for _, row in rows] == [{"english": "one", "korean": "하나"}, {"english": "two", "korean": "둘"}]
    assert rows[1][0] == f"{tmp_path / 'a.en'}:3"
    (tmp_path / "a.ko").write_text("하나\n", encoding="utf-8")
    assert "3 and 1 lines; aligned files have the same number" in refusal(name)
    (tmp_path / "a.ko").write_text("하나\n\n둘\n셋\n넷\n", encoding="utf-8")
    assert "3 and 5 lines" in refusal(name)
    (tmp_path / "folder").mkdir()
    assert "no .jsonl" in refusal(f"{tmp_path / 'a.en'}|{tmp_path / 'folder'}")
    assert "there is no such file" in refusal(f"{tmp_path / 'a.en'}|{tmp_path / 'nope'}")


def test_object_stores_go_through_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    (tmp_path / "bucket" / "deep").mkdir(parents=True)
    (tmp_path / "bucket" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "bucket" / "deep" / "b.parquet")
    (tmp_path / "bucket" / "notes.md").write_text("no data")

    class Store:
        """Any store of pyarrow's interface, below a folder here."""

        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            assert uri.startswith("s3://")
            return fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), uri.partition("://")[2]

    monkeypatch.setattr(fs, "FileSystem", Store)
    assert list_files("s3://bucket") == ["s3://bucket/a.jsonl.gz", "s3://bucket/deep/b.parquet"]
    assert read_all("s3://bucket") == [ROW, ROW]
    assert "there is no such file" in refusal("s3://bucket/nope.jsonl")
    assert "cannot tell what .md holds" in refusal("s3://bucket/notes.md")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:sean0042/KorMedMCQA/doctor:train", ("sean0042/KorMedMCQA", "doctor", "train", None)),
        ("hf:a/b:test@v1.0", ("a/b", None, "test", "v1.0")),
        ("hf:a/b/c:train[:100]@abc", ("a/b", "c", "train[:100]", "abc")),
    ],
)
def test_hub_ids(name: str, parts: tuple[str | None, ...]) -> None:
    assert parse_hub_id(name) == parts


@pytest.mark.parametrize("name", ["hf:KorMedMCQA:train", "hf:a/b", "hf:a/b/c/d:train", "hf:../b:train"])
def test_what_is_no_hub_id_is_told_how_to_write_one(name: str) -> None:
    with pytest.raises(InputError, match="write hf:owner/name/config:split"):
        parse_hub_id(name)


def test_a_hub_id_goes_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # load_dataset takes a local folder of the same path before it asks the hub.
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_all("hf:owner/name:train") == [ROW]
    assert "without a hub, download the data" in refusal("hf:owner/absent:train")
