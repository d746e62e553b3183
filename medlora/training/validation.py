"""Scoring of dev records during training: MCQ accuracy and format, perplexity of text, token F1 of translations."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.generation import generate
from medlora.config.base import McqStyle
from medlora.config.phase import Validation
from medlora.evaluation.answers.letter import score_format
from medlora.kernels.modes import in_eval_mode
from medlora.kernels.supervised_head import SupervisedHead
from medlora.prompts import render
from medlora.records import McqRecord, Record, TextRecord, TranslationRecord
from medlora.seeds import derive_seed
from medlora.tokens.encode import encode_prompts
from medlora.tokens.rows import Row, encode
from medlora.tokens.tokenizer import Tokenizer
from medlora.training.batches import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sample_records(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """`n` of the records, in their order; a function of the arguments alone."""
    if len(records) <= n:
        return list(records)
    return [records[i] for i in sorted(random.Random(derive_seed(seed, "validation")).sample(range(len(records)), n))]


def compute_token_f1(predicted: str, reference: str) -> float:
    """F1 of the whitespace tokens that two texts share, counted with repetition (as in SQuAD, arXiv 1606.05250)."""
    a, b = Counter(predicted.split()), Counter(reference.split())
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


@torch.no_grad()
def compute_perplexity(model: PreTrainedModel, rows: Sequence[Row], collator: Collator, batch_size: int) -> float:
    """exp of the mean negative log-likelihood of every supervised token; rows of a length share a batch, for less padding."""
    total, count, head = 0.0, 0, SupervisedHead(model)
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in collator(rows[start : start + batch_size]).items()}
        labels, supervised = batch.pop("labels"), batch.pop("supervised")
        with head.at(supervised):
            total += head.compute_loss(model(**batch, use_cache=False), labels, 1).item()
        count += len(supervised)
    return math.exp(min(total / max(count, 1), 700))


class Validator:
    """Scores the stage that is active in a model on a seeded sample of dev records.

    `required_fields` are the rationale fields that the format score asks for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        collator: Collator,
        config: Validation,
        records: Sequence[Sequence[Record]],
        seed: int,
        required_fields: Sequence[str],
        max_tokens: int,
    ) -> None:
        sampled = [record for source in records for record in sample_records(source, config.sample, seed)]
        self.tokenizer, self.collator, self.config = tokenizer, collator, config
        self.questions = [record for record in sampled if isinstance(record, McqRecord)]
        self.documents = [record for record in sampled if isinstance(record, TextRecord)]
        self.pairs = [record for record in sampled if isinstance(record, TranslationRecord)]
        self.required_fields = tuple(required_fields)
        self.max_tokens = max_tokens

    def score(
        self,
        model: PreTrainedModel,
        style: McqStyle | None = None,
        worked: McqRecord | None = None,
        batch_size: int = 32,
    ) -> dict[str, float]:
        """Plain floats: `accuracy` and `format_score` of questions, `perplexity` of text, `token_f1` of translations,
        and `score`, the one (higher is better) that decides which adapter is the best."""
        with in_eval_mode(model):
            scores: dict[str, float] = {}
            if self.documents:
                examples = [example for record in self.documents for example in render(record)]
                rows, _ = encode(self.tokenizer, examples, self.max_tokens, packing=False)
                scores["perplexity"] = compute_perplexity(model, rows, self.collator, batch_size)
                scores["score"] = -scores["perplexity"]
            if self.pairs:
                examples = [example for record in self.pairs for example in render(record)]
                prompts = encode_prompts(self.tokenizer, examples)
                written = generate(model, self.tokenizer, prompts, self.config.max_tokens)
                f1 = [
                    compute_token_f1(made.text, example.completion)
                    for made, example in zip(written, examples, strict=True)
                ]
                scores["token_f1"] = scores["score"] = sum(f1) / len(f1)
            if self.questions:
                scores |= self._score_questions(model, style or self.config.style, worked)
                scores["score"] = scores["accuracy"]
            return scores

    def _score_questions(self, model: PreTrainedModel, style: McqStyle, worked: McqRecord | None) -> dict[str, float]:
        settings = AnswerSettings(
            scoring=self.config.scoring, style=style, max_tokens=self.config.max_tokens, worked=worked
        )
        answers = McqAnswerer(model, self.tokenizer, settings).answer(self.questions)
        right = sum(answer.choice == record.answer for answer, record in zip(answers, self.questions, strict=True))
        scores = {"accuracy": right / len(answers), "questions": len(answers)}
        if self.config.scoring == "reason":
            formats = [
                score_format(answer.text, self.required_fields, record.letters).score
                for answer, record in zip(answers, self.questions, strict=True)
            ]
            scores["format_score"] = sum(formats) / len(formats)
        return scores
