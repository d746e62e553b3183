"""Every real file: its schema and counts, its odd and its bad rows, and one phase trained on all of them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora.cli.inspect import main
from medlora.config.sources import SourceConfig
from medlora.data.sources import Scan, read, scan
from medlora.errors import InputError
from medlora.records import McqRecord
from tests.support import ROOT
from tests.support.tiny_run import configure, run_all

FILES: dict[str, tuple[str, int, int]] = {
    "kormedmcqa/train.jsonl": ("letters", 909, 909),
    "kormedmcqa/dev.jsonl": ("letters", 300, 300),
    "kormedmcqa/test.jsonl": ("letters", 295, 295),
    "medmcqa_dev.json": ("medmcqa", 4183, 4183),
    "medqa_us_test.jsonl": ("medqa", 1273, 1273),
    "mmlu_medical": ("letters", 673, 673),
    "frenchmedmcqa_dev.json": ("frenchmedmcqa", 312, 164),
    "medxpertqa_text.jsonl": ("medxpertqa", 244, 244),
    "covid19_cdc.en|covid19_cdc.ko": ("translation", 258, 258),
    "covid19_cdc.ko": ("text", 258, 258),
}
"""Schema, rows, valid records: the table of docs/data.md."""


def locate(folder: Path, name: str) -> str:
    return "|".join(str(folder / part) for part in name.split("|"))


def look(folder: Path, name: str) -> Scan:
    return scan(SourceConfig(source=locate(folder, name), kind="text" if name == "covid19_cdc.ko" else "auto"))


@pytest.mark.parametrize("name", FILES)
def test_every_real_file_is_what_the_docs_say(real_data: Path, name: str) -> None:
    found = look(real_data, name)
    assert (found.schema, found.rows, found.records) == FILES[name]
    row = next(
        line
        for line in (DOCS.read_text(encoding="utf-8")).splitlines()
        if line.startswith(f"| `{name}`".replace("|covid", "\\|covid"))
    )
    cells = [cell.strip() for cell in row.replace("\\|", "/").split("|")[2:5]]
    assert cells == [found.schema, f"{found.rows:,}", f"{found.records:,}"]


DOCS = ROOT / "docs" / "data.md"


def test_what_is_special_about_them(real_data: Path) -> None:
    medmcqa, french, mmlu = (
        look(real_data, name) for name in ("medmcqa_dev.json", "frenchmedmcqa_dev.json", "mmlu_medical")
    )
    assert medmcqa.base == 1 and set(medmcqa.answers) == set("ABCD") and medmcqa.flags["two options of one text"] == 21
    assert french.bad == {"several answers": 148} and french.options == {5: 164}
    # Two of MMLU's medical subjects share questions.
    assert mmlu.flags["same question, options and answer again"] == 78
    assert mmlu.subjects["college_medicine_test"] == 173
    xpert = read(SourceConfig(source=locate(real_data, "medxpertqa_text.jsonl")))
    assert all(isinstance(record, McqRecord) and len(record.options) == 10 for record in xpert)
    assert not any("Answer Choices" in str(record) for record in xpert)
    assert look(real_data, "covid19_cdc.en|covid19_cdc.ko").flags == {"lost characters (U+FFFD, U+0080 to U+009F)": 3}


@pytest.mark.parametrize("name", FILES)
def test_every_real_file_can_be_inspected(real_data: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = ["--kind", "text"] if name == "covid19_cdc.ko" else []
    assert main([locate(real_data, name), *kind]) == 0
    said = capsys.readouterr().out
    schema, rows, records = FILES[name]
    assert f"{rows:,} in" in said and f"{records:,} valid" in said and f"{schema} (" in said
    assert said.count("sample ") == 3 and "characters" in said


def test_the_model_s_tokens_are_counted_where_a_base_is_named(
    real_data: Path, bases: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([locate(real_data, "kormedmcqa/dev.jsonl"), "--base", bases["gemma"]]) == 0
    said = capsys.readouterr().out
    assert "tokens" in said and "(of 300 examples)" in said and "answer:" in said


KEPT = {
    "duplicate_option_text": "two options of one text",
    "option_text_is_choice_letter": "",
    "options_are_bare_digits": "options are bare numbers or letters",
    "options_are_bare_digits_offset": "options are bare numbers or letters",
    "replacement_char_in_option": "lost characters (U+FFFD, U+0080 to U+009F)",
    "replacement_char_in_question": "lost characters (U+FFFD, U+0080 to U+009F)",
    "cjk_compatibility_ideograph": "not composed (Unicode NFC)",
}
QUARANTINED = {
    "multiple_answers": "several answers",
    "answer_as_letter_string": "no schema",
    "yes_no_maybe_target": "no schema",
}


def test_irregular_rows_are_kept_flagged_or_quarantined_by_their_kind(real_data: Path, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        json.loads(line) for line in (real_data / "irregular_rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    outcomes = []
    for i, case in enumerate(cases):
        path = tmp_path / f"{i}.jsonl"
        row = case["row"]
        if isinstance(row, list):
            path = tmp_path / f"{i}.csv"
            path.write_text(",".join(json.dumps(cell) for cell in row).replace("\\n", "\n"), encoding="utf-8")
        else:
            # A second, plain row lets the data say what 1 means.
            plain = {**row, "id": "plain", "cop": 4} if "cop" in row else {}
            path.write_text("".join(json.dumps(each) + "\n" for each in (row, plain) if each), encoding="utf-8")
        try:
            found = scan(SourceConfig(source=str(path)))
        except InputError as error:
            outcomes.append((case["kind"], "no schema" if "unknown schema" in str(error) else str(error)))
            continue
        bad = [kind for kind in found.bad if kind != "contradiction"]
        flags = [flag for flag in found.flags if flag != "same question, options and answer again"]
        outcomes.append((case["kind"], bad[0] if bad else "kept:" + ";".join(flags)))
    assert len(outcomes) == 50
    for case, (kind, outcome) in zip(cases, outcomes, strict=True):
        if "correct_answers" in case["row"] and len(case["row"]["correct_answers"]) > 1:
            assert outcome == "several answers", kind
        elif kind in QUARANTINED:
            assert outcome == QUARANTINED[kind], kind
        else:
            assert outcome.startswith("kept:") and KEPT.get(kind, "") in outcome, (kind, outcome)


def test_one_phase_learns_from_all_of_them(real_data: Path, bases: dict[str, str], tmp_path: Path, data: Path) -> None:
    sources = [
        {"source": locate(real_data, name), "sample": 20, **({"kind": "text"} if name == "covid19_cdc.ko" else {})}
        for name in FILES
        if "kormedmcqa/d" not in name and "kormedmcqa/te" not in name
    ]
    config = configure(
        bases["gemma"], data, p00={"sources": sources, "max_tokens": 2048, "max_steps": 2, "batch_size": 2}
    )
    events: list[dict[str, Any]] = []
    (manifest,) = run_all(config, tmp_path, ("00",), events.append).values()
    counts = manifest["counts"]["normal"]
    assert len(counts) == 8 and all(part["rows"] > 0 for part in counts.values())
    assert {part["examples"] for part in counts.values()} == {20, 40}
    said = [event["text"] for event in events if event["event"] == "note"]
    assert sum("tokens of an example: median" in text for text in said) == 8
    assert "flat batches, no padding" in said
