"""Batches of questions, and the answers so far: an evaluation's files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from medlora.evaluation.predictions import Prediction
from medlora.evaluation.questions import Question
from medlora.evaluation.reports import Report
from medlora.records import McqRecord
from medlora.runs.files import read_json_lines, read_mapping
from medlora.runs.manifests import check_files, find_differences, read_manifest

log = logging.getLogger("medlora.run")


Answered = tuple[str, str, str]
"""Stage, test and id: what an answer is known by."""


@dataclass(frozen=True)
class Batch:
    """Questions that are asked together, of these stages."""

    questions: tuple[Question, ...]
    stages: tuple[str, ...]


LEDGER, FINGERPRINT, REPORT, PREDICTIONS = "ledger.jsonl", "fingerprint.json", "report.json", "predictions.parquet"


PAGE, SECONDS = "report.html", "seconds.parquet"
"""Files of an evaluation's folder; the ledger goes when the report is there."""


def plan_batches(
    tests: Mapping[str, Sequence[McqRecord]], size: int, stages: Sequence[str], answered: Set[Answered] = frozenset()
) -> list[Batch]:
    """The questions in batches of `size`, longest first, a function of the questions alone; each of the stages that have
    not answered it.

    A batch is always asked as a whole. So its answers have the same bytes for any number of actors, any stages asked
    together, and after any earlier failure.
    """
    questions = [(test, record) for test, records in tests.items() for record in records]
    questions.sort(key=lambda q: (-len(q[1].question) - sum(map(len, q[1].options)), q[0], q[1].id))
    batches = []
    for i in range(0, len(questions), size):
        parts: dict[tuple[str, ...], list[Question]] = {}
        for test, record in questions[i : i + size]:
            left = tuple(stage for stage in stages if (stage, test, record.id) not in answered)
            parts.setdefault(left, []).append((test, record))
        batches += [Batch(tuple(part), left) for left, part in parts.items() if left]
    return batches


def name_batch(batch: Sequence[Question]) -> str:
    """A name for a batch that no other has."""
    return hashlib.sha256("\n".join(f"{test}\t{record.id}" for test, record in batch).encode()).hexdigest()[:16]


def name_answer(prediction: Prediction) -> Answered:
    """What a prediction is known by."""
    return (prediction.stage, prediction.test, prediction.id)


def pack_prediction(prediction: Prediction) -> dict[str, object]:
    """A prediction as plain values for JSON."""
    return asdict(prediction)


def unpack_prediction(row: Mapping[str, Any]) -> Prediction:
    """The prediction that `pack_prediction` packed."""
    return Prediction(**{**row, "probabilities": tuple(row["probabilities"])})


def read_ledger(path: Path, stages: Sequence[str]) -> list[Prediction]:
    """What an earlier driver already knew of these stages: the answers in whole ledger lines, each once."""
    found: dict[Answered, Prediction] = {}
    for line in read_json_lines(path, keys=("predictions",)):
        try:
            predictions = [unpack_prediction(row) for row in line["predictions"]]
            named = [(name_answer(prediction), prediction) for prediction in predictions if prediction.stage in stages]
            for name, prediction in named:
                found.setdefault(name, prediction)
        except (TypeError, KeyError, ValueError) as error:
            log.warning("%s: a line makes no answers (%s); its questions are asked again", path, error)
    return list(found.values())


def sort_predictions(
    predictions: Sequence[Prediction], stages: Sequence[str], tests: Mapping[str, Sequence[McqRecord]]
) -> list[Prediction]:
    """Predictions in the order of stages, tests and questions; raises RuntimeError unless each is there exactly once."""
    by_key = {name_answer(p): p for p in predictions}
    wanted = [(stage, test, record.id) for stage in stages for test, records in tests.items() for record in records]
    if len(by_key) != len(predictions) or set(by_key) != set(wanted):
        raise RuntimeError(f"{len(predictions)} answers, {len(by_key)} of them different, to {len(wanted)} questions")
    return [by_key[key] for key in wanted]


def find_report(folder: Path, fingerprint: Mapping[str, object]) -> Report | None:
    """The report of a finished evaluation that is still valid; None when there is none, or it is of something else."""
    manifest = read_manifest(folder)
    if manifest is None or check_files(folder, manifest):
        return None
    if find_differences(manifest["fingerprint"], fingerprint):
        return None
    return cast(Report | None, read_mapping(folder / REPORT))
