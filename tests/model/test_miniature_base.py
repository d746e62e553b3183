"""The miniature's data and tokenizer: what the tests of the whole project lean on."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import astuple, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from medlora import miniature, prompts
from medlora.miniature import corpus, facts, general, settings, wording
from medlora.miniature.facts import MEDICAL, read_table
from medlora.miniature.general import GENERAL
from medlora.miniature.wording import QUESTIONS, STATEMENTS, particle, word_fact, word_fact_in_english
from medlora.model.miniature_base import lessons
from medlora.prompts import render
from medlora.records import McqRecord

TRAINING = ("mcq/train_01", "mcq/train")
TESTS = ("mcq/test_asked", "mcq/test_text_only")
MCQ = (*TRAINING, "mcq/dev", *TESTS)


def questions(name: str, seed: int = 0) -> list[McqRecord]:
    return [record for record in corpus.load(name, seed) if isinstance(record, McqRecord)]


def asked_facts(name: str) -> set[str]:
    return {record.rationale["analysis"] for record in questions(name)}


def statements(facts) -> set[str]:
    return {word_fact(STATEMENTS[0], fact) for fact in facts}


def test_table_is_large_varied_and_unambiguous() -> None:
    assert len(MEDICAL) >= 175
    assert len({fact.subject for fact in MEDICAL}) >= 6
    assert len(GENERAL) >= 90
    terms = Counter(fact.term for fact in MEDICAL + GENERAL)
    assert [term for term, count in terms.items() if count > 1] == []
    answers = defaultdict(set)
    for fact in MEDICAL + GENERAL:
        answers[fact.relation].add(fact.answer)
        assert fact.answer not in fact.term and fact.term not in fact.answer, fact
    assert min(map(len, answers.values())) >= corpus.OPTIONS


def test_general_knowledge_shares_nothing_with_the_medical_facts() -> None:
    def words(facts) -> set[str]:
        return {word for fact in facts for word in (fact.term, fact.answer, fact.relation)}

    assert words(MEDICAL) & words(GENERAL) == set()


def test_table_with_a_missing_column_is_refused() -> None:
    with pytest.raises(ValueError, match="number of columns"):
        read_table("# a | b | c\nx | y | z\n")


def test_counts_of_each_source() -> None:
    counts = {name: len(corpus.load(name)) for name in corpus.NAMES}
    assert counts["text"] > 1000
    assert counts["mcq/train_01"] * 2 == counts["mcq/train"]
    assert counts["mcq/test_asked"] >= 200
    assert counts["mcq/test_text_only"] >= 150
    assert len(asked_facts("mcq/train")) >= 70
    assert len(asked_facts("mcq/test_text_only")) >= 35


def test_ids_are_unique_over_all_sources_and_the_same_for_every_seed() -> None:
    ids = [record.id for name in corpus.NAMES for record in corpus.load(name)]
    assert len(ids) == len(set(ids))
    for name in MCQ:
        assert [(r.id, r.question) for r in questions(name, 0)] == [(r.id, r.question) for r in questions(name, 1)]


@pytest.mark.parametrize("name", corpus.NAMES)
def test_a_seed_fixes_every_record(name: str) -> None:
    assert corpus.load(name, 3) == corpus.load(name, 3)


@pytest.mark.parametrize("name", MCQ)
def test_another_seed_gives_other_options(name: str) -> None:
    assert [r.options for r in questions(name, 0)] != [r.options for r in questions(name, 1)]


def test_same_records_in_another_process() -> None:
    """Python's string hashes vary by process: nothing may depend on the order of a set."""
    code = (
        "import hashlib, sys; from medlora.miniature import corpus;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "print(hashlib.sha256(repr([corpus.load(n) for n in corpus.NAMES]).encode()).hexdigest())"
    )

    def digest(hash_seed: str) -> str:
        environment = {"PYTHONHASHSEED": hash_seed}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout

    assert digest("1") == digest("2")


def test_tests_share_no_question_with_training_or_dev() -> None:
    def shown(record: McqRecord) -> tuple[str, tuple[str, ...]]:
        return record.question, record.options

    for seed in (0, 1):
        seen = {shown(r) for name in (*TRAINING, "mcq/dev") for r in questions(name, seed)}
        for test in TESTS:
            held = [shown(r) for r in questions(test)]
            assert seen.isdisjoint(held)
            assert len(held) == len(set(held))
    assert {r.question for r in questions("mcq/dev")}.isdisjoint(r.question for n in TRAINING for r in questions(n))
    wordings = [wording for split in QUESTIONS.values() for wording in split]
    assert len(wordings) == len(set(wordings))


