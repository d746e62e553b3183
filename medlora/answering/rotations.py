"""Answers -> predictions, with the options in their own order or in all cyclic orders."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean

from medlora.answering.answerer import Answer, McqAnswerer
from medlora.evaluation.answers.letter import score_format
from medlora.evaluation.predictions import Prediction
from medlora.records import FIELDS, LETTERS, McqRecord


def predict(
    answerer: McqAnswerer, tests: Sequence[str], records: Sequence[McqRecord], stage: str, rotations: bool = False
) -> list[Prediction]:
    """A prediction for each question, in their order; `tests` names the test of each.

    With `rotations` every question is asked under all cyclic orders of its options. The choice then follows the averaged
    probabilities, or the majority (a tie goes to the first) where the scoring gives none. Text and format are those of the
    record's own order; tokens are those of all orders.
    """
    orders = [len(record.options) if rotations else 1 for record in records]
    asked = [rotate(record, by) for record, n in zip(records, orders, strict=True) for by in range(n)]
    started = time.perf_counter()
    answered = iter(answerer.answer(asked))
    each_s = (time.perf_counter() - started) / max(1, len(asked))
    predictions = []
    for test, record, n in zip(tests, records, orders, strict=True):
        answers = list(islice(answered, n))
        prediction = _describe(answerer, test, record, merge(record, answers) if rotations else answers[0], stage)
        rotated = "".join(answer.choice or "-" for answer in answers) if rotations else ""
        predictions.append(replace(prediction, rotated=rotated, seconds=n * each_s))
    return predictions


def rotate(record: McqRecord, by: int) -> McqRecord:
    """The same question with its options moved `by` places to the front; the id distinguishes the orders."""
    if by == 0:
        return record
    place = (LETTERS.index(record.answer) - by) % len(record.options)
    options = record.options[by:] + record.options[:by]
    return replace(record, id=f"{record.id}#{by}", options=options, answer=LETTERS[place])


def merge(record: McqRecord, answers: Sequence[Answer]) -> Answer:
    """One answer out of those to `rotate(record, 0)`, `rotate(record, 1)`, ..., in the letters of the record."""
    n = len(record.options)
    text, tokens = answers[0].text, sum(answer.tokens for answer in answers)
    if all(answer.probabilities for answer in answers):
        mean = tuple(fmean(answers[by].probabilities[(place - by) % n] for by in range(n)) for place in range(n))
        first, second = sorted(mean, reverse=True)[:2]
        return Answer(LETTERS[mean.index(first)], mean, first - second, text, tokens)
    votes = Counter((LETTERS.index(a.choice) + by) % n for by, a in enumerate(answers) if a.choice)
    choice = LETTERS[max(votes, key=votes.__getitem__)] if votes else None
    return Answer(choice, text=text, tokens=tokens)


def _describe(answerer: McqAnswerer, test: str, record: McqRecord, answer: Answer, stage: str) -> Prediction:
    writes = answerer.scoring in ("reason", "generate") and answerer.style in ("reasoning", "reasoning_full")
    # What the record's own rationale shows is asked for; a record without one asks for the whole structure.
    fields = [name for name in FIELDS if name in record.rationale] or FIELDS
    return Prediction(
        record.id,
        test,
        stage,
        record.answer,
        answer.choice,
        record.subject,
        answer.probabilities,
        answer.text,
        options=len(record.options),
        tokens=answer.tokens,
        margin=answer.margin,
        format_score=score_format(answer.text, fields, record.letters).score if writes else None,
    )
