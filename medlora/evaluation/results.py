"""Results as pandas frames: what a run, an evaluation or a sweep has written, with the questions' texts where they are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from medlora.config.sources import TestConfig
from medlora.data.sources import hash_records, scan, stream
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, PREDICTIONS, REPORT
from medlora.evaluation.stages import find_run
from medlora.records import McqRecord
from medlora.runs import mirror
from medlora.runs.files import read_json_lines, read_mapping
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import MANIFEST

if TYPE_CHECKING:
    from pandas import DataFrame

_TRIALS = "trials.parquet"
_PHASE = ("phase", "run", "seed", "device", "adapter_hash", "base_weights")


@dataclass(frozen=True)
class Results:
    """Frames of a folder; what it does not have is an empty frame."""

    predictions: DataFrame
    """A row a stage, test and question: letters, probabilities, the text that was written, and `correct`. `question` and
    `option_texts` are None where the test's source is not here, or not as it was when it was asked."""
    phases: DataFrame
    """A row a finished phase: chain, steps, seconds, last loss, device, hash of its adapter."""
    metrics: DataFrame
    """A row a logged step of a phase: loss, learning rate, gradient norm, tokens per second, peak memory."""
    validation: DataFrame
    """A row a validation of a phase."""
    trials: DataFrame
    """A row a trial of a sweep."""


def load_results(folder: str | Path) -> Results:
    """The results in the folder (or `s3://` / `gs://` URI) of a run, an evaluation, a comparison or a sweep.

    Raises InputError where the folder holds none of these, or pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise InputError("load_results needs pandas: pip install pandas") from None
    root = find_run(str(folder), None)
    mirror.pull(root, exclude=("checkpoints", "best", "scoring", ".replaced"))
    run = RunFolder(root)
    scored = run.evaluation if (run.evaluation / PREDICTIONS).is_file() else root
    phases = sorted(path for path in (root / "phases").glob("*") if path.is_dir())
    known = [scored / PREDICTIONS, root / _TRIALS, run.about]
    if not phases and not any(path.is_file() for path in known):
        raise InputError(f"{folder}: is no folder of a run, an evaluation or a sweep")
    return Results(
        predictions=_read_predictions(scored),
        phases=DataFrame([row for path in phases if (row := _describe_phase(path)) is not None]),
        metrics=DataFrame(list(_read_lines(phases, "metrics.jsonl"))),
        validation=DataFrame(list(_read_lines(phases, "validation.jsonl"))),
        trials=_read_table(root / _TRIALS),
    )


def _read_table(path: Path) -> DataFrame:
    import pandas

    return pandas.read_parquet(path) if path.is_file() else pandas.DataFrame()


def _read_predictions(folder: Path) -> DataFrame:
    """The predictions of an evaluation with the texts of their questions."""
    table = _read_table(folder / PREDICTIONS)
    if not len(table):
        return table
    texts = _find_questions(folder)
    keys = list(zip(table["test"], table["id"], strict=True))
    found = [texts.get(key) for key in keys]
    table["correct"] = table["choice"] == table["gold"]
    table["question"] = [record.question if record else None for record in found]
    table["option_texts"] = [list(record.options) if record else None for record in found]
    return table


def _find_questions(folder: Path) -> dict[tuple[str, str], McqRecord]:
    """The questions of an evaluation by test and id, from those sources that still hold what was asked."""
    report, fingerprint = read_mapping(folder / REPORT) or {}, read_mapping(folder / FINGERPRINT) or {}
    if not fingerprint:
        fingerprint = (read_mapping(folder / MANIFEST) or {}).get("fingerprint") or {}
    config = report.get("config") or {}
    hashes: Mapping[str, str] = fingerprint.get("tests") or {}
    found: dict[tuple[str, str], McqRecord] = {}
    for plain in (config.get("evaluation") or {}).get("tests") or []:
        try:
            test = TestConfig.model_validate(plain)
            scan(test)
        except (ValidationError, InputError):
            continue  # of another version, or not on this machine: its texts are not known
        records = [record for record in stream(test) if isinstance(record, McqRecord)]
        if hash_records(records) == hashes.get(test.name):
            found |= {(test.name, record.id): record for record in records}
    return found


def _describe_phase(path: Path) -> dict[str, object] | None:
    """A phase's row; None where it is not finished."""
    manifest = read_mapping(path / MANIFEST)
    if manifest is None:
        return None
    segments = manifest.get("segments") or []
    return {
        **{name: manifest.get(name) for name in _PHASE},
        "chain": " + ".join(manifest.get("chain") or []),
        "steps": sum(segment.get("steps") or 0 for segment in segments),
        "last_loss": segments[-1].get("last_loss") if segments else None,
        "train_s": sum(segment.get("train_s") or 0.0 for segment in segments),
        "seconds": (manifest.get("seconds") or {}).get("all"),
    }


def _read_lines(phases: list[Path], name: str) -> Iterator[dict[str, object]]:
    for path in phases:
        yield from ({"phase": path.name, **row} for row in read_json_lines(path / name))