def test_facts_of_the_text_only_test_stand_in_plain_text_alone() -> None:
    text_only, asked = statements(corpus.TEXT_ONLY), statements(corpus.ASKED)
    assert text_only.isdisjoint(asked)
    assert asked_facts("mcq/test_text_only") == text_only
    assert asked_facts("mcq/test_asked") == asked == asked_facts("mcq/train")
    assert asked_facts("mcq/train_01") < asked
    for name in (*TRAINING, "mcq/dev"):
        assert asked_facts(name).isdisjoint(text_only)
    documents = " ".join(record.text for record in corpus.load("text"))
    translations = [record.korean for record in corpus.load("translation")]
    for fact in corpus.TEXT_ONLY:
        assert all(word_fact(statement, fact) in documents for statement in STATEMENTS)
        assert not any(fact.term in korean and fact.answer in korean for korean in translations)


@pytest.mark.parametrize("name", MCQ)
def test_options_are_distinct_answers_of_one_relation(name: str) -> None:
    answers = defaultdict(set)
    for fact in MEDICAL:
        answers[fact.relation].add(fact.answer)
    right = {word_fact(STATEMENTS[0], fact): fact for fact in MEDICAL}
    for record in questions(name):
        fact = right[record.rationale["analysis"]]
        assert len(set(record.options)) == corpus.OPTIONS
        assert set(record.options) <= answers[fact.relation]
        assert record.options[record.letters.index(record.answer)] == fact.answer
        assert fact.term in record.question
        assert record.subject == fact.subject


@pytest.mark.parametrize("name", MCQ)
def test_no_letter_is_favoured(name: str) -> None:
    letters = Counter(record.answer for record in questions(name))
    assert max(letters.values()) / letters.total() < 0.3


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("인슐린", "은/는", "은"),
        ("티아민", "이/가", "이"),
        ("콜레라", "은/는", "는"),
        ("항독소", "을/를", "를"),
        ("결핍증", "으로/로", "으로"),
        ("계열", "으로/로", "로"),
        ("병원체", "으로/로", "로"),
        ("Zn", "은/는", "은"),
        ("Au", "은/는", "는"),
        ("Cl", "으로/로", "로"),
        ("H2", "이/가", "가"),
    ],
)
def test_particles_follow_the_last_sound(word: str, pair: str, expected: str) -> None:
    assert particle(word, pair) == expected


def test_particle_after_an_unreadable_sign_is_an_error() -> None:
    with pytest.raises(ValueError, match="reading"):
        particle("α", "은/는")


def test_statements_read_as_korean() -> None:
    fact = next(fact for fact in MEDICAL if fact.term == "콜레라")
    assert [word_fact(statement, fact) for statement in STATEMENTS] == [
        "콜레라의 병원체는 비브리오이다.",
        "비브리오는 콜레라의 병원체이다.",
        "콜레라의 병원체로 비브리오가 알려져 있다.",
        "콜레라는 병원체가 비브리오이다.",
        "콜레라의 병원체를 들면 비브리오이다.",
    ]


def test_pre_training_states_no_medical_fact() -> None:
    """The base must know the words and none of the facts, else the phases have nothing to teach."""
    rng = random.Random(0)
    shown = "\n".join(f"{example.prompt}\n{example.completion}" for example in islice(lessons.draw_lessons(rng), 3000))
    facts = [word_fact(statement, fact) for fact in MEDICAL for statement in STATEMENTS]
    assert [fact for fact in facts if fact in shown] == []
    english = [word_fact_in_english(fact) for fact in MEDICAL]
    assert [fact for fact in english if fact in shown] == []
    assert any(word_fact(STATEMENTS[0], fact) in shown for fact in GENERAL)


