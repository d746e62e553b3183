"""What the miniature base model is pre-trained on: the formats, how to copy and match, and general knowledge.

Medical words occur, but only in pairs drawn at random: the base knows their spelling and none of their facts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from medlora.miniature.corpus import ask
from medlora.miniature.facts import MEDICAL
from medlora.miniature.general import GENERAL
from medlora.miniature.settings import DRILL_QUERIES, OPTIONS, SHARES
from medlora.miniature.wording import QUESTIONS, STATEMENTS, word_fact, word_fact_in_english
from medlora.prompts import ANSWER_FIELD, Example, render, render_question
from medlora.records import LETTERS, McqRecord, TextRecord, TranslationRecord

_FACTS = MEDICAL + GENERAL


_WORDS = sorted({word for fact in _FACTS for word in (fact.term, fact.answer)})


_SYLLABLES = sorted({syllable for word in _WORDS for syllable in word if "가" <= syllable <= "힣"})


def _draw_word(rng: random.Random) -> str:
    """A real word, or one time in four a pseudo-word of two syllables."""
    return rng.choice(_WORDS) if rng.random() < 0.75 else "".join(rng.choices(_SYLLABLES, k=2))


def _draw_words(count: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[_draw_word(rng)] = None
    return list(words)


def drill(rng: random.Random) -> Example:
    """Five lettered options, then queries with replacement: the letter of an option, or the option of a letter."""
    words = _draw_words(OPTIONS, rng)
    lines = []
    for _ in range(DRILL_QUERIES):
        index = rng.randrange(OPTIONS)
        word, letter = words[index], LETTERS[index]
        queries = (f" {word}{letter}", f" {word}이다.\n{ANSWER_FIELD}{letter}", f"{letter}. {word}")
        lines.append(rng.choices(queries, weights=(2, 2, 1))[0])
    prompt = render_question(McqRecord("drill", _draw_word(rng), tuple(words), "A"))
    return Example(f"{prompt}\n풀이:", "\n".join(lines))


def open_book(rng: random.Random) -> Example:
    """One to three made-up facts and a question about one of them: what is asked can only be read, not remembered."""
    words = _draw_words(2 * OPTIONS, rng)
    relation = rng.choice(_FACTS)
    book = [replace(relation, term=t, answer=a) for t, a in zip(words[:OPTIONS], words[OPTIONS:], strict=True)]
    stated = rng.sample(book, rng.randint(1, 3))
    record = ask(stated[0], rng.choice(QUESTIONS["train"]), tuple(book), rng, "open")
    rng.shuffle(stated)
    statements = " ".join(word_fact(rng.choice(STATEMENTS), fact) for fact in stated)
    return render(replace(record, question=f"{statements} {record.question}"))[0]


def question(rng: random.Random) -> Example:
    """A closed-book question on general knowledge."""
    return render(ask(rng.choice(GENERAL), rng.choice(QUESTIONS["train"]), GENERAL, rng, "general"))[0]


def text(rng: random.Random) -> Example:
    """A document on general knowledge, in the form of the corpus's."""
    fact = rng.choice(GENERAL)
    facts = rng.choices([other for other in GENERAL if other.subject == fact.subject], k=rng.choice((3, 4)))
    statements = " ".join(word_fact(rng.choice(STATEMENTS), fact) for fact in facts)
    return render(TextRecord("g", f"{fact.subject}: {statements}"))[0]


def translation(rng: random.Random) -> Example:
    """A general fact from English to Korean or back."""
    fact = rng.choice(GENERAL)
    english, korean = word_fact_in_english(fact), word_fact(STATEMENTS[0], fact)
    return rng.choice(render(TranslationRecord("g", f"medicine: {english}", f"의학: {korean}")))


LESSONS = {"drill": drill, "open_book": open_book, "text": text, "question": question, "translation": translation}


def draw_lessons(rng: random.Random) -> Iterator[Example]:
    """Lessons without end, in SHARES."""
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        yield LESSONS[rng.choices(names, shares)[0]](rng)
