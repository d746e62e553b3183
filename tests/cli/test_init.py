"""`medlora init`: every config loads, data are recognised and filled in, nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora.cli.starting.init import main
from medlora.config.loading.files import load, load_evaluate_config, load_sweep_config
from medlora.config.run import RunConfig
from medlora.curriculum.checks import check_inputs
from medlora.errors import InputError
from medlora.planning.starting.recognise import find_split
from tests.support import ROOT

CURRICULA = ("quickstart", "medgemma-4b", "medgemma-27b", "gemma", "qwen", "llama", "exaone")


def ask(i: int, **more: Any) -> dict[str, Any]:
    return {"id": f"q{i}", "question": f"무엇인가 {i}?", "A": f"가{i}", "B": f"나{i}", "answer": 1 + i % 2, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "my data"
    write(data / "text.jsonl", [{"text": f"문서 {i}"} for i in range(5)])
    write(data / "pairs.jsonl", [{"english": f"word {i}", "korean": f"말 {i}"} for i in range(5)])
    write(data / "mcq_train.jsonl", [ask(i, rationale="까닭") for i in range(6)])
    write(data / "mcq_dev.jsonl", [ask(i) for i in range(20, 23)])
    write(data / "doctor" / "test.jsonl", [ask(i) for i in range(30, 34)])
    write(data / "broken_train.jsonl", [ask(50), {"question": "x"}])
    (data / "notes.pdf").write_bytes(b"%PDF")
    (data / "corpus.en.txt").write_text("one\ntwo\n")
    (data / "corpus.ko.txt").write_text("하나\n둘\n")
    return data


@pytest.mark.parametrize("kind", [*CURRICULA, "evaluate", "sweep"])
def test_every_config_that_is_written_loads(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my.yaml"
    assert main([kind, str(out)]) == 0
    loads = {"evaluate": load_evaluate_config, "sweep": load_sweep_config}
    config = loads.get(kind, load)(out)
    shipped = ROOT / "configs" / f"{kind}.yaml"
    if shipped.exists():
        assert out.read_bytes() == shipped.read_bytes()
    else:
        assert config.name == kind and config.base.model in out.read_text()
    assert f"config: {out}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", CURRICULA)
def test_data_are_filled_in_and_the_config_can_be_run(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my.yaml"
    assert main([kind, str(out), "--data", str(folder)]) == 0
    config = load(out, ["base.model=miniature"])
    assert check_inputs(config) == []
    first, second, third = config.phases
    assert [source.source for source in first.sources] == [str(folder / "text.jsonl")]
    pairs = {f"{folder / 'corpus.en.txt'}|{folder / 'corpus.ko.txt'}", str(folder / "pairs.jsonl")}
    assert {source.source for source in second.sources} == pairs | {str(folder / "mcq_train.jsonl")}
    assert [source.source for source in third.sources] == [str(folder / "mcq_train.jsonl")]
    assert third.validation is not None and third.validation.sources[0].source == str(folder / "mcq_dev.jsonl")
    assert config.evaluation is not None and [test.name for test in config.evaluation.tests] == ["doctor"]
    shown = capsys.readouterr().out
    assert (
        "left out" in shown and "notes.pdf: .pdf is no format" in shown and "broken_train.jsonl: 1 of 2 rows" in shown
    )
    comments = [line for line in out.read_text().splitlines() if "#" in line]
    assert len(comments) > 10


def load_filled(tmp_path: Path, data: Path, kind: str = "medgemma-4b") -> RunConfig:
    out = tmp_path / "out.yaml"
    main([kind, str(out), "--data", str(data)])
    config = load(out, ["base.model=miniature"])
    check_inputs(config)
    return config


def test_phases_without_data_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "d" / "quiz_train.jsonl", [ask(i) for i in range(6)])
    config = load_filled(tmp_path, tmp_path / "d")
    (phase,) = config.phases
    assert (phase.name, phase.chain, phase.validation, config.evaluation) == ("02", "new", None, None)
    assert phase.sources[0].style == "answer" and config.base.extra_tokens == ()
    shown = capsys.readouterr().out
    assert "phase 00 is left out" in shown and "phase 02 has no validation" in shown and "no evaluation" in shown


def test_text_alone_makes_one_phase_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "books.txt").write_text("문서 하나\n문서 둘\n", encoding="utf-8")
    (tmp_path / "d" / "medical_terms.txt").write_text("고혈압증\n", encoding="utf-8")
    config = load_filled(tmp_path, tmp_path / "d", "qwen")
    (phase,) = config.phases
    assert phase.name == "00" and phase.train_extra_tokens
    assert config.base.extra_tokens == (f"file:{tmp_path / 'd' / 'medical_terms.txt'}",)


def test_an_evaluation_gets_its_tests(folder: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(tmp_path / "e.yaml"), "--data", str(folder)]) == 0
    config = load_evaluate_config(tmp_path / "e.yaml")
    assert [(test.name, test.source) for test in config.evaluation.tests] == [
        ("doctor", str(folder / "doctor" / "test.jsonl"))
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mcq_train", "train"),
        ("doctor/dev", "dev"),
        ("dev/doctor-test", "test"),
        ("validation-00000-of-00001", "dev"),
        ("KorMedMCQA/nurse_TEST", "test"),
        ("latest/greatest", None),
        ("간호사_검증", "dev"),
        ("contest", None),
    ],
)
def test_a_split_is_a_word_of_the_name(name: str, split: str | None) -> None:
    assert find_split(name) == split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt"], "there is no such config to start from"),
        (["qwen", "{there}"], "exists already and is left as it is"),
        (["qwen", "{new}", "--data", "{absent}"], "there is no such folder"),
        (["qwen", "{new}", "--data", "{empty}"], "no data that can be used"),
        (["sweep", "{new}", "--data", "{empty}"], "a sweep takes its data"),
        (["qwen", "{absent}/x.yaml"], "there is no folder"),
    ],
)
def test_wrong_uses_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "empty").mkdir()
    places = {name: str(tmp_path / name) for name in ("there", "new", "absent", "empty")}
    with pytest.raises(InputError, match=message):
        main([argument.format(**places) for argument in arguments])
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "new").exists()
