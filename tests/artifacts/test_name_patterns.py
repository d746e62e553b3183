"""Patterns of module names: the same answer as Python's `re`, in bounded time for any pattern."""

from __future__ import annotations

import random
import re
import time

import pytest

from medlora.artifacts.name_patterns import NamePattern
from medlora.errors import InputError

NAMES = (
    *("model.layers.0.self_attn.q_proj", "model.language_model.layers.11.mlp.down_proj", "lm_head", "a", "aab", ""),
    *("model.vision_tower.encoder.layers.1.mlp.fc1", "ab.ab.ab", "model.layers.1.mlp.experts.3.w1"),
)
PATTERNS = (
    r".*\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj|w1).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.q_proj)",
    r"a{2,3}b?",
    r"(ab\.?){2,}",
    r"(a*)*b?",
    r"[^.]+",
    r"(a?){5}ab",
    r"(?=.*q_proj)model.*",
    r"^lm_head$",
    r"(a?b?){3,}",
)


def test_a_pattern_matches_what_re_matches() -> None:
    for pattern in PATTERNS:
        ours = NamePattern(pattern)
        for name in NAMES:
            assert ours.fullmatch(name) == bool(re.fullmatch(pattern, name)), (pattern, name)
            assert ours.match_end(name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), (pattern, name)


def test_random_patterns_match_what_re_matches() -> None:
    drawn = random.Random(0)

    def draw(depth: int) -> str:
        kind = drawn.random()
        if depth == 0 or kind < 0.3:
            return drawn.choice(["a", "b", ".", "[ab]", r"\.", "[^a]"])
        if kind < 0.5:
            return draw(depth - 1) + draw(depth - 1)
        if kind < 0.7:
            return f"({draw(depth - 1)}|{draw(depth - 1)})"
        return f"({draw(depth - 1)})" + drawn.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])

    matched = 0
    for _ in range(1_500):
        pattern = draw(4)
        ours = NamePattern(pattern)
        for _ in range(3):
            name = "".join(drawn.choice("ab.") for _ in range(drawn.randint(0, 9)))
            assert ours.fullmatch(name) == bool(re.fullmatch(pattern, name)), (pattern, name)
            matched += ours.fullmatch(name)
    assert matched > 300


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+(model|layers|\.|[a-z0-9_]+)+$!", r"^(([a-z_0-9])+.?)+Z$", "((((((.*)*)*)*.*)*.*)*Z)*Z"),
        *("((a{1000}){1000}){1000}", "(.*)" * 300 + "Z", "(" * 20 + "a*" + ")*" * 20, "(x|x|y)*" * 200),
    ],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    started = time.process_time()
    try:
        ours = NamePattern(pattern)
        for i in range(200):
            ours.fullmatch(f"model.language_model.layers.{i}.self_attn.q_proj")
    except InputError as error:
        assert "takes too long to match" in str(error)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(a)\1", "groupref is not supported"),
        ("(?<=a)b", "looking behind is not supported"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("a*+", "possessive_repeat is not supported"),
        ("(", "is no regular expression: missing"),
        ("a" * 5_000, "a pattern of 5,000 characters"),
    ],
)
def test_other_patterns_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        NamePattern(pattern)
