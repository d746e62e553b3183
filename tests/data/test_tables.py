"""Tables as Excel, pandas and exam boards write them: separators, encodings, workbooks, Korean headers, pictures."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.cli.inspect import main
from medlora.config.sources import SourceConfig
from medlora.data.reading.encodings import recognise
from medlora.data.reading.tables import find_separator
from medlora.data.sources import read, scan
from medlora.errors import InputError
from medlora.records import McqRecord, Record

HEADER = ["question", "A", "B", "C", "answer"]
ROWS = [["열이 나면, 무엇을 보나; 먼저?", "체온", "맥박", "혈압", "1"], ["Q2?", "가", "나", "다", "3"]]
RECORDS = [("열이 나면, 무엇을 보나; 먼저?", ("체온", "맥박", "혈압"), "A"), ("Q2?", ("가", "나", "다"), "C")]


def write_table(path: Path, separator: str, above: str = "", encoding: str = "utf-8") -> Path:
    def cell(text: str) -> str:
        return f'"{text}"' if separator in text else text

    lines = [separator.join(map(cell, row)) for row in (HEADER, *ROWS)]
    path.write_bytes((above + "\r\n".join(lines) + "\r\n").encode(encoding))
    return path


def ask(path: Path, **more: Any) -> list[tuple[str, tuple[str, ...], str]]:
    return [_plain(record) for record in read(SourceConfig(source=str(path), **more))]


def _plain(record: Record) -> tuple[str, tuple[str, ...], str]:
    assert isinstance(record, McqRecord)
    return record.question, record.options, record.answer


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(SourceConfig(source=str(path), **more))
    return str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_is_read_by_its_own_separator(tmp_path: Path, separator: str) -> None:
    path = write_table(tmp_path / "a.csv", separator)
    assert ask(path) == RECORDS
    assert ask(write_table(tmp_path / "sep.csv", separator, f"sep={separator}\r\n")) == RECORDS
    assert ask(write_table(tmp_path / "bom.csv", separator, "\ufeff")) == RECORDS
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert ask(tmp_path / "a.csv.gz") == RECORDS
    note = {"\t": "tab", ";": "semicolon", "|": "bar"}.get(separator)
    flags = scan(SourceConfig(source=str(path))).flags
    assert flags == ({f"cells separated by {note}": 1} if note else {})


def test_a_tsv_is_cut_at_tabs(tmp_path: Path) -> None:
    assert ask(write_table(tmp_path / "a.tsv", "\t")) == RECORDS
    assert ask(tmp_path) == RECORDS
    (tmp_path / "t.tsv").write_text("english\tkorean\na, b\t가, 나\n", encoding="utf-8")
    assert len(read(SourceConfig(source=str(tmp_path / "t.tsv")))) == 1


def test_rows_stand_where_they_did_below_a_sep_line(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", ";", "sep=;\n")
    path.write_bytes(path.read_bytes() + b"Q3?;x;y;z;9\r\n")
    assert f"{path}:5: answer '9' is outside 1..3" in refusal(path)


def test_a_separator_with_two_meanings_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("code;name,note\n1;a,b\n2;c,d\n", encoding="utf-8")
    said = refusal(path, columns={"text": "name"})
    assert "comma (',') and semicolon (';') both cut every row into equally many cells" in said
    assert "separator: ','" in said
    found = read(SourceConfig(source=str(path), columns={"text": "note"}, separator=","))  # type: ignore[arg-type]
    assert [record.text for record in found] == ["b", "d"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("text\na; b, c\nd\n", ","),
        ("question,A,B,answer\nx; y; z; w,1,2,A\n", ","),
        ("Q 1; of what?,a,b,c,B\nQ 2; which?,a,b,c,A\n", ","),
        ("question;A;B;answer\nx, y;1,5;2,5;A\n", ";"),
        ("질문;보기1;보기2;정답\nx, y;1,5;2,5;①\n", ";"),
        ("id,question;text,x\n1,a;b,c\n2,only,c\n", ","),
        ("", ","),
    ],
)
def test_the_separator_is_the_one_that_makes_columns(text: str, separator: str) -> None:
    assert find_separator("a.csv", text.encode()) == (separator, 0)


@pytest.mark.parametrize("encoding", ["cp949", "euc-kr", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_korean_encodings_are_recognised_and_noted(tmp_path: Path, encoding: str, name: str) -> None:
    rows = [{"text": "환자는 열이 나고 기침을 한다."}, {"text": "① 체온 37.5℃, 맥박 90회"}]
    content = {
        "a.csv": "text\n" + "".join(f'"{row["text"]}"\n' for row in rows),
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "a.json": json.dumps(rows, ensure_ascii=False),
        "a.txt": "".join(row["text"] + "\n" for row in rows),
    }[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    found = read(SourceConfig(source=str(tmp_path / name)))
    assert [record.text for record in found] == [row["text"] for row in rows]  # type: ignore[union-attr]
    note = {"utf-16": {"file read as UTF-16": 1}, "utf-8-sig": {}}.get(encoding, {"file read as CP949 (EUC-KR)": 1})
    assert scan(SourceConfig(source=str(tmp_path / name))).flags == note


def test_an_encoding_is_recognised_by_words_not_by_luck() -> None:
    korean = "환자는 열이 나고 기침을 한다. 쀍" * 5
    assert recognise(korean.encode("cp949")) == "cp949"
    assert recognise(korean.encode()) == recognise(b"plain") == recognise(b"") == "utf-8"
    assert recognise(korean.encode() + b"\xff") == "utf-8"
    assert recognise(korean.encode() + "열이 난다".encode("cp949")) == "utf-8"
    assert recognise(korean.encode("cp949") + b"\xff\xff") == "utf-8"
    assert recognise("fièvre élevée à l'hôpital, où".encode("latin-1")) == "utf-8"
    assert recognise("熱が出た患者です。咳もあります。".encode("shift-jis")) == "utf-8"
    assert recognise("患者出现发热和咳嗽症状，需要进行检查。".encode("gbk")) == "utf-8"
    assert recognise("환자(患者)는 발열(發熱)과 기침을 한다".encode("cp949")) == "cp949"
    assert recognise(korean.encode("cp949")[:-1]) == "cp949", "a sample may end inside a character"


def test_a_named_encoding_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((b"plain" * 240 + b"\n") * 1000 + "열이 난다\n".encode("cp949"))  # far behind what is sampled
    assert "1 of 1001 rows are no valid records (not UTF-8 1)" in refusal(path, limit=None)
    assert "give its `encoding`" in refusal(path)
    assert read(SourceConfig(source=str(path), encoding="euc-kr"))[-1].text == "열이 난다"  # type: ignore[union-attr]


def test_bytes_that_the_encoding_does_not_know_make_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("열이 난다\n".encode("cp949") + b"\xff\xff\n" + "기침\n".encode("cp949"))
    assert "1 of 3 rows" in refusal(path, encoding="cp949") and f"{path}:2: is not UTF-8" in refusal(
        path, encoding="cp949"
    )


EXAMS = [
    (["문제", "보기1", "보기2", "보기3", "정답", "해설", "과목"], "exam"),
    (["문항", "선택지1", "선택지2", "선택지3", "답", "풀이", "분야"], "exam"),
    (["질문", "①", "②", "③", "정답", "해설", "과목명"], "exam"),
    (["번호", "문제", "보기 1", "보기 2", "보기 3", "정답", "비고"], "exam"),
    (["문제 ", "1번", "2번", "3번", "정답번호", "정답해설", "영역"], "exam"),
    (["문제", "(1)", "(2)", "(3)", "정답", "해설", "과목"], "exam"),
    (["문제", "A", "B", "C", "정답", "해설", "과목"], "exam"),
    (["question", "option1", "option2", "option3", "answer", "explanation", "subject"], "table"),
    (["question", "Choice_A", "Choice_B", "Choice_C", "Answer", "cot", "subject"], "table"),
]


@pytest.mark.parametrize(("header", "schema"), EXAMS, ids=[",".join(header) for header, _ in EXAMS])
def test_headers_of_exams_are_known(tmp_path: Path, header: list[str], schema: str) -> None:
    values = {"정답": "③", "답": "3번", "정답번호": "3.0"}
    texts = iter(["열", "기침", "발진"])
    row = []
    for name in header:
        if "문제" in name or name in ("문항", "질문", "question"):
            row.append("무엇인가?")
        elif name in values or name.casefold() == "answer":
            row.append(values.get(name, "C"))
        elif name in ("해설", "풀이", "정답해설", "explanation", "cot"):
            row.append("그래서 발진")
        elif name in ("과목", "분야", "과목명", "영역", "subject"):
            row.append("내과")
        else:
            row.append("7" if name == "번호" else "" if name == "비고" else next(texts))
    (tmp_path / "a.csv").write_text(f"{','.join(header)}\n{','.join(row)}\n", encoding="utf-8")
    source = SourceConfig(source=str(tmp_path / "a.csv"))
    (record,) = read(source)
    assert isinstance(record, McqRecord) and scan(source).schema == schema
    assert _plain(record) == ("무엇인가?", ("열", "기침", "발진"), "C")
    if "번호" not in header:
        assert record.subject == "내과" and record.rationale == {"analysis": "그래서 발진"}


def test_an_exam_may_have_its_options_in_one_column(tmp_path: Path) -> None:
    row = {"문제": "무엇인가?", "보기": "① 열\n② 기침", "정답": "②"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert ask(tmp_path / "a.jsonl") == [("무엇인가?", ("열", "기침"), "B")]


def test_columns_with_two_meanings_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("문제,질문,보기1,보기2,정답\nQ,R,a,b,1\n", encoding="utf-8")
    assert "the columns 문제 and 질문 could both be the question; name the columns" in refusal(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("문제,보기1,①,보기2,정답\nQ,a,x,b,1\n", encoding="utf-8")
    assert "보기1 and ① could both be the option A" in refusal(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("문제,보기1,보기3,정답\nQ,a,b,1\n", encoding="utf-8")
    assert "unknown schema" in refusal(tmp_path / "c.csv")


@pytest.mark.parametrize(
    "name", ["image", "images", "Image", "figure", "picture", "image_1", "img_path", "그림", "사진"]
)
def test_a_picture_that_is_not_read_is_reported(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"question": f"Q{i}", "A": "열", "B": "기침", "answer": "A"} for i in range(6)]
    for row, value in zip(rows, ("x.png", {"bytes": "abc"}, ["x.png"], None, "", []), strict=True):
        row[name] = value
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = f"column `{name}` is not empty, and pictures are not read"
    assert scan(SourceConfig(source=str(path))).flags == {said: 3}
    assert main([str(path)]) == 0 and "pictures are not read" in capsys.readouterr().out


def test_a_word_about_pictures_is_no_picture(tmp_path: Path) -> None:
    row = {
        "question": "Q",
        "A": "열",
        "B": "기침",
        "answer": "A",
        "image_count": 3,
        "imagery": "x",
        "image": float("nan"),
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert not scan(SourceConfig(source=str(tmp_path / "a.jsonl"))).flags


def write_book(path: Path, fill: Callable[[Any], None]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    fill(book)
    book.save(path)
    return path


def test_a_workbook_is_read_as_the_csv_that_it_would_be(tmp_path: Path) -> None:
    def fill(book: Any) -> None:
        for row in (HEADER, [None] * 5, ["Q1", "체온", 37.5, 90, 1], ["Q2", "가", "나", None, "②"]):
            book.active.append(row)

    path = write_book(tmp_path / "a.xlsx", fill)
    assert ask(path) == [("Q1", ("체온", "37.5", "90"), "A"), ("Q2", ("가", "나"), "B")]
    with pytest.raises(InputError, match="no .jsonl"):
        read(SourceConfig(source=str(tmp_path)))


def test_two_sheets_and_dates_are_refused_by_name(tmp_path: Path) -> None:
    import datetime

    def two(book: Any) -> None:
        for sheet in (book.active, book.create_sheet("둘째")):
            sheet.append(HEADER)

    def dated(book: Any) -> None:
        book.active.append(HEADER)
        book.active.append(["Q", datetime.date(2026, 1, 2), "3-4", "5", 1])

    assert "sheets with rows: 'Sheet', '둘째'; a source is one sheet" in refusal(write_book(tmp_path / "a.xlsx", two))
    said = refusal(write_book(tmp_path / "b.xlsx", dated))
    assert "b.xlsx:2: holds the date 2026-01-02" in said and "format the cells as text" in said


def test_what_is_no_workbook_or_grows_too_much_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "a.xlsx").write_bytes(b"no zip")
    assert "is no readable Excel workbook" in refusal(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b"\0" * 70_000_000)
    assert "more than a workbook of rows" in refusal(tmp_path / "b.xlsx")


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    assert "pip install 'medlora[excel]'" in refusal(tmp_path / "a.xlsx")


def test_keys_that_a_config_does_not_use_are_no_part_of_its_fingerprint() -> None:
    assert not {"encoding", "separator"} & SourceConfig(source="a.csv").model_dump().keys()
    assert SourceConfig(source="a.csv", separator=";").model_dump()["separator"] == ";"


def test_numbers_under_english_headers_count_as_the_data_shows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,option1,option2,option3,answer\nQ,x,y,z,0\nR,x,y,z,2\n", encoding="utf-8")
    assert [answer for _, _, answer in ask(path)] == ["A", "C"]
    path.write_text("question,option1,option2,option3,answer\nQ,x,y,z,1\nR,x,y,z,2\n", encoding="utf-8")
    assert "say whether the first option is 0 or 1: columns.answer.base" in refusal(path)
