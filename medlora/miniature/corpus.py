"""The miniature's data: medical facts as plain text, translation pairs and five-option questions.

Two facts of three are asked in training (`ASKED`); the others only ever occur in plain text (`TEXT_ONLY`). Two tests
follow from it: `mcq/test_asked` asks known facts in new wordings and option orders, `mcq/test_text_only` asks what was
read but never asked.
"""

from __future__ import annotations

import random
from collections import defaultdict

from medlora.miniature.facts import MEDICAL, Fact
from medlora.miniature.settings import DOCUMENT_SIZES, OPTIONS, STATEMENT_REPEATS, TRAIN_ORDERS
from medlora.miniature.wording import QUESTIONS, STATEMENTS, word_fact, word_fact_in_english
from medlora.records import LETTERS, McqRecord, Record, TextRecord, TranslationRecord

TEXT_ONLY = MEDICAL[2::3]
"""Facts that no training or dev question asks."""
ASKED = tuple(fact for fact in MEDICAL if fact not in TEXT_ONLY)
"""Facts that training questions ask; the even ones already in `mcq/train_01`."""

NAMES = ("text", "translation", "mcq/train_01", "mcq/train", "mcq/dev", "mcq/test_asked", "mcq/test_text_only")
"""What `load` knows."""


def _extra_tokens(facts: tuple[Fact, ...], every: int = 8, limit: int = 35) -> tuple[str, ...]:
    """Single Korean words of three syllables or more that are part of no other word, spread over the table."""
    words = list(dict.fromkeys(word for fact in facts for word in (fact.term, fact.answer)))
    alone = [w for w in words if len(w) >= 3 and " " not in w and not any(w != other and w in other for other in words)]
    return tuple(alone[::every][:limit])


EXTRA_TOKENS = _extra_tokens(MEDICAL)
"""Medical words held out of the base tokenizer's training: what phase 00 adds to the vocabulary."""


def ask(fact: Fact, wording: str, pool: tuple[Fact, ...], rng: random.Random, id: str) -> McqRecord:
    """A five-option question about `fact`; the four wrong answers are drawn from the same relation in `pool`."""
    wrong = sorted({f.answer for f in pool if f.relation == fact.relation} - {fact.answer})
    options = rng.sample(wrong, OPTIONS - 1) + [fact.answer]
    rng.shuffle(options)
    return McqRecord(
        id=id,
        question=word_fact(wording, fact),
        options=tuple(options),
        answer=LETTERS[options.index(fact.answer)],
        subject=fact.subject,
        rationale={"analysis": word_fact(STATEMENTS[0], fact)},
    )


def _questions(name: str, facts: tuple[Fact, ...], split: str, orders: int, rng: random.Random) -> list[Record]:
    asked = [(fact, wording) for fact in facts for wording in QUESTIONS[split] for _ in range(orders)]
    return [ask(fact, wording, MEDICAL, rng, f"{name}-{i:04d}") for i, (fact, wording) in enumerate(asked)]


def _documents(rng: random.Random) -> list[Record]:
    """Documents on one subject each: a heading and a few statements, every fact in every wording equally often."""
    by_subject: dict[str, list[str]] = defaultdict(list)
    for fact in MEDICAL:
        by_subject[fact.subject] += [word_fact(statement, fact) for statement in STATEMENTS] * STATEMENT_REPEATS
    documents: list[str] = []
    for subject, statements in by_subject.items():
        rng.shuffle(statements)
        while statements:
            size = rng.choice(DOCUMENT_SIZES)
            documents.append(f"{subject}: {' '.join(statements[:size])}")
            del statements[:size]
    rng.shuffle(documents)
    return [TextRecord(f"text-{i:04d}", text) for i, text in enumerate(documents)]


def _translations() -> list[Record]:
    """Asked facts as sentences; of the others only term and answer apart, so that no translation states them."""
    pairs: list[tuple[str, str]] = []
    for fact in MEDICAL:
        if fact in ASKED:
            pairs.append((word_fact_in_english(fact), word_fact(STATEMENTS[0], fact)))
        else:
            pairs += [(fact.term_en, fact.term), (fact.answer_en, fact.answer)]
    # The heading gives every term a space before it, at the start of a completion too: one form, one token.
    return [
        TranslationRecord(f"translation-{i:04d}", english=f"medicine: {english}", korean=f"의학: {korean}")
        for i, (english, korean) in enumerate(pairs)
    ]


def load(name: str, seed: int = 0) -> list[Record]:
    """The records of one of NAMES; `seed` varies distractors, orders and documents, never which facts are asked where.

    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown miniature source {name!r}; known: {', '.join(NAMES)}")
    rng = random.Random(f"{name} {seed}")
    if name == "text":
        return _documents(rng)
    if name == "translation":
        return _translations()
    facts, split, orders = {
        "mcq/train_01": (ASKED[::2], "train", TRAIN_ORDERS),
        "mcq/train": (ASKED, "train", TRAIN_ORDERS),
        "mcq/dev": (ASKED, "dev", 1),
        "mcq/test_asked": (ASKED, "test", 1),
        "mcq/test_text_only": (TEXT_ONLY, "test", 2),
    }[name]
    return _questions(name, facts, split, orders, rng)
