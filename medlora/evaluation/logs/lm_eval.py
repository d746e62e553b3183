"""Files of lm-evaluation-harness -> logs: `samples_TASK_DATE.jsonl`, and the sums of `results_DATE.json`."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medlora.data.rows.conversion import to_record
from medlora.data.rows.schemas import find_schema
from medlora.errors import InputError
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.evaluation.logs.log import Log, Total
from medlora.evaluation.predictions import Prediction
from medlora.records import LETTERS, McqRecord, RecordError

_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>[^_]+)\.jsonl")
_RESULTS = re.compile(r"results_(?P<date>[^_]+)\.json")
_METRICS = ("acc", "exact_match", "acc_norm", "f1")
_IDS = ("id", "question_id", "qid")


def find_files(folder: Path) -> list[Path]:
    """The samples of each task in a folder and below it, the latest of each; its results where there are no samples."""
    found: dict[tuple[Path, str], Path] = {}
    for path in sorted(folder.rglob("samples_*.jsonl"), key=_get_date):
        if match := _SAMPLES.fullmatch(path.name):
            found[path.parent, match["task"]] = path
    results = sorted(folder.rglob("results_*.json"), key=_get_date)
    return list(found.values()) or results[-1:]


def _get_date(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def read_samples(path: Path, reparse: bool = False) -> Log:
    """One task's answers as a log; the test is named by the task, the stage by the folder, as lm-eval names it.

    The letter counts as right where the file's own metric says so. `reparse` reads generated answers anew.
    Raises InputError where a line is no sample of a multiple-choice task.
    """
    match = _SAMPLES.fullmatch(path.name)
    task = match["task"] if match else path.stem
    rows, repeated = _pick_filter(path, list(_read_lines(path)))
    by_index = _count_agreement(rows, by_index=True) >= _count_agreement(rows, by_index=False)
    reader = _Reader(path, task, by_index, reparse)
    predictions: list[Prediction] = []
    questions: dict[tuple[str, str], McqRecord] = {}
    taken: Counter[str] = Counter()
    for place, row in rows:
        prediction, record = reader.read(place, row)
        taken[prediction.id] += 1
        if taken[prediction.id] > 1:
            prediction = replace(prediction, id=f"{prediction.id}#{taken[prediction.id]}")
        predictions.append(prediction)
        if record is not None:
            questions[task, prediction.id] = record
    notes = [f"{path.name}: {n:,} {what}" for what, n in reader.odd.items()]
    notes += [f"{path.name}: {repeated}"] if repeated else []
    return Log(path.parent.name if match else path.stem, tuple(predictions), questions, tuple(notes))


def read_results(path: Path) -> Log:
    """The sums of every task of a results file, for a table; without samples nothing can be paired."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise InputError(f"{path}: no key `results`; a results file of lm-evaluation-harness has one")
    totals = []
    for task, figures in content["results"].items():
        total = _find_count(content, task)
        found = _find_metric(figures)
        if found and total and task not in content.get("groups", {}):
            totals.append(Total(str(task), found[0], round(found[1] * total), total))
    if not totals:
        raise InputError(
            f"{path}: no task with {', '.join(_METRICS)} and its number of questions (`n-samples`); "
            "give the samples_*.jsonl that lm_eval --log_samples writes"
        )
    name = str(content.get("model_name") or path.parent.name).rstrip("/").rpartition("/")[2] or path.stem
    return Log(name, (), totals=tuple(totals))


def find_samples(path: Path) -> list[Path]:
    """The samples that were written together with a results file."""
    match = _RESULTS.fullmatch(path.name)
    return sorted(path.parent.glob(f"samples_*_{match['date']}.jsonl")) if match else []


def _find_metric(figures: object) -> tuple[str, float] | None:
    if not isinstance(figures, Mapping):
        return None
    for metric in _METRICS[:3]:
        for key, value in figures.items():
            if str(key).partition(",")[0] == metric and isinstance(value, int | float) and 0 <= value <= 1:
                return metric, float(value)
    return None


def _find_count(content: Mapping[str, object], task: str) -> int:
    counted = content.get("n-samples")
    counts = counted.get(task) if isinstance(counted, Mapping) else None
    if not isinstance(counts, Mapping):
        return 0
    found = counts.get("effective") or counts.get("original") or 0
    return found if isinstance(found, int) and found > 0 else 0


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("doc"), dict) or "target" not in row:
                    raise InputError(f"{path}:{number}: no sample of lm-evaluation-harness: it needs doc and target")
                yield f"{path}:{number}", row
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable file of JSON lines: {error}") from error


