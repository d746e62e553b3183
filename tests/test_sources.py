from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora import config
from medlora.config import SourceConfig
from medlora.errors import InputError
from medlora.records import McqRecord, RecordError, TextRecord, TranslationRecord
from medlora.sources import hash_records, parse_hub_id, read, to_record

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


@pytest.mark.parametrize(
    ("answer", "letter"), [(1, "A"), (3, "C"), ("B", "B"), ("b", "B"), (" C ", "C"), ("2", "B"), (2.0, "B")]
)
def test_an_answer_is_a_letter_or_a_number_from_one(answer: Any, letter: str) -> None:
    record = to_record({**QUESTION, "answer": answer})
    assert isinstance(record, McqRecord) and record.answer == letter


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 0}, "answer 0 is outside 1..3"),
        ({"answer": 4}, "answer 4 is outside 1..3"),
        ({"answer": "E"}, "answer 'E' is none of the options A, B, C"),
        ({"answer": "AB"}, "answer 'AB' is none of the options"),
        ({"answer": None}, "`answer` is None"),
        ({"answer": True}, "`answer` is True"),
        ({"answer": float("nan")}, "answer nan is none of the options"),
        ({"answer": 1.5}, "answer 1.5 is none of the options"),
        ({"question": ""}, "`question` is empty"),
        ({"question": "  "}, "`question` is empty"),
        ({"question": None}, "`question` must be text, found NoneType"),
        ({"question": 5}, "`question` must be text, found int"),
        ({"B": "", "C": "c"}, "`option B` is empty"),
        ({"B": None, "C": None}, "1 options; a question needs 2 to 10"),
        ({"B": 7}, "`option B` must be text, found int"),
        ({"options": "abc"}, "`options` must be a list or a mapping"),
        ({"rationale": ["x"]}, "a rationale is text or a mapping"),
        ({"rationale": {"guess": "x"}}, "rationale field 'guess' is none of facts"),
    ],
)
def test_a_row_that_is_no_question_has_a_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason.replace("(", r"\(")):
        to_record({**QUESTION, **change})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RecordError, match="no `answer` column; found id, question, A, B, C, asnwer"):
        to_record({**{k: v for k, v in QUESTION.items() if k != "answer"}, "asnwer": 1})
    with pytest.raises(RecordError, match="unknown schema .columns stem."):
        to_record({"stem": "x"})


def test_a_rationale_is_taken_as_it_is_or_by_its_fields() -> None:
    plain = to_record({**QUESTION, "cot": " 그래서 B. "})
    fields = to_record({**QUESTION, "rationale": "facts: 열\nanalysis: 그래서\n둘째 줄\n"})
    assert isinstance(plain, McqRecord) and plain.rationale == {"analysis": "그래서 B."}
    assert isinstance(fields, McqRecord) and fields.rationale == {"facts": "열", "analysis": "그래서\n둘째 줄"}


def test_bad_rows_are_named_with_file_line_and_reason(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2", "answer": 9}, {**QUESTION, "id": "q1"})
    said = refusal(path)
    assert "2 of 3 rows are no valid records" in said
    assert f"{path}:2: answer 9 is outside 1..3" in said
    assert f"{path}:3: id 'q1' stands at {path}:1 already" in said


def test_only_the_first_ten_bad_rows_are_shown(tmp_path: Path) -> None:
    said = refusal(write_rows(tmp_path, *[{**QUESTION, "id": str(i), "answer": 9} for i in range(14)]))
    assert said.count("outside 1..3") == 10 and "... and 4 more" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', ":2:"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', ":3: is not UTF-8"),
        (b"", "the file is empty"),
        (b" \n ", "the file is empty"),
        (b"[1, 2]\n", "a row is a mapping of columns, found list"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert str(path) in refusal(path) and said in refusal(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_from(path)[0].text == "a"


def test_json_csv_parquet_and_folders_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    wanted = [McqRecord("q1", "Q,\nsecond line", ("a", "b", "c"), "B")]
    row = {**QUESTION, "question": "Q,\nsecond line"}
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "rows.csv").write_text('id,question,A,B,C,answer\nq1,"Q,\nsecond line",a,b,c,2\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder, row)
    for name in ("rows.json", "rows.csv", "rows.parquet", "folder"):
        assert read_from(tmp_path / name) == wanted, name


def test_lines_of_text_and_aligned_files(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.ko").write_text("하나\n둘\n", encoding="utf-8")
    pairs = read_from(f"{tmp_path / 'a.en'}|{tmp_path / 'a.ko'}")
    assert [(pair.english, pair.korean) for pair in pairs] == [("one", "하나"), ("two", "둘")]
    assert [record.text for record in read_from(tmp_path / "a.ko", kind="text")] == ["하나", "둘"]
    assert "lines of plain text need `kind: text`" in refusal(tmp_path / "a.ko")
    (tmp_path / "a.ko").write_text("하나\n", encoding="utf-8")
    assert "2 and 1 lines" in refusal(f"{tmp_path / 'a.en'}|{tmp_path / 'a.ko'}")


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refusal(tmp_path / "nope.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no .jsonl" in refusal(tmp_path / "empty")
    said = refusal(write_rows(tmp_path, {"text": "a"}, QUESTION))
    assert "holds mcq, text records" in said
    assert "unknown schema" in refusal(write_rows(tmp_path, {"text": "a"}), kind="translation")
    assert "no such part; known: text, translation" in refusal("miniature:nope")


def test_limit_takes_the_first_and_does_not_look_further(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QUESTION, {**QUESTION, "id": "q2"}, {"broken": 1})
    assert [record.id for record in read_from(path, limit=2)] == ["q1", "q2"]


def test_the_data_hash_tells_any_change(tmp_path: Path) -> None:
    one, two = to_record(QUESTION), to_record({**QUESTION, "C": "c "})
    assert hash_records([one]) == hash_records([to_record(dict(QUESTION))])
    assert len({hash_records([one]), hash_records([two]), hash_records([one, two]), hash_records([two, one])}) == 4


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
    write_rows(folder, QUESTION, name="train.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_from("hf:owner/name:train") == [McqRecord("q1", "Q?", ("a", "b", "c"), "B")]
    assert "without a hub, download the data" in refusal("hf:owner/absent:train")


def test_real_files_are_read_whole(real_data: Path) -> None:
    sizes = {name: len(read_from(real_data / "kormedmcqa" / f"{name}.jsonl")) for name in ("train", "dev", "test")}
    assert sizes == {"train": 909, "dev": 300, "test": 295}
    assert len(read_from(f"{real_data / 'covid19_cdc.en'}|{real_data / 'covid19_cdc.ko'}")) == 258


def test_a_test_names_the_column_of_its_subjects(tmp_path: Path) -> None:
    row = {"question": "q?", "A": "x", "B": "y", "answer": "A", "field": "cardiology", "subject": "other"}
    path = str(write_rows(tmp_path, row, name="t.jsonl"))
    (named,) = read(config.TestConfig(name="t", source=path, subject="field"))
    (plain,) = read(config.TestConfig(name="t", source=path))
    assert (named.subject, plain.subject) == ("cardiology", "other")
    with pytest.raises(InputError, match=r"t.jsonl:1: no column 'topic' for the subject; found question, A"):
        read(config.TestConfig(name="t", source=path, subject="topic"))
