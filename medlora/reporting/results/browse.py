"""Every question of an evaluation on one offline page: to read without a script, to search and filter with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import Report
from medlora.records import LETTERS, McqRecord
from medlora.reporting.templates import load_script, make_environment

BROWSE = "questions.html"

PAGE_BYTES = 14_200_000
"""What the questions may take together, so that the page opens at once."""

_CARD_BYTES, _ANSWER_BYTES, _OPTION_BYTES = 420, 130, 60
"""About what the markup of a question, an answer and an option takes, without their texts."""

_TEXT_LIMITS = (4_000, 2_000, 1_000, 500, 250, 120, 0)
"""Characters of a raw answer that are shown: the first of these with which all questions fit."""

STATES = {"r": "right", "w": "wrong", "u": "no letter", "f": "failed", "-": "not asked"}
"""What an answer is, as the page's script knows it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one stage answered; `state` is a key of STATES, `confidence` the probability of the chosen letter."""

    stage: str
    state: str
    prediction: Prediction
    confidence: float | None


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A question with the answers of all stages; `answers` has None where a stage was not asked."""

    test: str
    id: str
    gold: str
    subject: str
    question: McqRecord | None
    answers: tuple[Answer | None, ...]

    @property
    def states(self) -> str:
        """A letter for each stage."""
        return "".join(answer.state if answer else "-" for answer in self.answers)

    @property
    def confidences(self) -> str:
        """For each stage, thousandths of its probability, or a dash."""
        known = [answer.confidence if answer else None for answer in self.answers]
        return " ".join("-" if value is None else str(round(1000 * value)) for value in known)


def write_browse_page(
    path: Path,
    report: Report,
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]],
) -> None:
    """Write the page of all questions, the last stage's most confident wrong answers first.

    Every text is escaped. The page's policy allows the one script that comes with medlora, known by its hash, and
    nothing from elsewhere. The same arguments give the same bytes.
    """
    rows = sort_rows(list_rows(predictions, questions))
    shown, limit = fit(rows)
    firsts: dict[str, int] = {}
    for i, row in enumerate(shown):
        firsts.setdefault(row.states[-1], i)
    counts = {state: sum(row.states[-1] == state for row in rows) for state in STATES}
    text = (
        make_environment()
        .get_template("questions.html")
        .render(
            name=report.get("name") or "Evaluation",
            stages=list(dict.fromkeys(p.stage for p in predictions)),
            tests=list(dict.fromkeys(row.test for row in rows)),
            subjects=sorted({row.subject for row in rows if row.subject}),
            rows=shown,
            total=len(rows),
            limit=limit,
            firsts=firsts,
            counts=counts,
            states=STATES,
            letters=LETTERS,
            script=load_script("questions.js"),
        )
    )
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def list_rows(predictions: Sequence[Prediction], questions: Mapping[str, Sequence[McqRecord]]) -> list[QuestionRow]:
    """The questions in the order of the predictions."""
    records = {(test, record.id): record for test, inside in questions.items() for record in inside}
    stages = list(dict.fromkeys(p.stage for p in predictions))
    answers: dict[tuple[str, str], dict[str, Answer]] = {}
    for p in predictions:
        answers.setdefault((p.test, p.id), {})[p.stage] = Answer(p.stage, find_state(p), p, find_confidence(p))
    rows = []
    for (test, id), given in answers.items():
        first = next(iter(given.values())).prediction
        ordered = tuple(given.get(stage) for stage in stages)
        rows.append(QuestionRow(test, id, first.gold, first.subject, records.get((test, id)), ordered))
    return rows


def find_state(prediction: Prediction) -> str:
    """Right, wrong, no letter or failed, as a key of STATES."""
    if prediction.choice is None:
        return "f" if prediction.error else "u"
    return "r" if prediction.correct else "w"


def find_confidence(prediction: Prediction) -> float | None:
    """The probability of the chosen letter; None where the scoring gives no probabilities."""
    place = LETTERS.find(prediction.choice) if prediction.choice else -1
    return prediction.probabilities[place] if 0 <= place < len(prediction.probabilities) else None


def sort_rows(rows: Sequence[QuestionRow]) -> list[QuestionRow]:
    """By the last stage: wrong answers first, the most confident ones before all, right answers at the end."""

    def rank(row: QuestionRow) -> tuple[int, float]:
        last = row.answers[-1]
        confidence = last.confidence if last and last.confidence is not None else -1.0
        return "wufr-".index(row.states[-1]), -confidence

    return sorted(rows, key=rank)


def fit(rows: Sequence[QuestionRow]) -> tuple[list[QuestionRow], int]:
    """The rows that the page can hold and the characters that it shows of each raw answer.

    Answers are shortened first. Where the questions alone are too many, the last rows are left out.
    """
    limit, sizes = 0, [0] * len(rows)
    for limit in _TEXT_LIMITS:
        sizes = [_measure(row, limit) for row in rows]
        if sum(sizes) <= PAGE_BYTES:
            return list(rows), limit
    held = sum(1 for _ in takewhile(lambda size: size <= PAGE_BYTES, accumulate(sizes)))
    return list(rows[:held]), limit


def _measure(row: QuestionRow, limit: int) -> int:
    asked = [row.question.question, row.question.question[:72], *row.question.options] if row.question else []
    given = [answer.prediction for answer in row.answers if answer]
    names = [part for p in given for part in (p.stage, p.stage)]
    texts = [row.id, *names, *asked, *(p.text[:limit] + p.error for p in given)]
    # Markup signs are escaped, an ampersand to five characters.
    escaped = sum(5 * text.count(sign) for text in texts for sign in "&<>\"'")
    size = escaped + sum(len(text.encode("utf-8", "replace")) for text in texts)
    return size + _CARD_BYTES + _ANSWER_BYTES * len(given) + _OPTION_BYTES * len(asked)
