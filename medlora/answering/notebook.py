"""Scoring of a model in a notebook: no Ray, no run folder, no config file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.rotations import predict
from medlora.config.base import McqStyle
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.statistics import Accuracy, Breakdown, accuracy, breakdown
from medlora.records import McqRecord
from medlora.seeds import derive_seed
from medlora.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Evaluation", "MCQEvaluator", "evaluate_mcq_batch", "extract_answer_letter"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model answered and how good that is: accuracy with its Wilson 95 % interval, overall and by subject."""

    accuracy: Accuracy
    by_subject: Breakdown
    predictions: tuple[Prediction, ...]

    def __str__(self) -> str:
        rows = {subject or "(no subject)": part for subject, part in self.by_subject.groups.items()}
        width = max(map(len, [*rows, "all"]))
        return "\n".join(
            f"{name:{width}}  {part.correct:5} of {part.total:5}  {part.value:6.1%}  [{part.low:.1%}, {part.high:.1%}]"
            + (f"  {part.unparsed} unparsed" if part.unparsed else "")
            for name, part in {**rows, "all": self.accuracy}.items()
        )


def evaluate_mcq_batch(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[McqRecord],
    style: McqStyle = "reasoning",
    rotations: bool = False,
    **options: Any,
) -> list[Prediction]:
    """A prediction for each question, in their order; `options` are those of AnswerSettings (scoring, shots, ...).

    `rotations` asks each under all cyclic orders of its options.
    """
    return _predict(McqAnswerer(model, tokenizer, AnswerSettings(style=style, **options)), records, rotations)


class MCQEvaluator:
    """Scores a model, as it is now, on multiple-choice questions; `options` are those of AnswerSettings.

    `rotations` asks each under all cyclic orders of its options. Raises ValueError when there are no records or two share an id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        records: Sequence[McqRecord],
        style: McqStyle = "reasoning",
        rotations: bool = False,
        **options: Any,
    ) -> None:
        if not records:
            raise ValueError("there are no questions to evaluate on")
        if len({record.id for record in records}) < len(records):
            raise ValueError("two questions share an id; give every record an id of its own")
        self.records, self.rotations = tuple(records), rotations
        self._answerer = McqAnswerer(model, tokenizer, AnswerSettings(style=style, **options))

    def evaluate(self) -> Evaluation:
        """All questions."""
        return _evaluate(_predict(self._answerer, self.records, self.rotations))

    def quick_evaluate(self, num_samples: int = 10, seed: int = 0) -> Evaluation:
        """A seeded sample of the questions, in their order; the same questions at every call."""
        n = min(num_samples, len(self.records))
        places = random.Random(derive_seed(seed, "quick_evaluate")).sample(range(len(self.records)), n)
        return _evaluate(_predict(self._answerer, [self.records[i] for i in sorted(places)], self.rotations))


def _predict(answerer: McqAnswerer, records: Sequence[McqRecord], rotations: bool) -> list[Prediction]:
    return predict(answerer, ["test"] * len(records), records, "model", rotations)


def _evaluate(predictions: Sequence[Prediction]) -> Evaluation:
    return Evaluation(accuracy(predictions), breakdown(predictions, by="subject"), tuple(predictions))