def test_drills_and_open_books_can_be_answered_from_what_they_show() -> None:
    rng = random.Random(0)
    for _ in range(50):
        drill = lessons.drill(rng)
        options = dict(re.findall(r"^([A-E])\. (.+)$", drill.prompt, re.M))
        assert len(set(options.values())) == corpus.OPTIONS
        answers = re.findall(r"^ (\S+?)(?:이다\.\nanswer:\n)?([A-E])$", drill.completion, re.M)
        echoes = re.findall(r"^([A-E])\. (.+)$", drill.completion, re.M)
        assert len(answers) + len(echoes) > 5
        assert all(options[letter] == word for word, letter in answers)
        assert all(options[letter] == word for letter, word in echoes)
        book = lessons.open_book(rng)
        options = dict(re.findall(r"^([A-E])\. (.+)$", book.prompt, re.M))
        term, answer = re.fullmatch(r"analysis: (.+)의 .+ (.+)이다\.\nanswer:\n[A-E]", book.completion).groups()
        question = book.prompt.splitlines()[0]
        assert options[book.completion[-1]] == answer
        assert question.count(term) >= 2 and answer in question


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="mcq/train_01"):
        corpus.load("mcq/tset")


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("torch")
    from medlora.model.miniature_base.tokenizer import train_tokenizer

    return train_tokenizer()


@pytest.fixture(scope="module")
def grown(tokenizer, tmp_path_factory):
    """The tokenizer with EXTRA_TOKENS added as phase 00 adds them, written and read back."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.get_vocab() == tokenizer.get_vocab() and read.chat_template == tokenizer.chat_template
    read.add_tokens([AddedToken(f"▁{word}", normalized=True) for word in corpus.EXTRA_TOKENS])
    return read


@pytest.mark.parametrize("name", corpus.NAMES)
@pytest.mark.parametrize("which", ["tokenizer", "grown"])
def test_every_text_survives_the_tokenizer(name: str, which: str, request: pytest.FixtureRequest) -> None:
    subject = request.getfixturevalue(which)
    for record in corpus.load(name)[::7]:
        for example in render(record):
            for text in (example.prompt, example.completion):
                ids = subject(text, add_special_tokens=False)["input_ids"]
                assert subject.decode(ids) == text
                assert subject.unk_token_id not in ids


@pytest.mark.parametrize("text", ["  두 칸", "줄\n\n바꿈\n", "naïve α-β 漢字 🙂"])
def test_foreign_text_survives_by_bytes(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template_writes_gemma_turns_and_bos_once(tokenizer) -> None:
    turn = [{"role": "user", "content": "질문: 무엇?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><start_of_turn>user\n질문: 무엇?<end_of_turn>\n<start_of_turn>model\n"
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    answered = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": "B"}], tokenize=False)
    assert answered == f"{text}B<end_of_turn>\n"


def test_letters_are_single_tokens_wherever_they_stand(tokenizer) -> None:
    for letter in "ABCDEFGHIJ":
        (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
        assert tokenizer(f"answer:\n{letter}", add_special_tokens=False)["input_ids"][-1] == token
        assert token in tokenizer(f"풀이\n{letter}. 인슐린", add_special_tokens=False)["input_ids"]


def test_extra_tokens_are_new_to_the_base_and_single_once_added(tokenizer, grown) -> None:
    assert 30 <= len(corpus.EXTRA_TOKENS) <= 40
    vocabulary = tokenizer.get_vocab()
    for word in corpus.EXTRA_TOKENS:
        assert word not in vocabulary and f"▁{word}" not in vocabulary
        assert len(tokenizer.tokenize(f" {word}")) > 1
        assert grown.tokenize(f"analysis: {word}의 것은 {word}이다.").count(f"▁{word}") == 2
    assert len(grown) == len(tokenizer) + len(corpus.EXTRA_TOKENS)


def test_a_term_is_one_form_in_text_question_and_answer(tokenizer) -> None:
    """What the tiny model learns in plain text it must find again in a question: same word, same token."""
    words = {word for fact in MEDICAL for word in (fact.term, fact.answer)} - set(corpus.EXTRA_TOKENS)
    split = [word for word in words if len(tokenizer.tokenize(f" {word}")) > 1]
    assert split == []
    for record in questions("mcq/train")[::5]:
        example = render(record)[0]
        answer = record.options[record.letters.index(record.answer)]
        if answer in words:
            assert f"▁{answer}" in tokenizer.tokenize(example.prompt)
            assert f"▁{answer}" in tokenizer.tokenize(example.completion)


@pytest.fixture
def short_build(monkeypatch):
    """`build` with four steps of pre-training: everything but the learning."""
    pytest.importorskip("torch")
    from medlora.model.miniature_base import build, pretraining

    monkeypatch.setattr(pretraining, "DRILL_STEPS_AT_MOST", 2)
    monkeypatch.setattr(pretraining, "LESSON_STEPS", 2)
    monkeypatch.setattr(pretraining, "REPORT_EVERY", 1)
    return build


def test_build_writes_a_model_folder_that_depends_on_the_seed_alone(short_build, tmp_path, capfd) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reports: list[dict] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    short_build.build(tmp_path / "a", 0, reports.append)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    short_build.build(tmp_path / "b", 0)
    short_build.build(tmp_path / "c", 1)
    assert capfd.readouterr() == ("", "")
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    assert all(report["total"] == 4 and report["loss"] > 0 for report in reports)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in model.generation_config.eos_token_id
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_ensure_builds_once_and_never_shows_an_unfinished_folder(short_build, tmp_path, monkeypatch) -> None:
    def fail(folder, seed, report) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(short_build, "build", fail)
        short_build.ensure(tmp_path, 0)
    folder = short_build.ensure(tmp_path, 0)
    assert (folder / "model.safetensors").exists() and folder.parent == tmp_path
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert short_build.ensure(tmp_path, 0) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


# ---- its fingerprint ------------------------------------------------------------------------------------------------


@pytest.fixture
def tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the versions of constraints.txt were installed, whatever is here."""
    versions = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)


