"""How the miniature words a fact: Korean particles, statements, questions."""

from __future__ import annotations

from medlora.miniature.facts import Fact

_CODA_LATIN = frozenset("lmnrLMNR013678")
"""Latin letters and digits whose Korean names end in a consonant (엘, 엠, 엔, 알; 영, 일, 삼, 육, 칠, 팔)."""
_RIEUL_LATIN = frozenset("lrLR178")


def particle(word: str, pair: str) -> str:
    """The particle out of "은/는", "이/가", "을/를" or "으로/로" that follows `word`, by its last sound.

    A final ㄹ takes 로. Raises ValueError when the last character has no known Korean reading.
    """
    with_coda, without = pair.split("/")
    last = word[-1]
    if "가" <= last <= "힣":
        # Hangul syllables are laid out by initial, vowel, final: 28 finals, 0 none, 8 ㄹ (Unicode 15, section 3.12).
        final = (ord(last) - ord("가")) % 28
        coda, rieul = final != 0, final == 8
    elif last.isascii() and last.isalnum():
        coda, rieul = last in _CODA_LATIN, last in _RIEUL_LATIN
    else:
        raise ValueError(f"no Korean reading known for the end of {word!r}")
    return with_coda if coda and not (rieul and pair == "으로/로") else without


STATEMENTS = (
    "{S}의 {R}{R은} {A}이다.",
    "{A}{A은} {S}의 {R}이다.",
    "{S}의 {R}{R으로} {A}{A이} 알려져 있다.",
    "{S}{S은} {R}{R이} {A}이다.",
    "{S}의 {R}{R을} 들면 {A}이다.",
)
"""Statements of a fact with term S, relation R and answer A; the first is also the rationale of a question."""

QUESTIONS = {
    "train": (
        "{S}의 {R}{R은} 무엇인가?",
        "다음 중 {S}의 {R}에 해당하는 것은?",
        "{S}의 {R}{R으로} 옳은 것은?",
        "다음에서 {S}의 {R}{R을} 고르시오.",
    ),
    "dev": ("다음 중 {S}의 {R}{R은} 어느 것인가?",),
    "test": (
        "보기에서 {S}의 {R}{R을} 찾으시오.",
        "{S}의 {R}{R으로} 가장 알맞은 것은?",
    ),
}
"""Question wordings by split; no wording is in two splits."""


def word_fact(template: str, fact: Fact) -> str:
    """One of STATEMENTS or QUESTIONS about `fact`, with the particles that its words take."""
    words = {"S": fact.term, "R": fact.relation, "A": fact.answer}
    pairs = {"은": "은/는", "이": "이/가", "을": "을/를", "으로": "으로/로"}
    particles = {f"{key}{name}": particle(word, pair) for key, word in words.items() for name, pair in pairs.items()}
    return template.format(**words, **particles)


def word_fact_in_english(fact: Fact) -> str:
    """The English counterpart of the first of STATEMENTS."""
    return f"the {fact.relation_en} of {fact.term_en} is {fact.answer_en}."
