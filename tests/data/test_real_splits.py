"""The splits that benchmarks/real_model.py makes: no question on both sides, every answer kept, the files the config names."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.real_model import build_model, choose_split, split_data
from medlora.config.loading.files import load
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.errors import InputError
from medlora.records import McqRecord, TranslationRecord
from tests.support import ROOT

CONFIG = ROOT / "configs" / "smollm2-medical.yaml"
EXPLANATION = "Insulin lowers glucose because cells take it up."


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes of a few made-up files in the formats of the real ones."""
    shared, out = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("out")
    options = {"opa": "B", "opb": "A", "opc": "glucose", "opd": "heart"}
    rows = [
        {"id": f"m{i}", "question": f"Question {i % 60}?", **options, "cop": i % 60 % 4 + 1, "subject_name": "s"}
        | {"exp": EXPLANATION if i % 2 else "Ans. is A" if i % 3 else None}
        for i in range(80)
    ]
    (shared / "medmcqa_dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for language in ("en", "ko"):
        (shared / f"covid19_cdc.{language}").write_text("".join(f"{language} line {i}\n" for i in range(50)))
    (shared / "mmlu_medical").mkdir()
    for subject in ("anatomy", "medicine"):
        (shared / "mmlu_medical" / f"{subject}_test.csv").write_text(
            f"Which bone of {subject}?,a1,b1,c1,d1,B\nIn both?,a1,b1,c1,d1,C\n"
        )
    medqa = {"question": "A man coughs?", "options": {"A": "x1", "B": "y1"}, "answer_idx": "B", "answer": "y1"}
    (shared / "medqa_us_test.jsonl").write_text(json.dumps(medqa) + "\n")
    (shared / "kormedmcqa").mkdir()
    korean = {"id": "d1", "subject": "doctor", "question": "진단은?", **dict(zip("ABCDE", "가나다라마", strict=True))}
    (shared / "kormedmcqa" / "test.jsonl").write_text(json.dumps(korean | {"answer": 4}) + "\n")
    split_data(shared, out)
    return out


def read_mcq(file: Path) -> list[McqRecord]:
    return [record for record in read(SourceConfig(source=str(file))) if isinstance(record, McqRecord)]


def test_a_question_is_in_one_split_with_its_own_answer(splits: Path) -> None:
    found = {name: read_mcq(splits / f"medmcqa_{name}.jsonl") for name in ("train", "dev", "test")}
    assert Counter(record.question for part in found.values() for record in part) == Counter(
        f"Question {i}?" for i in range(60)
    )
    for split, records in found.items():
        assert records and {choose_split(record.question) for record in records} == {split}
    # Options that are bare letters: an answer B is the second option, not the one of that text.
    for record in (record for part in found.values() for record in part):
        assert record.options == ("B", "A", "glucose", "heart")
        assert record.answer == "ABCD"[int(record.question.removeprefix("Question ")[:-1]) % 4]


def test_only_explanations_are_reasoning(splits: Path) -> None:
    questions = read_mcq(splits / "medmcqa_train_explained.jsonl")
    assert {record.rationale["analysis"] for record in questions} == {EXPLANATION}
    texts = [json.loads(line)["id"] for line in (splits / "explanations_train.jsonl").read_text().splitlines()]
    assert texts == [record.id for record in questions]


def test_held_out_lines_are_held_out_in_both_languages(splits: Path) -> None:
    numbers = {
        (split, language): [
            int(line.split()[-1]) for line in (splits / f"guidance_{split}.{language}").read_text().splitlines()
        ]
        for split in ("train", "dev")
        for language in ("en", "ko")
    }
    assert all(numbers[split, "en"] == numbers[split, "ko"] for split in ("train", "dev"))
    assert sorted(numbers["train", "en"] + numbers["dev", "en"]) == [*range(50)]
    pairs = read(SourceConfig(source=f"{splits / 'guidance_dev.en'}|{splits / 'guidance_dev.ko'}"))
    assert pairs and all(isinstance(pair, TranslationRecord) for pair in pairs)


def test_tests_keep_subjects_and_ask_a_question_once(splits: Path) -> None:
    mmlu = read_mcq(splits / "mmlu_medical_test.jsonl")
    assert Counter(record.answer for record in mmlu) == {"B": 2, "C": 1}
    assert {record.subject for record in mmlu} == {"anatomy_test", "medicine_test"}
    (korean,) = read_mcq(splits / "kormedmcqa_test.jsonl")
    assert (korean.answer, korean.subject, len(korean.options)) == ("D", "doctor", 5)


def test_a_split_is_the_same_for_every_spelling() -> None:
    texts = [f"Which vitamin number {i}?" for i in range(2000)]
    assert [choose_split(text) for text in texts] == [choose_split(f" {text.upper()}!") for text in texts]
    shares = Counter(map(choose_split, texts))
    assert shares["train"] == pytest.approx(1600, abs=60) and shares["dev"] == pytest.approx(200, abs=45)


def test_the_config_names_what_the_script_writes(splits: Path) -> None:
    text = CONFIG.read_text(encoding="utf-8")
    named = set(re.findall(r"data/smollm2/([\w.]+)", text))
    assert named <= {file.name for file in splits.iterdir()}
    # The larger size is a list of keys in its comments.
    overrides = [key for key in re.findall(r"--set (\S+)", text) if not key.endswith("FOLDER")]
    large, small = load(CONFIG, overrides), load(CONFIG)
    assert [phase.max_steps for phase in large.phases] > [phase.max_steps for phase in small.phases]
    assert large.evaluation and all(test.limit is None for test in large.evaluation.tests)
    assert small.data.overlap == "drop"


def test_a_model_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        build_model(tmp_path)