def test_the_fingerprint_is_the_one_from_before_there_were_formats(
    tested_versions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bases and runs made by commit b8b1703 are found again; other versions or prompts make another miniature."""
    assert miniature.fingerprint() == "2673c03d3da9"
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "version", lambda: "other")
        assert miniature.fingerprint() != "2673c03d3da9"
    monkeypatch.setattr(metadata, "version", lambda name: "99")
    assert miniature.fingerprint() != "2673c03d3da9" and len(miniature.fingerprint()) == 12


@pytest.mark.parametrize(
    ("where", "name", "change"),
    [
        (facts, "MEDICAL", lambda rows: (replace(rows[0], answer="x"), *rows[1:])),
        (facts, "MEDICAL", lambda rows: rows[::-1]),
        (general, "GENERAL", lambda rows: (*rows[:-1], replace(rows[-1], term_en="x"))),
        (corpus, "EXTRA_TOKENS", lambda words: words[1:]),
        (corpus, "TEXT_ONLY", lambda rows: rows[1:]),
        (wording, "STATEMENTS", lambda texts: texts[1:]),
        (wording, "QUESTIONS", lambda texts: {**texts, "dev": texts["train"]}),
        (wording, "_CODA_LATIN", lambda ends: ends | {"x"}),
        (miniature, "FORMAT", lambda number: number + 1),
        *[(settings, name, lambda value: [value, "changed"]) for name in vars(settings) if name.isupper()],
    ],
)
def test_another_table_makes_another_miniature(
    tested_versions: None, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, change: Any
) -> None:
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert miniature.fingerprint() != "2673c03d3da9"


def test_how_the_source_is_written_makes_no_other_miniature(tmp_path: Path) -> None:
    """The package under another name, without comments and in another layout, has the same fingerprint."""
    package = Path(miniature.__file__).parent.parent
    shutil.copytree(package, tmp_path / "renamed", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "renamed").rglob("*.py"):
        source = path.read_text(encoding="utf-8").replace("medlora", "renamed")
        path.write_text(ast.unparse(ast.parse(source)), encoding="utf-8")
    code = "import sys; from renamed.miniature import fingerprint; print(fingerprint(), {*sys.modules} & {'torch', 'medlora'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{miniature.fingerprint()} set()\n", done.stderr


def test_the_same_format_makes_the_same_records_lessons_and_tokens(tokenizer) -> None:
    """Of what code makes from the tables. If this fails on purpose, raise `miniature.FORMAT` with the hashes."""

    def digest(made: Any) -> str:
        return hashlib.sha256(json.dumps(made, ensure_ascii=False).encode()).hexdigest()[:12]

    drawn, rng = lessons.draw_lessons(random.Random(0)), random.Random(0)
    assert miniature.FORMAT == 1
    assert {
        "records": digest([[astuple(record) for record in corpus.load(name)] for name in corpus.NAMES]),
        "lessons": digest([astuple(next(drawn)) for _ in range(200)]),
        "drills": digest([astuple(lessons.drill(rng)) for _ in range(20)]),
        "tokens": digest(sorted(tokenizer.get_vocab().items())),
    } == {"records": "98a35b72a1e2", "lessons": "e63bc7a4e04d", "drills": "b3275a672b80", "tokens": "71ae5d2aca07"}
