"""Our own evaluations and runs -> logs: predictions.parquet, and the questions where their files are still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medlora.config.evaluation import EvaluationConfig, StageEvaluationConfig
from medlora.errors import InputError
from medlora.evaluation.ledger import PREDICTIONS, REPORT
from medlora.evaluation.logs.log import Log
from medlora.evaluation.predictions import Prediction, read_predictions
from medlora.evaluation.questions import read_tests
from medlora.records import McqRecord
from medlora.runs.files import read_mapping


def find_evaluation(folder: Path) -> Path | None:
    """The folder with the predictions: the evaluation itself, or that of a run; None where there is neither."""
    return next((place for place in (folder, folder / "evaluation") if (place / PREDICTIONS).is_file()), None)


def read_evaluation(path: Path, wanted: Sequence[str]) -> list[Log]:
    """The logs of the stages `wanted` (none named: all) of an evaluation's folder or its predictions.parquet."""
    file = path / PREDICTIONS if path.is_dir() else path
    predictions = read_predictions(file)
    stages = list(dict.fromkeys(p.stage for p in predictions))
    if unknown := [name for name in wanted if name not in stages]:
        raise InputError(f"{path}: no stage {', '.join(unknown)}; it holds {', '.join(stages)}")
    questions, notes = _find_questions(file.parent, predictions)
    return [
        Log(stage, tuple(p for p in predictions if p.stage == stage), questions, notes) for stage in wanted or stages
    ]


def _find_questions(
    folder: Path, predictions: Sequence[Prediction]
) -> tuple[dict[tuple[str, str], McqRecord], tuple[str, ...]]:
    """The questions by test and id, as far as the files that the evaluation names are still what they were."""
    config = _read_config(folder)
    if config is None:
        return {}, ()
    try:
        tests = read_tests(config, max_bad_fraction=1.0)
    except InputError as error:
        return {}, (f"{folder.name}: the questions' texts are not shown ({str(error).splitlines()[0]})",)
    golds = {(p.test, p.id): p.gold for p in predictions}
    found = {(test, record.id): record for test, records in tests.items() for record in records}
    questions = {key: record for key, record in found.items() if golds.get(key) == record.answer}
    changed = len(golds) - len(questions)
    note = f"{folder.name}: {changed:,} of {len(golds):,} questions are no longer in the files of its tests"
    return questions, (note,) if changed else ()


def _read_config(folder: Path) -> EvaluationConfig | None:
    described: Any = (read_mapping(folder / REPORT) or {}).get("config")
    if not isinstance(described, Mapping) and (run := folder.parent / "config.yaml").is_file():
        described = yaml.safe_load(run.read_text(encoding="utf-8"))
    if not isinstance(described, Mapping) or not isinstance(described.get("evaluation"), Mapping):
        return None
    try:
        return StageEvaluationConfig.model_validate(described["evaluation"])
    except ValidationError:
        return None
