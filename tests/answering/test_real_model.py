"""Real weights: letters and texts are those of plain transformers, and of lm-evaluation-harness where it is installed.

Needs the environment variable MEDLORA_REAL_MODEL, a model's folder with safetensors (`make real-model`), and the real
questions; skips without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity import (
    SHOTS,
    QuestionSet,
    Reading,
    ask_harness,
    ask_medlora,
    ask_transformers,
    choose_sets,
    load_ours,
    load_plainly,
)
from medlora.prompts import Example
from medlora.tokens.encode import encode_prompts, find_end_tokens, tokenise

QUESTIONS = 12

Asked = list[tuple[QuestionSet, int, list[Reading]]]
"""Questions, how many solved ones were shown before them, and what medlora made of them."""


@pytest.fixture(scope="module")
def ours(real_model: str) -> tuple[Any, Any]:
    return load_ours(real_model)


@pytest.fixture(scope="module")
def asked(ours: tuple[Any, Any], real_data: Path) -> Asked:
    """Twelve questions, four of each file, without and with solved ones before them."""
    sets = choose_sets(real_data, QUESTIONS)
    assert sum(len(each.questions) for each in sets) == QUESTIONS
    return [
        (each, shots, ask_medlora(*ours, each.questions, each.shots[:shots])) for shots in (0, SHOTS) for each in sets
    ]


def assert_same(ours: list[Reading], theirs: list[Reading]) -> None:
    assert [reading.text for reading in ours] == [reading.text for reading in theirs]
    assert [reading.letter for reading in ours] == [reading.letter for reading in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.log_likelihoods == pytest.approx(other.log_likelihoods, abs=2e-3)


def test_letters_and_texts_are_those_of_plain_transformers(asked: Asked, real_model: str) -> None:
    plain = load_plainly(real_model)
    for questions, shots, readings in asked:
        assert_same(readings, ask_transformers(*plain, questions.questions, questions.shots[:shots]))


def test_letters_and_texts_are_those_of_the_harness(asked: Asked, ours: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval-parity]')")
    for questions, shots, readings in asked:
        assert_same(readings, ask_harness(*ours, questions.questions, questions.shots[:shots]))


def test_a_chat_is_the_template_s_own_and_ends_with_its_turn(ours: tuple[Any, Any]) -> None:
    """ChatML with a default system turn, and EOS that is the end of a turn: once behind an answer, and before none."""
    tokenizer = ours[1]
    example = Example("열이 난다.\n정답:", "A")
    (prompt,) = encode_prompts(tokenizer, [example])
    turns = [{"role": "user", "content": example.prompt}]
    assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\n")
    assert find_end_tokens(tokenizer) == [tokenizer.eos_token_id] == tokenizer.encode("<|im_end|>")
    (tokens,) = tokenise(tokenizer, [example])
    assert tokens.ids == [*prompt, *tokenizer.encode("A"), tokenizer.eos_token_id]
    (text,) = tokenise(tokenizer, [Example("", "열이 난다.", chat=False)])
    assert text.ids == [*tokenizer.encode("열이 난다."), tokenizer.eos_token_id]


def test_korean_comes_back_whole_from_bytes(ours: tuple[Any, Any]) -> None:
    """A syllable is several tokens; what is decoded from them is the text again, without a replacement character."""
    tokenizer, text = ours[1], "당뇨병성 케톤산증에서 먼저 확인할 검사는?"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 2 < len(ids) / sum("가" <= letter <= "힣" for letter in text) < 4
