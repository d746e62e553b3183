"""Test questions planted into training data are found, and real questions that are none are left alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from medlora.config.sources import SourceConfig
from medlora.data.overlap import Duplicates, Overlap, TestIndex
from medlora.data.sources import read
from medlora.records import McqRecord, Record, TextRecord, TranslationRecord

STEM = "A 54-year-old farmer has had fever and a dry cough for nine days since he cleaned an old barn full of bats. What is most likely the cause?"
QUESTION = McqRecord("q", STEM, ("Histoplasma", "Legionella", "Influenza virus", "Coxiella"), "A")
SHORT = McqRecord(
    "s", "다음 중 옳은 것은?", ("와파린은 비타민 K 를 막는다", "헤파린은 먹는 약이다", "철분은 우유와 먹는다"), "A"
)
MISSPELT = STEM.replace("has", "haz").replace("dry", "drie").replace("barn", "barnn").replace("likely", "likly")
INDEX = TestIndex({"t": [QUESTION, SHORT]})


def find(record: Record) -> list[tuple[str, str]]:
    return [(hit.question, hit.kind) for hit in INDEX.find(record)]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (McqRecord("r", STEM, QUESTION.options, "A"), [("q", "exact")]),
        (
            McqRecord("r", STEM.upper().replace(" ", "  ").replace("?", " !"), QUESTION.options[::-1], "B"),
            [("q", "exact")],
        ),
        (McqRecord("r", STEM, ("something", "else"), "A"), [("q", "exact")]),  # the stem alone is telling
        (McqRecord("r", STEM.replace("farmer", "teacher"), QUESTION.options, "A"), [("q", "ngram")]),
        (McqRecord("r", SHORT.question, SHORT.options[::-1], "C"), [("s", "exact")]),
        (McqRecord("r", SHORT.question, (*SHORT.options[:2], "철분은 물과 먹는다"), "C"), [("s", "ngram")]),
        (McqRecord("r", SHORT.question, ("간은 왼쪽에 있다", "폐는 하나이다", "신장은 둘이다"), "C"), []),
        (McqRecord("r", MISSPELT, QUESTION.options, "A"), [("q", "near")]),
        (TextRecord("r", f"Bats live long. {STEM} Nobody knows. " * 3), [("q", "exact")]),
        (TranslationRecord("r", STEM, "쉰네 살 농부가 아흐레 동안 열이 났다."), [("q", "exact")]),
        (TextRecord("r", "So: " + STEM.replace("farmer", "teacher")), [("q", "ngram")]),
        (TextRecord("r", "A 54-year-old farmer has had fever and a dry cough. He was healthy before."), []),
    ],
)
def test_what_holds_a_question_is_found(record: Record, found: list[tuple[str, str]]) -> None:
    assert find(record) == found


def test_a_hit_names_both_sides() -> None:
    (hit,) = INDEX.find(McqRecord("r", STEM, QUESTION.options, "A"), "train.jsonl")
    assert hit == Overlap("train.jsonl", "r", "t", "q", "exact", 1.0)


def test_duplicates_name_the_first() -> None:
    records = [TextRecord("a", "Iron  deficiency."), TextRecord("b", "other"), TextRecord("c", "iron deficiency")]
    seen = Duplicates()
    assert [seen.find(record) for record in [*records, TextRecord("d", "OTHER!")]] == [None, None, "a", "b"]


def edit_word(text: str, draw: random.Random) -> str:
    words = text.split()
    words[draw.randrange(len(words))] = "바뀐말" if words[0] >= "가" else "changed"
    return " ".join(words)


def plant(question: McqRecord, kind: str, lines: list[str], draw: random.Random) -> Record:
    """The question as training data would hold it."""
    options = list(question.options)
    if kind == "exact":
        return question
    if kind == "spelling":
        stem = question.question.swapcase().replace(" ", "  ").replace("?", "").replace(",", " ;")
        return McqRecord("p", stem, tuple(f"{option.swapcase()}." for option in options), "A")
    if kind == "shuffled":
        draw.shuffle(options)
        return McqRecord("p", question.question, tuple(options), "A")
    if kind == "edited":
        return McqRecord("p", edit_word(question.question, draw), tuple(options), "A")
    around = draw.sample(lines, 20)
    asked = f"{question.question} " + " ".join(f"{x}. {o}" for x, o in zip("ABCDE", options, strict=False))
    around.insert(draw.randrange(20), asked)
    return TextRecord("p", " ".join(around))


TESTS = ("kormedmcqa/test.jsonl", "medqa_us_test.jsonl", "medmcqa_dev.json", "mmlu_medical", "frenchmedmcqa_dev.json")


def read_questions(folder: Path, name: str) -> list[McqRecord]:
    # Half of the French ones have several right answers.
    records = read(SourceConfig(source=str(folder / name)), max_bad_fraction=0.5)
    return [record for record in records if isinstance(record, McqRecord)]


@pytest.fixture(scope="module")
def sets(real_data: Path) -> dict[str, list[McqRecord]]:
    """The questions of each real test."""
    return {name: read_questions(real_data, name) for name in TESTS}


@pytest.fixture(scope="module")
def everything(sets: dict[str, list[McqRecord]]) -> TestIndex:
    return TestIndex(sets)


@pytest.mark.parametrize("name", TESTS)
def test_200_planted_questions_are_found(
    real_data: Path, sets: dict[str, list[McqRecord]], everything: TestIndex, name: str
) -> None:
    draw = random.Random(0)
    questions = sets[name]
    language = "ko" if name.startswith("kor") else "en"
    lines = (real_data / f"covid19_cdc.{language}").read_text(encoding="utf-8").splitlines()
    found: Counter[str] = Counter()
    for i, question in enumerate(draw.choices(questions, k=200)):
        kind = ("exact", "spelling", "shuffled", "edited", "buried")[i % 5]
        planted = plant(question, kind, lines, draw)
        found[kind] += any((hit.test, hit.question) == (name, question.id) for hit in everything.find(planted))
    assert found["exact"] == found["spelling"] == found["shuffled"] == 40
    assert found["edited"] >= 38 and found["buried"] >= 38


def test_real_questions_and_texts_that_are_no_test_s_are_left_alone(real_data: Path, everything: TestIndex) -> None:
    """1,700 records that no test holds. What is left are two pairs on one case each."""
    train = [*read_questions(real_data, "kormedmcqa/train.jsonl"), *read_questions(real_data, "kormedmcqa/dev.jsonl")]
    texts = [
        TextRecord(f"{name}{i}", line)
        for name in ("ko", "en")
        for i, line in enumerate((real_data / f"covid19_cdc.{name}").read_text(encoding="utf-8").splitlines())
        if line.strip()
    ]
    hits = [hit for record in [*train, *texts] for hit in everything.find(record)]
    assert len(train) + len(texts) > 1700 and len(hits) == 2
    assert all(hit.kind == "ngram" and hit.test == "kormedmcqa/test.jsonl" for hit in hits)


def test_real_tests_are_left_alone_by_each_other(sets: dict[str, list[McqRecord]], everything: TestIndex) -> None:
    for name, records in sets.items():
        hits = [{hit.test for hit in everything.find(record)} for record in records[:1000]]
        assert all(found == {name} for found in hits)
