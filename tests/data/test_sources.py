"""A source as records: bad rows are counted, shown and kept; what was scanned once need not be again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from medlora.config.sources import SourceConfig, TestConfig
from medlora.data.quarantine import write_quarantine
from medlora.data.sources import Scan, cut_pieces, hash_records, pack_scan, read, remember, scan, stream, stream_piece
from medlora.errors import InputError
from medlora.records import McqRecord, TextRecord, TranslationRecord

QUESTION = {"id": "q1", "question": "Q?", "A": "a", "B": "b", "C": "c", "answer": 2}


def write_rows(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_from(path: Path | str, **more: Any) -> list[Any]:
    return read(SourceConfig(source=str(path), **more))


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_from(path, **more)
    return str(caught.value)


def test_the_columns_say_what_a_row_is(tmp_path: Path) -> None:
    assert read_from(write_rows(tmp_path, QUESTION)) == [McqRecord("q1", "Q?", ("a", "b", "c"), "B")]
    assert read_from(write_rows(tmp_path, {"text": "글"})) == [TextRecord("rows.jsonl-1", "글")]
    assert read_from(write_rows(tmp_path, {"english": "e", "korean": "한"})) == [
        TranslationRecord("rows.jsonl-1", "e", "한")
    ]


def test_bad_rows_are_named_with_file_line_and_reason(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2", "answer": 9}, {**QUESTION, "id": "q1"})
    said = refusal(path)
    assert "2 of 3 rows are no valid records (answer out of range 1, id twice 1)" in said
    assert f"{path}:2: answer 9 is outside 1..3" in said
    assert f"{path}:3: id 'q1' is at {path}:1 already" in said
    assert "--set data.max_bad_fraction=0.667" in said


def test_a_share_of_bad_rows_may_be_left_out(tmp_path: Path) -> None:
    rows = [{**QUESTION, "id": str(i), "answer": 9 if i in (2, 7) else 1} for i in range(10)]
    source = SourceConfig(source=str(write_rows(tmp_path, *rows)))
    assert [record.id for record in read(source, 0.2)] == list("01345689")
    with pytest.raises(InputError, match="2 of 10 rows"):
        read(source, 0.19)
    found = scan(source)
    assert (found.rows, found.records, found.bad) == (10, 8, {"answer out of range": 2})
    assert found.hash == hash_records(read(source, 0.2))


def test_only_the_first_ten_bad_rows_are_shown(tmp_path: Path) -> None:
    said = refusal(write_rows(tmp_path, *[{**QUESTION, "id": str(i), "answer": 9} for i in range(14)]))
    assert said.count("outside 1..3") == 10 and "... and 4 more" in said


def test_the_quarantine_holds_every_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": ""}\n')
    clean = SourceConfig(source=str(write_rows(tmp_path, QUESTION, name="clean.jsonl")))
    file = tmp_path / "quarantine.jsonl"
    write_quarantine(file, {"a": SourceConfig(source=str(path)), "b": clean})
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["where"], row["kind"]) for row in rows] == [
        (f"{path}:2", "broken JSON"),
        (f"{path}:3", "not UTF-8"),
        (f"{path}:4", "lone surrogate"),
        (f"{path}:5", "empty field"),
    ]
    assert rows[0]["source"] == str(path) and rows[0]["row"] == '{"text": ' and rows[3]["row"] == {"text": ""}
    write_quarantine(file, {"b": clean})
    assert not file.exists()


def test_a_question_answered_twice_otherwise_is_a_contradiction(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2"}, {**QUESTION, "id": "q3", "answer": 1})
    said = refusal(path)
    assert f"{path}:3: the answer is A, but B to the same question with the same options at {path}:1" in said
    assert scan(SourceConfig(source=str(path))).flags["same question, options and answer again"] == 1


def test_one_source_holds_one_kind(tmp_path: Path) -> None:
    assert "no `text` column; found id, question" in refusal(write_rows(tmp_path, {"text": "a"}, QUESTION))
    assert "unknown schema" in refusal(write_rows(tmp_path, {"text": "a"}), kind="translation")
    assert "is text in a source of mcq" in refusal("miniature:text", kind="mcq")
    assert "no such part; known: text, translation" in refusal("miniature:nope")


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(" \n ")
    assert "holds no records" in refusal(path)
    path.write_text("[1, 2]\n")
    assert "a row is a mapping of columns, found a list" in refusal(write_rows(tmp_path, [1, 2], name="l.jsonl"))


def test_an_adaptor_or_columns_may_be_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"question": "Q", "choices": ["x", "y", "z"], "answer": 1})
    assert "say whether the first option is 0 or 1: columns.answer.base" in refusal(path)
    columns = {"question": "question", "options": "choices", "answer": {"column": "answer", "base": 0}}
    assert read_from(path, columns=columns)[0].answer == "B"
    assert "there is no adaptor 'medical'; known: medmcqa, medqa" in refusal(path, adaptor="medical")
    assert "no `opa` column" in refusal(path, adaptor="medmcqa")
    with pytest.raises(ValueError, match="adaptor, columns: give one of them"):
        SourceConfig(source="x", adaptor="medqa", columns=columns)


def test_keys_that_came_later_do_not_change_a_fingerprint() -> None:
    assert SourceConfig(source="x").model_dump() == {"source": "x", "kind": "auto", "limit": None}


def test_limit_takes_the_first_and_does_not_look_further(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2"}, {"broken": 1})
    assert [record.id for record in read_from(path, limit=2)] == ["q1", "q2"]


def test_each_file_of_a_folder_has_a_schema_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    (folder / "deep").mkdir(parents=True)
    write_rows(folder, {**QUESTION, "id": "q1"}, name="a.jsonl")
    plain = {"question": "Q2", "opa": "w", "opb": "x", "opc": "y", "opd": "z"}
    write_rows(folder, {**plain, "cop": 1}, name="b.jsonl")
    write_rows(folder / "deep", {**plain, "question": "Q3", "cop": 4}, name="b.jsonl")
    found = scan(SourceConfig(source=str(folder)))
    assert found.schema == "letters, medmcqa" and found.base == 1
    assert [(r.id, r.answer) for r in read_from(folder)] == [("q1", "B"), ("b.jsonl-1", "A"), ("deep/b.jsonl-1", "D")]
    write_rows(folder, {"text": "a"}, name="c.jsonl")
    assert "is text in a source of mcq; one source holds one kind" in refusal(folder)


def test_the_base_is_decided_over_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    row = {"stem": "Q", "a": "w", "b": "x", "c": "y"}
    write_rows(folder, {**row, "key": 1}, name="1.jsonl")
    write_rows(folder, {**row, "stem": "Q2", "key": 0}, name="2.jsonl")
    write_rows(folder, {**row, "stem": "Q3", "key": 2}, name="3.jsonl")
    columns = {"question": "stem", "options": ["a", "b", "c"], "answer": "key"}
    assert [record.answer for record in read_from(folder, columns=columns)] == ["B", "A", "C"]


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION)
    assert len(read_from(path)) == 1
    write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2"})
    assert len(read_from(path)) == 2
    before = path.stat()
    write_rows(tmp_path, {**QUESTION, "answer": 3}, {**QUESTION, "id": "q2", "answer": 3})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [record.answer for record in read_from(path)] == ["C", "C"]


def test_pieces_together_are_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        rows = [{**QUESTION, "id": f"{name}{i}", "answer": 9 if i == 3 else 1} for i in range(10)]
        write_rows(folder, *rows, name=f"{name}.jsonl")
    source = SourceConfig(source=str(folder))
    found = scan(source)
    pieces = [(file, start, min(start + 4, rows)) for file, rows in found.files for start in range(0, rows, 4)]
    assert len(pieces) == 6 and found.rows == 20
    whole = [record for piece in pieces for record in stream_piece(source, found, *piece)]
    assert whole == list(stream(source)) and len(whole) == 18


def test_a_source_is_cut_into_whole_rows_in_order() -> None:
    found = Scan("s", files=[("a", 2500), ("b", 10)], records=2510)
    assert cut_pieces(found, 2) == [("a", 0, 1255), ("a", 1255, 2500), ("b", 0, 10)]
    assert cut_pieces(found, 100) == [("a", 0, 1000), ("a", 1000, 2000), ("a", 2000, 2500), ("b", 0, 10)]


def test_a_scan_is_remembered_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceConfig(source=str(write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2", "answer": 9})))
    found, packed = scan(source), json.loads(json.dumps(pack_scan(source)))
    monkeypatch.setattr("medlora.data.sources._SCANS", {})
    remember(packed)
    monkeypatch.setattr("medlora.data.sources._scan", lambda *_: pytest.fail("looked again"))
    assert scan(source) == Scan(**{**vars(found), "shown": []}) and len(list(stream(source))) == 1


def test_the_data_hash_tells_any_change() -> None:
    one, two = (McqRecord("q1", "Q?", ("a", "b", c), "B") for c in ("c", "c "))
    assert hash_records([one]) == hash_records([McqRecord("q1", "Q?", ("a", "b", "c"), "B")])
    assert len({hash_records([one]), hash_records([two]), hash_records([one, two]), hash_records([two, one])}) == 4


def test_a_test_names_the_column_of_its_subjects(tmp_path: Path) -> None:
    row = {"question": "q?", "A": "x", "B": "y", "answer": "A", "field": "cardiology", "subject": "other"}
    path = str(write_rows(tmp_path, row, name="t.jsonl"))
    (named,) = read(TestConfig(name="t", source=path, subject="field"))
    (plain,) = read(TestConfig(name="t", source=path))
    assert (named.subject, plain.subject) == ("cardiology", "other")
    with pytest.raises(InputError, match=r"t.jsonl:1: no column 'topic' for the subject; found question, A"):
        read(TestConfig(name="t", source=path, subject="topic"))
