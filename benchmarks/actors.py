"""Questions per second of one evaluation actor and of two, through Ray Data as a job runs them.

    python benchmarks/actors.py --data ../shared/data/kormedmcqa        # CPU, one thread an actor, some 3 minutes

The model, tokenizer and questions of evaluation.py, scored by letter, 0-shot. Rates count from the moment when every actor
has answered its first batch: before it, models load. Writes actors.json and actors.md beside this file; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluation import CPU_SHAPE, VOCABULARY, build_model, build_tokenizer, choose_evenly, describe_hardware

from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.config.placement import ActorPlacement
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.evaluation.ledger import Batch, plan_batches
from medlora.evaluation.plan import EvaluationTask
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.questions import Asked
from medlora.on_ray.answer_questions import Actors, answer_on_ray, make_builder
from medlora.on_ray.cluster import Cluster, connect
from medlora.prompts import render_mcq
from medlora.records import McqRecord
from medlora.runs.environment import get_versions


def read_questions(path: Path) -> list[McqRecord]:
    """The questions of a file."""
    return [record for record in read(SourceConfig(source=str(path))) if isinstance(record, McqRecord)]


def measure(
    base: BaseModelConfig, records: list[McqRecord], actors: int, batch_size: int, cluster: Cluster, folder: Path
) -> tuple[dict[str, Any], list[Prediction]]:
    """Ask all records of the base with so many actors: what it took, and the predictions in order of their ids."""
    config = EvaluationConfig.model_validate(
        {"tests": [{"name": "t", "source": "-"}], "style": "kormedmcqa", "batch_size": batch_size}
    )
    placement = ActorPlacement(workers=actors)
    task = EvaluationTask(base, 0, str(folder), {"base": ()}, config, Asked({"t": records}))
    where = Actors(placement, cluster, lambda event: None, folder / "log")
    build = make_builder(task, where)
    batches = plan_batches({"t": records}, batch_size, ["base"])
    # Longest first would put the longest before the clock starts: every batch gets its share of each length instead.
    ordered = [question for batch in batches for question in batch.questions]
    batches = [Batch(tuple(ordered[i :: len(batches)]), ("base",)) for i in range(len(batches))]
    began = time.monotonic()
    ends: list[tuple[float, int]] = []
    predictions: list[Prediction] = []
    for answered in answer_on_ray(batches, build, where):
        ends.append((time.monotonic(), len(answered)))
        predictions += answered
    started, counted = ends[actors - 1][0], sum(n for _, n in ends[actors:])
    running_s = ends[-1][0] - started
    row = {
        "actors": actors,
        "questions": counted,
        "seconds": round(running_s, 2),
        "questions_per_s": round(counted / running_s, 3),
        "seconds_to_first_answer": round(ends[0][0] - began, 2),
    }
    return row, sorted(predictions, key=lambda p: p.id)


def render(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The measurements as Markdown."""
    one = rows[0]["questions_per_s"]
    lines = ["# Evaluation: one actor, two actors", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| actors | questions | s | questions/s | times one actor | s to first answer | same choices as one |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['actors']} | {row['questions']} | {row['seconds']:.1f} | {row['questions_per_s']:.2f} | "
            f"{row['questions_per_s'] / one:.2f} | {row['seconds_to_first_answer']:.1f} | {row['same']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl of KorMedMCQA")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        test = (arguments.data / "test.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "test.jsonl").write_text("\n".join(choose_evenly(test, arguments.questions)), encoding="utf-8")
        records = read_questions(folder / "test.jsonl")
        examples = [render_mcq(record, "kormedmcqa") for record in read_questions(arguments.data / "train.jsonl")]
        tokenizer = build_tokenizer([example.prompt + example.completion for example in examples])
        build_model(CPU_SHAPE, tokenizer, "cpu", "none").save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        base = BaseModelConfig(model=str(folder / "base"), compute_dtype="float32")
        rows: list[dict[str, Any]] = []
        answered: list[list[Prediction]] = []
        with connect() as cluster:
            for actors in arguments.actors:
                row, predictions = measure(base, records, actors, arguments.batch_size, cluster, folder)
                answered.append(predictions)
                pairs = zip(predictions, answered[0], strict=True)
                rows.append({**row, "same": f"{sum(a.choice == b.choice for a, b in pairs)} of {len(records)}"})
                print(rows[-1], file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in get_versions().items())
    about = {
        "Date": date.today().isoformat(),
        "Command": " ".join(["python", *sys.argv]),
        "Hardware": f"{describe_hardware(False)} by each actor; load average {os.getloadavg()[0]:.1f} at the end",
        "Versions": versions,
        "Model": f"random, Gemma-3-270M shape: {VOCABULARY} tokens, {CPU_SHAPE}, float32",
        "Questions": f"KorMedMCQA test, {len(records)}, lengths spread as in the whole file; batches of {arguments.batch_size}",
    }
    report = render(about, rows)
    (arguments.out / "actors.md").write_text(report, encoding="utf-8")
    document = json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False)
    (arguments.out / "actors.json").write_text(document + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
