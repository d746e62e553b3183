"""One stage's answers from a file, with what is known of the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medlora.evaluation.predictions import Prediction
from medlora.records import McqRecord


@dataclass(frozen=True, slots=True)
class Total:
    """A result that is known as a sum alone, so that it cannot be paired."""

    test: str
    metric: str
    correct: int
    total: int


@dataclass(frozen=True, slots=True)
class Log:
    """What one stage answered. `questions` maps (test, id) to the question where its text is known."""

    stage: str
    predictions: tuple[Prediction, ...]
    questions: Mapping[tuple[str, str], McqRecord] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    totals: tuple[Total, ...] = ()