def _pick_filter(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """The rows of one filter: a task with several has a line for each; the last one is the strictest reading."""
    if not rows:
        raise InputError(f"{path}: no samples in it")
    names = list(dict.fromkeys(str(row.get("filter", "none")) for _, row in rows))
    if len(names) == 1:
        return rows, ""
    chosen = next((name for name in names if "extract" in name or "strict" in name), names[-1])
    kept = [(place, row) for place, row in rows if str(row.get("filter", "none")) == chosen]
    return kept, f"filters {', '.join(names)}; filter {chosen} was taken"


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-likelihoods of the options and the texts of the options, of a multiple-choice sample."""

    values: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def best(self) -> int:
        return max(range(len(self.values)), key=self.values.__getitem__)


def _get_scores(row: Mapping[str, Any]) -> _Scores | None:
    """None for a sample with generated text."""
    values: list[float] = []
    for found in row.get("filtered_resps") or ():
        first = found[0] if isinstance(found, list) and len(found) == 2 else None
        try:
            values.append(float(first))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return None
    return _Scores(tuple(values), tuple(text.strip() for text in _get_continuations(row)))


def _get_continuations(row: Mapping[str, Any]) -> list[str]:
    given = row.get("arguments")
    parts = list(given.values()) if isinstance(given, dict) else given if isinstance(given, list) else []
    pairs = [list(part.values()) if isinstance(part, dict) else part for part in parts]
    return [str(pair[1]) for pair in pairs if isinstance(pair, list) and len(pair) > 1]


def _place_of(target: object, texts: Sequence[str], by_index: bool) -> int | None:
    """The place of the right option: `target` as its number, or as its text."""
    text = str(target).strip()
    if by_index and re.fullmatch(r"\d{1,2}", text):
        return int(text)
    return texts.index(text) if text in texts else None


def _count_agreement(rows: Sequence[tuple[str, Mapping[str, Any]]], by_index: bool) -> int:
    """How many rows' own `acc` agrees with one way of reading `target`: as text, both are written alike."""
    agreeing = 0
    for _, row in rows:
        if scores := _get_scores(row):
            right = scores.best == _place_of(row["target"], scores.texts, by_index)
            agreeing += right == (row.get("acc") == 1)
    return agreeing


class _Reader:
    """Makes predictions of samples, and counts what is odd about them."""

    def __init__(self, path: Path, task: str, by_index: bool, reparse: bool) -> None:
        self.path, self.task, self.by_index, self.reparse = path, task, by_index, reparse
        self.odd: Counter[str] = Counter()

    def read(self, place: str, row: Mapping[str, Any]) -> tuple[Prediction, McqRecord | None]:
        doc, scores = row["doc"], _get_scores(row)
        identity = next(
            (str(doc[key]) for key in _IDS if doc.get(key) not in (None, "")), str(row.get("doc_id", place))
        )
        record = _make_record(doc, identity)
        gold = self._find_gold(place, row, scores, record)
        options = len(record.options) if record else len(scores.values) if scores else 0
        subject = record.subject if record else ""
        base = Prediction(identity, self.task, "", gold, None, subject, options=options)
        if scores:
            return self._judge_scores(base, scores), record
        return self._judge_text(base, row, LETTERS[: options or 5]), record

    def _find_gold(self, place: str, row: Mapping[str, Any], scores: _Scores | None, record: McqRecord | None) -> str:
        target = row["target"]
        if scores:
            at = _place_of(target, scores.texts, self.by_index)
            if at is None or at >= len(scores.values):
                raise InputError(f"{place}: target {target!r} is none of the {len(scores.values)} options")
            return LETTERS[at]
        text = str(target).strip()
        if text.startswith("[") and text.endswith("]"):
            text = _unpack(text)
        letter = text.strip("() .").upper()
        if len(letter) == 1 and letter in LETTERS:
            return letter
        if record is not None:
            return record.answer
        raise InputError(
            f"{place}: target {text!r} is no letter of an option, and its doc is no question that can be read"
        )

    def _judge_scores(self, base: Prediction, scores: _Scores) -> Prediction:
        top = max(scores.values)
        weights = [math.exp(value - top) for value in scores.values]
        probabilities = tuple(weight / sum(weights) for weight in weights)
        ordered = sorted(probabilities, reverse=True)
        return replace(base, choice=LETTERS[scores.best], probabilities=probabilities, margin=ordered[0] - ordered[1])

    def _judge_text(self, base: Prediction, row: Mapping[str, Any], letters: str) -> Prediction:
        raw, filtered = _first_text(row.get("resps")), _first_text(row.get("filtered_resps"))
        right = next((row[name] == 1 for name in _METRICS if name in row), None)
        read = extract_answer_letter(raw if self.reparse else filtered, letters)
        choice = read
        if right is not None and not self.reparse:
            choice = base.gold if right else None if read == base.gold else read
            if right != (read == base.gold):
                self.odd["answers that medlora reads differently; the file's own metric was taken"] += 1
        return replace(base, choice=choice, text=raw or filtered)


def _make_record(doc: Mapping[str, object], identity: str) -> McqRecord | None:
    """The question of a document, where its columns are ones that medlora knows."""
    schema = find_schema([doc], "mcq")
    if schema is None:
        return None
    try:
        record, _ = to_record(doc, schema, identity)
    except (RecordError, KeyError, TypeError):
        return None
    return record if isinstance(record, McqRecord) else None


def _unpack(text: str) -> str:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return str(values[0]) if values else text


def _first_text(found: object) -> str:
    while isinstance(found, list):
        found = found[0] if found else ""
    return "" if found is None else str(found)
