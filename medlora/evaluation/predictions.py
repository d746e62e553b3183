"""A prediction, and the files of single answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from medlora.errors import InputError


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one stage answered to one question.

    `choice` is None when no letter could be read (unparsed) or the question failed (`error` says why); either counts as
    wrong. `probabilities` are over the question's letters in order and sum to 1 where the scoring gives them, else ().
    `options` is how many options the question has, 0 where that is not known; `tokens` how many the model wrote.
    `format_score` is in [0, 1], None where no format was asked for. `rotated` holds the letters chosen when the options
    were moved 0, 1, 2, ... places to the front ("-": unparsed), empty where only one order was asked. `margin` is
    the best probability minus the next. `seconds` is the
    question's share of its batch's wall time; it differs from run to run, so it is no part of equality.
    """

    id: str
    test: str
    stage: str
    gold: str
    choice: str | None
    subject: str = ""
    probabilities: tuple[float, ...] = ()
    text: str = ""
    error: str = ""
    options: int = 0
    tokens: int = 0
    format_score: float | None = None
    rotated: str = ""
    margin: float | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def correct(self) -> bool:
        """Whether the choice is the gold letter."""
        return self.choice == self.gold


def write_predictions(path: Path, predictions: Sequence[Prediction], metadata: Mapping[str, str] | None = None) -> None:
    """A parquet file with one row a question and stage; its columns have the same types for any answers.

    Without `seconds`, so that the same answers are the same bytes. `metadata` says how they came about, where that was
    not the usual way.
    """
    import pyarrow
    import pyarrow.parquet

    types = {
        str: pyarrow.string(),
        str | None: pyarrow.string(),
        int: pyarrow.int64(),
        int | None: pyarrow.int64(),
        float: pyarrow.float64(),
        float | None: pyarrow.float64(),
        tuple[float, ...]: pyarrow.list_(pyarrow.float64()),
    }
    schema = pyarrow.schema(
        [(name, types[kind]) for name, kind in get_type_hints(Prediction).items() if name != "seconds"]
    )
    if metadata:
        schema = schema.with_metadata(dict(metadata))
    rows = [asdict(prediction) for prediction in predictions]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote; raises InputError for a file that is something else."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from error
    known = {each.name for each in fields(Prediction)}
    needed = {each.name for each in fields(Prediction) if each.default is MISSING and each.default_factory is MISSING}
    if not rows or not needed <= set(rows[0]):
        raise InputError(f"{path}: holds no predictions; it needs rows with {', '.join(sorted(needed))}")
    kept = [{name: value for name, value in row.items() if name in known} for row in rows]
    return [Prediction(**{**row, "probabilities": tuple(row.get("probabilities") or ())}) for row in kept]


def write_seconds(path: Path, predictions: Sequence[Prediction]) -> None:
    """A parquet file of what each answer took, beside `write_predictions`: stage, test, id, tokens written, seconds."""
    import pyarrow
    import pyarrow.parquet

    names = ("stage", "test", "id", "tokens", "seconds")
    columns = {name: [getattr(prediction, name) for prediction in predictions] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def sum_seconds(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Seconds that the actors spent on each stage's answers, together."""
    seconds: dict[str, float] = {}
    for prediction in predictions:
        seconds[prediction.stage] = seconds.get(prediction.stage, 0.0) + prediction.seconds
    return {stage: round(of_stage, 2) for stage, of_stage in seconds.items()}
