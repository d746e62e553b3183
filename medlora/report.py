"""Predictions -> what is written and shown of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medlora import scores
from medlora.records import Prediction


def summarise(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One row a stage and test: accuracy with its Wilson 95 % interval, n, what failed, accuracy by subject."""
    rows = []
    groups: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault((prediction.stage, prediction.test), []).append(prediction)
    for (stage, test), group in groups.items():
        accuracy = scores.accuracy(group)
        rows.append(
            {
                "stage": stage,
                "test": test,
                "accuracy": accuracy.value,
                "interval": [accuracy.low, accuracy.high],
                "n": accuracy.total,
                "correct": accuracy.correct,
                "unparsed": accuracy.unparsed,
                "failed": accuracy.failed,
                "chance": scores.chance(group),
                "subjects": {name: asdict(part) for name, part in scores.breakdown(group, by="subject").groups.items()},
            }
        )
    return rows


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """A parquet file with one row a question and stage."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(prediction) for prediction in predictions]), path)
