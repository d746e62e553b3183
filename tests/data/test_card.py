"""What goes into training is known: test questions, duplicates and personal data are found before anything slow starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora.config.run import RunConfig
from medlora.curriculum.jobs import make_job
from medlora.data import card as card_module
from medlora.data import overlap
from medlora.data.card import check_data, describe_findings, describe_overlap, find_dropped, stream_kept
from medlora.data.quarantine import check_rows, describe_quarantine
from medlora.errors import InputError

WORDS = ["fever", "cough", "rash", "anaemia", "jaundice", "oedema", "dyspnoea", "syncope", "tremor", "ascites"]


def ask(i: int) -> dict[str, Any]:
    """Questions with nothing in common."""
    stem = (
        f"{WORDS[i % 10]} {i * 7919} with {WORDS[(i * 3 + 1) % 10]} {i * 104729} points to which disease of organ {i}?"
    )
    return {
        "id": f"q{i}",
        "question": stem,
        **{x: f"disease {i * 31 + j * 7}" for j, x in enumerate("ABCDE")},
        "answer": "A",
    }


def configure(folder: Path, train: list[dict[str, Any]], **data: Any) -> RunConfig:
    """A run of one phase on `train`, with questions 100..109 as test and 200..204 as dev."""
    for name, rows in (
        ("train", train),
        ("test", [ask(i) for i in range(100, 110)]),
        ("dev", [ask(i) for i in range(200, 205)]),
    ):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    phase = {
        "name": "02",
        "chain": "new",
        "sources": [{"source": str(folder / "train.jsonl")}],
        "validation": {"sources": [{"source": str(folder / "dev.jsonl")}]},
        "max_steps": 1,
    }
    tests = [{"name": "t", "source": str(folder / "test.jsonl")}]
    config = {
        "name": "r",
        "base": {"model": "miniature"},
        "phases": [phase],
        "evaluation": {"tests": tests},
        "data": data,
    }
    return RunConfig.model_validate(config)


CLEAN = [ask(i) for i in range(20)]
LEAKS = [{**ask(103), "id": "leak-1"}, {**ask(202), "id": "leak-2"}]


def test_clean_data_passes_and_is_described(tmp_path: Path) -> None:
    card = check_data(configure(tmp_path, CLEAN))
    assert card["training"]["phases.0.sources.0"]["records"] == 20 and len(card["held_out"]) == 2
    assert card["overlap"]["records"] == 0 and not describe_findings(card) and not describe_overlap(card)


def test_a_test_or_dev_question_in_training_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_data(configure(tmp_path, [*CLEAN, *LEAKS]))
    said = str(caught.value)
    assert "data.overlap: 2 training records hold questions" in said and "data.overlap=drop" in said
    assert "train.jsonl:21 (leak-1): q103 of evaluation.tests.0 (exact, 100% of it)" in said
    assert "train.jsonl:22 (leak-2): q202 of phases.0.validation.sources.0 (exact" in said
    assert said.count(f": {ask(103)['question'][:50]}") == 2  # the pair to look at


def test_dropped_records_are_left_out_and_counted(tmp_path: Path) -> None:
    config = configure(tmp_path, [*CLEAN, *LEAKS], overlap="drop")
    source = config.phases[0].sources[0]
    assert check_data(config)["dropped"] == {source.source: 2}
    job = make_job(config, config.phases[0], ())
    assert {len(list(stream_kept(source, job.dropped))), len(CLEAN)} == {20}
    alone = make_job(configure(tmp_path, CLEAN), config.phases[0], ())
    assert job.fingerprint["data"] == alone.fingerprint["data"]


def test_what_is_allowed_is_said_in_every_report(tmp_path: Path) -> None:
    card = check_data(configure(tmp_path, [*CLEAN, *LEAKS], overlap="allow"))
    assert card["overlap"]["kinds"] == {"exact": 2} and [p["record"] for p in card["overlap"]["shown"]] == [
        "leak-1",
        "leak-2",
    ]
    (note,) = describe_overlap(card)
    assert note.startswith("2 training records hold questions of the tests or of dev (data.overlap: allow)")


def test_duplicates_are_counted_and_dropped_when_asked(tmp_path: Path) -> None:
    train = [*CLEAN, {**ask(3), "id": "again"}]
    config = configure(tmp_path, train)
    assert check_data(config)["duplicates"] == {config.phases[0].sources[0].source: 1} and find_dropped(config) == {}
    deduped = configure(tmp_path, train, dedupe=True)
    assert list(find_dropped(deduped).values()) == [("again",)]


def test_nothing_left_is_said(tmp_path: Path) -> None:
    config = configure(tmp_path, LEAKS, overlap="drop")
    with pytest.raises(InputError, match="every record was dropped"):
        make_job(config, config.phases[0], ())


def test_personal_data_stops_the_run_and_is_not_shown(tmp_path: Path) -> None:
    train = [*CLEAN, {**ask(30), "rationale": "see\n010-1234-5678 or a@b.kr"}]
    with pytest.raises(InputError) as caught:
        check_data(configure(tmp_path, train))
    said = str(caught.value)
    assert "2 places in the training data look like personal data, allowed are 0" in said
    assert "train.jsonl:21: phone number, in line 2 of the text" in said and "1234" not in said and "a@b" not in said
    card = check_data(configure(tmp_path, train, max_personal=2))
    assert card["personal"] == {"phone number": 1, "e-mail address": 1} and "1234" not in json.dumps(card)


def test_a_card_that_still_stands_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = check_data(configure(tmp_path, CLEAN))

    def look(*arguments: Any) -> Any:
        raise AssertionError("looked again")

    card_module._survey.cache_clear()
    monkeypatch.setattr(overlap, "TestIndex", look)
    assert check_data(configure(tmp_path, CLEAN), card) == card
    with pytest.raises(AssertionError, match="looked again"):
        check_data(configure(tmp_path, CLEAN[:-1]), card)


def test_personal_data_is_not_shown_beside_a_leak_either(tmp_path: Path) -> None:
    leak = {**ask(103), "id": "leak", "question": f"Call 010-1234-5678. {ask(103)['question']}"}
    with pytest.raises(InputError) as caught:
        check_data(configure(tmp_path, [*CLEAN, leak]))
    said = str(caught.value)
    assert "training: Call [phone number]. " in said and "1234" not in said


def test_bad_rows_are_written_down_and_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    bad = {**ask(30), "answer": "Z"}
    quarantine = tmp_path / "quarantine.jsonl"
    with pytest.raises(InputError) as caught:
        check_rows(configure(tmp_path, [*CLEAN, bad]), quarantine)
    said = str(caught.value)
    assert said.startswith("phases.0.sources.0.source: ") and "1 of 21 rows are no valid records" in said
    assert "train.jsonl:21: answer 'Z' is none of the options" in said and f"all of them: {quarantine}" in said
    (row,) = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert row["where"].endswith("train.jsonl:21") and row["row"] == bad

    config = configure(tmp_path, [*CLEAN, bad], max_bad_fraction=0.05)
    check_rows(config, quarantine)
    card = check_data(config)
    assert card["training"]["phases.0.sources.0"]["quarantine"] == {"answer is no option": 1}
    assert "1 of 21 rows are no valid records and left out (answer is no option 1)" in describe_findings(card)[0]
    job = make_job(config, config.phases[0], ())
    alone = make_job(configure(tmp_path, CLEAN), config.phases[0], ())
    assert job.fingerprint["data"] == alone.fingerprint["data"]
    check_rows(configure(tmp_path, CLEAN), quarantine)
    assert not quarantine.exists()


def test_a_test_s_bad_rows_are_in_its_denominator_s_note(tmp_path: Path) -> None:
    config = configure(tmp_path, CLEAN, max_bad_fraction=0.5)
    path = tmp_path / "test.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8") + json.dumps({**ask(300), "question": ""}) + "\n", encoding="utf-8"
    )
    assert config.evaluation is not None
    (note,) = describe_quarantine(config.evaluation)
    assert note.startswith(
        "test t: 1 of 11 rows are no valid questions (empty field 1); they are not asked and not in the"
    )
    assert note.endswith("denominator, which is 10")


def test_the_licence_stands_in_the_card_and_in_no_fingerprint(tmp_path: Path) -> None:
    plain = configure(tmp_path, CLEAN)
    dumped = plain.model_dump(mode="json")
    dumped["phases"][0]["sources"][0]["licence"] = "CC BY-NC 2.0"
    named = RunConfig.model_validate(dumped)
    assert check_data(named)["training"]["phases.0.sources.0"]["licence"] == "CC BY-NC 2.0"
    assert make_job(named, named.phases[0], ()).fingerprint == make_job(plain, plain.phases[0], ()).fingerprint


def test_a_source_of_two_phases_is_looked_through_once_whichever_names_its_licence(tmp_path: Path) -> None:
    dumped = configure(tmp_path, [*CLEAN, *LEAKS], overlap="allow").model_dump(mode="json")
    again = {
        **dumped["phases"][0],
        "name": "03",
        "chain": "stack",
        "sources": [dict(dumped["phases"][0]["sources"][0])],
    }
    again |= {"validation": None, "sources": [{**again["sources"][0], "licence": "MIT"}]}
    card = check_data(RunConfig.model_validate({**dumped, "phases": [dumped["phases"][0], again]}))
    assert list(card["training"]) == ["phases.0.sources.0"] and card["overlap"]["pairs"] == 2
    assert card["training"]["phases.0.sources.0"]["licence"] == "MIT"
