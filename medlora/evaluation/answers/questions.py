"""Outputs that answer several questions, of which one at most was asked."""

from __future__ import annotations

import re
from itertools import pairwise

from medlora.evaluation.answers.text import plain_text

_KIND = r"(?:문제|문항|질문|question|answer|item|정답|답|Q|A)"


# "1. B", "Q1: B", "[문제 2] 정답: ③", "1번 문제는 B": the number of a question, then an option and nothing else.
_ITEM = re.compile(
    rf"(?:\A|[\n,;/{{|]|(?<=\s)|(?<=[.:] ))[ \t\-*•\[(\"']*(?:{_KIND}\s*\.?\s*)?[(\[]?(?P<number>\d{{1,2}})\s*번?[)\]]?\s*(?:문제|문항|질문)?"
    rf"\s*(?:의|은|는)?[\])\"']*\s*[.):\-–→|]*\s*(?:(?:the\s+)?(?:정답|답|answer)\s*(?:은|는|is|:)*\s*)?[\"'(\[]*"
    r"(?P<option>[A-Ja-j](?![A-Za-z0-9+'-])|\d번)[)\]\"']*\s*(?:입니다|이다|이고|이며|이에요|예요)?"
    rf"(?=\s*(?:[,;|}}\n]|\.(?!\s*[^\s\dQ문(])|\Z)|\s+[(\[]?(?:{_KIND}\s*)?\d)",
    re.I,
)


EXAMPLES = {"_ITEM": ("1. B", "1. B형 간염")}
"""A text that a pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def answers_several(output: str) -> bool:
    """Whether two numbered questions in a row have an answer each."""
    text = plain_text(output)
    numbers = [int(found["number"]) for found in _ITEM.finditer(text)]
    return any(following == number + 1 for number, following in pairwise(numbers))
