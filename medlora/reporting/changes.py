"""Questions gained and lost between two stages, as many as a page holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import PairRow, Report
from medlora.records import McqRecord

_PAGE_BYTES = 2_500_000
"""What the questions listed on a page may add to it."""


_CARD_BYTES = 1_200
"""About what the markup of one listed question takes, without its texts."""


_TEXT_LIMIT = 1_500
"""Characters of a stage's raw answer that are shown."""


@dataclass(frozen=True, slots=True)
class Card:
    """A question as it is listed: what was asked, if known, and what every stage answered."""

    id: str
    gold: str
    question: McqRecord | None
    answers: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What one comparison gained and lost: how many, and the first of them as cards."""

    pair: PairRow
    gained: tuple[Card, ...]
    lost: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """The changes a page lists; `limit` is how many questions each of their lists may hold, None where all fit."""

    changes: tuple[Change, ...]
    limit: int | None


def list_changes(
    report: Report, predictions: Sequence[Prediction], questions: Mapping[str, Sequence[McqRecord]]
) -> Listing:
    """Each stage against the one before it and the last against the first, on every test, as much as a page can hold."""
    records = {(test, record.id): record for test, inside in questions.items() for record in inside}
    answers: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        answers.setdefault((prediction.test, prediction.id), []).append(prediction)

    def make_card(key: Sequence[str]) -> Card:
        test, id = key
        given = tuple(answers[test, id])
        return Card(id, given[0].gold, records.get((test, id)), given)

    pairs = select_pairs(report)
    changes = [
        Change(pair, tuple(map(make_card, pair["gained"])), tuple(map(make_card, pair["lost"]))) for pair in pairs
    ]
    limit = _fit([cards for change in changes for cards in (change.gained, change.lost)], _measure)
    return Listing(tuple(Change(c.pair, c.gained[:limit], c.lost[:limit]) for c in changes), limit)


def select_pairs(report: Report) -> list[PairRow]:
    """Of the comparisons on single tests: each stage against the one before it, and the last against the first."""
    found = []
    for test in dict.fromkeys(row["test"] for row in report["stages"]):
        stages = [row["stage"] for row in report["stages"] if row["test"] == test]
        wanted = [*pairwise(stages), *([(stages[0], stages[-1])] if len(stages) > 2 else [])]
        by_names = {(p["before"], p["after"]): p for p in report["comparisons"] if p["test"] == test}
        found += [by_names[names] for names in wanted]
    return found


def _fit(lists: Sequence[Sequence[Card]], measure: Callable[[Card], int]) -> int | None:
    sizes = [[measure(card) for card in cards] for cards in lists]
    longest = max(map(len, sizes), default=0)
    for limit in (longest, 200, 100, 50, 25, 10, 5, 2, 1):
        if sum(sum(inside[:limit]) for inside in sizes) <= _PAGE_BYTES:
            break
    return limit if limit < longest else None


def _measure(card: Card) -> int:
    asked = [card.question.question, *card.question.options] if card.question else []
    texts = [*asked, *(answer.text[:_TEXT_LIMIT] + answer.error for answer in card.answers)]
    return _CARD_BYTES + sum(len(text.encode("utf-8", "replace")) for text in texts)
