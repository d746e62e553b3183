"""Predictions -> the files of lm-evaluation-harness: `results_DATE.json` and `samples_TASK_DATE.jsonl` for each stage."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from medlora import __version__
from medlora.evaluation.predictions import Prediction
from medlora.records import LETTERS, McqRecord
from medlora.runs.files import write_bytes, write_json


def write_lm_eval(
    folder: Path,
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]],
    created: datetime,
) -> list[Path]:
    """Write a folder for each stage, with the names and keys that lm-eval's own files have; returns the folders."""
    folders = []
    date = created.isoformat(timespec="microseconds").replace(":", "-")
    records = {(test, record.id): record for test, inside in questions.items() for record in inside}
    for stage in dict.fromkeys(p.stage for p in predictions):
        place = folder / re.sub(r"[\"<>:/|\\?*\[\]\s\x00-\x1f]+", "__", stage).strip(".")
        place.mkdir(parents=True)
        tests: dict[str, list[Prediction]] = {}
        for p in predictions:
            if p.stage == stage:
                tests.setdefault(_name_task(p.test), []).append(p)
        samples = {
            task: [_make_sample(i, p, records.get((p.test, p.id))) for i, p in enumerate(group)]
            for task, group in tests.items()
        }
        for task, rows in samples.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            write_bytes(place / f"samples_{task}_{date}.jsonl", ("\n".join(lines) + "\n").encode("utf-8", "replace"))
        write_json(place / f"results_{date}.json", _make_results(stage, tests, samples, created))
        folders.append(place)
    return folders


def _name_task(test: str) -> str:
    return re.sub(r"\W", "_", test) or "test"


def _make_sample(number: int, p: Prediction, record: McqRecord | None) -> dict[str, Any]:
    letters = LETTERS[: p.options or len(p.probabilities) or 5]
    doc: dict[str, Any] = {"id": p.id, "subject": p.subject, "answer": p.gold}
    if record is not None:
        doc |= {"question": record.question, "options": list(record.options)}
    resps: list[object]
    filtered: list[object]
    by_likelihood = bool(p.probabilities) and p.choice is not None
    prompt = record.question if record is not None else ""
    if by_likelihood:
        scores = [math.log(max(share, 1e-300)) for share in p.probabilities]
        filtered = [[str(value), str(letter == p.choice)] for value, letter in zip(scores, letters, strict=False)]
        resps = [[pair] for pair in filtered]
        arguments = {f"gen_args_{i}": {"arg_0": prompt, "arg_1": f" {letter}"} for i, letter in enumerate(letters)}
        target, metric = str(LETTERS.index(p.gold)), "acc"
    else:
        resps, filtered = [[p.text]], [p.choice or "[invalid]"]
        arguments = {"gen_args_0": {"arg_0": prompt, "arg_1": "{}"}}
        target, metric = p.gold, "exact_match"
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": arguments,
        "resps": resps,
        "filtered_resps": filtered,
        "filter": "none",
        "metrics": [metric],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        metric: float(p.correct),
    }


def _make_results(
    stage: str,
    tests: Mapping[str, Sequence[Prediction]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    created: datetime,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for task, group in tests.items():
        n, share = len(group), sum(p.correct for p in group) / len(group)
        error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else "N/A"
        names = dict.fromkeys(str(row["metrics"][0]) for row in samples[task])
        metric = "acc" if list(names) == ["acc"] else "exact_match"
        results[task] = {"alias": task, f"{metric},none": share, f"{metric}_stderr,none": error}
    metrics = {
        task: next(key for key in found if key.endswith(",none")).partition(",")[0] for task, found in results.items()
    }
    seconds = created.timestamp()
    return {
        "results": results,
        "group_subtasks": {task: [] for task in tests},
        "configs": {
            task: {
                "task": task,
                "dataset_path": "medlora",
                "output_type": "multiple_choice" if metrics[task] == "acc" else "generate_until",
                "metric_list": [{"metric": metrics[task], "aggregation": "mean", "higher_is_better": True}],
                "num_fewshot": 0,
                "metadata": {"version": 0.0},
            }
            for task in tests
        },
        "versions": {task: 0.0 for task in tests},
        "n-shot": {task: 0 for task in tests},
        "higher_is_better": {task: {metrics[task]: True} for task in tests},
        "n-samples": {task: {"original": len(group), "effective": len(group)} for task, group in tests.items()},
        "config": {"model": "medlora", "model_args": f"pretrained={stage}", "batch_size": None, "limit": None},
        "git_hash": None,
        "date": seconds,
        "medlora_version": __version__,
        "task_hashes": {
            task: _hash("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
            for task, rows in samples.items()
        },
        "model_source": "medlora",
        "model_name": stage,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", stage),
        "start_time": seconds,
        "end_time": seconds,
        "total_evaluation_time_seconds": "0.0",
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
