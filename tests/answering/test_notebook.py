from __future__ import annotations

from typing import Any

import pytest

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.notebook import MCQEvaluator, evaluate_mcq_batch
from medlora.config.model import BaseModelConfig
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.evaluation.statistics import wilson
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.records import McqRecord

RECORDS = [
    McqRecord(f"q{i}", f"열 {i} 이 나는 이유 는?", ("aspirin", "insulin", "text"), "ABC"[i % 3], subject="ab"[i % 2])
    for i in range(24)
]


@pytest.fixture(scope="module")
def model(bases: dict[str, str]) -> tuple[Any, Any]:
    config = BaseModelConfig(model=bases["gemma"])
    tokenizer = load_tokenizer(config)
    return load_base(config, tokenizer), tokenizer


def test_an_evaluation_says_accuracy_interval_and_subjects(model: Any) -> None:
    evaluation = MCQEvaluator(*model, RECORDS, "answer").evaluate()
    answers = McqAnswerer(*model, AnswerSettings(style="answer")).answer(RECORDS)
    assert [p.choice for p in evaluation.predictions] == [answer.choice for answer in answers]
    right = sum(answer.choice == record.answer for answer, record in zip(answers, RECORDS, strict=True))
    assert (evaluation.accuracy.correct, evaluation.accuracy.total) == (right, 24)
    assert (evaluation.accuracy.low, evaluation.accuracy.high) == wilson(right, 24)
    assert {name: part.total for name, part in evaluation.by_subject.groups.items()} == {"a": 12, "b": 12}
    assert sum(part.correct for part in evaluation.by_subject.groups.values()) == right
    last = str(evaluation).splitlines()[-1]
    assert last.startswith("all") and f"{right} of" in last and f"{right / 24:.1%}" in last


def test_a_quick_evaluation_takes_a_seeded_sample_in_order(model: Any) -> None:
    evaluator = MCQEvaluator(*model, RECORDS, "answer")
    ids = [p.id for p in evaluator.quick_evaluate().predictions]
    assert len(ids) == 10 and ids == [record.id for record in RECORDS if record.id in ids]
    assert ids == [p.id for p in evaluator.quick_evaluate(num_samples=10).predictions]
    assert ids != [p.id for p in evaluator.quick_evaluate(seed=1).predictions]
    whole = {p.id: p.choice for p in evaluator.evaluate().predictions}
    assert all(p.choice == whole[p.id] for p in evaluator.quick_evaluate(num_samples=5).predictions)
    assert len(evaluator.quick_evaluate(num_samples=99).predictions) == 24


def test_a_batch_is_scored_without_an_evaluator(model: Any) -> None:
    predictions = evaluate_mcq_batch(*model, RECORDS[:3], style="answer", scoring="generate", max_tokens=5)
    assert [p.id for p in predictions] == ["q0", "q1", "q2"] and all(p.options == 3 for p in predictions)
    assert [p.choice for p in predictions] == [extract_answer_letter(p.text, "ABC") for p in predictions]


def test_what_cannot_be_scored_is_said(model: Any) -> None:
    with pytest.raises(ValueError, match="no questions"):
        MCQEvaluator(*model, [])
    with pytest.raises(ValueError, match="share an id"):
        MCQEvaluator(*model, [RECORDS[0], RECORDS[0]])


def test_rotations_ask_every_order_of_a_real_model(model: Any) -> None:
    plain = evaluate_mcq_batch(*model, RECORDS, "answer")
    turned = evaluate_mcq_batch(*model, RECORDS, "answer", rotations=True)
    assert list(MCQEvaluator(*model, RECORDS, "answer", rotations=True).evaluate().predictions) == turned
    assert [p.rotated[0] for p in turned] == [p.choice for p in plain]
    assert all(len(p.rotated) == 3 and sum(p.probabilities) == pytest.approx(1) for p in turned)
