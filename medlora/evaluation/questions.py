"""The questions of an evaluation: tests, few-shot examples, the worked example."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medlora.config.evaluation import EvaluationConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.checks import read_source
from medlora.errors import InputError
from medlora.records import McqRecord
from medlora.seeds import derive_seed

Question = tuple[str, McqRecord]
"""The test that a question belongs to, and the question."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks: the questions of every test, and what every prompt shows solved before them."""

    tests: dict[str, list[McqRecord]]
    shots: tuple[McqRecord, ...] = ()
    worked: McqRecord | None = None

    @property
    def count(self) -> int:
        """How many questions there are."""
        return sum(map(len, self.tests.values()))

    @property
    def letters(self) -> str:
        """Every letter that a question can be answered with."""
        return max((record.letters for records in self.tests.values() for record in records), key=len, default="")


def read_asked(evaluation: EvaluationConfig, seed: int, max_bad_fraction: float = 0.0) -> Asked:
    """Everything that prompts are made of; raises InputError naming the key of what cannot be asked or shown.

    A solved question that a test asks too would give its answer away: refused.
    """
    key = "evaluation"
    tests = read_tests(evaluation, max_bad_fraction)
    shots: tuple[McqRecord, ...] = ()
    worked = None
    if few_shot := evaluation.few_shot:
        questions = _read_questions(f"{key}.few_shot", few_shot, max_bad_fraction)
        if len(questions) < few_shot.k:
            raise InputError(
                f"{key}.few_shot: {few_shot.source} has {len(questions)} questions, k asks for {few_shot.k}"
            )
        first = few_shot.choose == "first"
        drawn = random.Random(derive_seed(seed, "few_shot"))
        shots = tuple(questions[: few_shot.k] if first else drawn.sample(questions, few_shot.k))
        _refuse_leaks(f"{key}.few_shot", shots, tests)
    if example := evaluation.worked_example:
        solved = _read_questions(f"{key}.worked_example", example, max_bad_fraction)
        worked = next((record for record in solved if record.rationale), None)
        if worked is None:
            raise InputError(f"{key}.worked_example: {example.source} has no question with a rationale to show")
        _refuse_leaks(f"{key}.worked_example", (worked,), tests)
    return Asked(tests, shots, worked)


def _read_questions(key: str, source: SourceConfig, max_bad_fraction: float) -> list[McqRecord]:
    return [record for record in read_source(key, source, max_bad_fraction) if isinstance(record, McqRecord)]


def _refuse_leaks(key: str, shown: Sequence[McqRecord], tests: Mapping[str, Sequence[McqRecord]]) -> None:
    texts = {record.question.strip(): record.id for record in shown}
    for test, records in tests.items():
        for record in records:
            if (solved := texts.get(record.question.strip())) is not None:
                raise InputError(
                    f"{key}: question {solved} is shown with its answer, and test {test} asks it (as {record.id}); "
                    "take solved questions from another split"
                )


def read_tests(evaluation: EvaluationConfig, max_bad_fraction: float = 0.0) -> dict[str, list[McqRecord]]:
    """The questions of every test; raises InputError for a test without any, or two tests of one name."""
    tests: dict[str, list[McqRecord]] = {}
    for i, test in enumerate(evaluation.tests):
        questions = _read_questions(f"evaluation.tests.{i}", test, max_bad_fraction)
        if not questions:
            raise InputError(
                f"evaluation.tests.{i}.source: {test.source} holds no questions; a test is multiple choice"
            )
        if test.name in tests:
            raise InputError(f"evaluation.tests.{i}.name: there is a test {test.name!r} already; names must differ")
        tests[test.name] = questions
    return tests
