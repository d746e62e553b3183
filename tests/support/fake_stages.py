"""A stand-in for the model of an evaluation: answers by the question's text and breaks where the text says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.config.placement import ActorPlacement
from medlora.evaluation.ledger import PREDICTIONS, sort_predictions
from medlora.evaluation.plan import EvaluationTask
from medlora.evaluation.predictions import Prediction, write_predictions
from medlora.evaluation.questions import Asked
from medlora.records import McqRecord


class FakeStages:
    """Answers the first letter with stage "a" and the right one with "b"; `journal` notes every question asked."""

    def __init__(self, journal: str, pause_s: float = 0.0) -> None:
        self.journal, self.pause_s = Path(journal), pause_s
        self.note(f"load {os.getpid()}")

    def note(self, line: str) -> None:
        with self.journal.open("a") as file:
            file.write(line + "\n")

    def answer(self, tests: Sequence[str], records: Sequence[McqRecord], stages: Sequence[str]) -> list[Prediction]:
        time.sleep(self.pause_s)
        for record in records:
            self.note(f"ask {record.id} {os.getpid()}")
            if "raise" in record.question:
                raise ValueError("this question is too much")
            if "kill" in record.question:
                os.kill(os.getpid(), signal.SIGKILL)
        return [
            Prediction(
                r.id, test, stage, r.answer, r.answer if stage == "b" else "A", r.subject, options=len(r.options)
            )
            for stage in stages
            for test, r in zip(tests, records, strict=True)
        ]


def raise_while_loading(journal: str) -> FakeStages:
    """A model that cannot be loaded, for a reason that comes again."""
    FakeStages(journal)
    raise ValueError("no such layer")


def die_while_loading() -> FakeStages:
    """A model that the machine has no memory for."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


STAGES = {"a": [], "b": []}


def ask(n: int, special: dict[int, str] | None = None) -> list[McqRecord]:
    return [
        McqRecord(f"q{i}", (special or {}).get(i, "what?"), ("x", "y", "z"), "ABC"[i % 3], subject=f"s{i % 2}")
        for i in range(n)
    ]


def score(
    folder: Path,
    questions: list[McqRecord],
    cluster: Any,
    actors: int = 2,
    pause_s: float = 0.0,
    size: int = 4,
    min_actors: int | None = None,
    labels: dict[str, str] | None = None,
    known: Sequence[Prediction] = (),
) -> dict[str, Any]:
    from medlora.drivers.evaluation import score_stages
    from medlora.on_ray.answer_questions import Actors

    folder.mkdir(parents=True, exist_ok=True)
    build = partial(FakeStages, str(folder.parent / f"{folder.name}.journal"), pause_s)
    placement = ActorPlacement(workers=actors, min_workers=min_actors, label_selector=labels or {})
    where = Actors(placement, cluster, lambda event: None, folder / "run.log")
    return score_stages(make_task(questions, size), folder, build, where, {}, known)


def make_task(questions: list[McqRecord], size: int, stages: Sequence[str] = STAGES) -> EvaluationTask:
    """An evaluation of stages without adapters, whose answers a fake gives."""
    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "unused"}], "batch_size": size})
    base = BaseModelConfig(model="miniature")
    return EvaluationTask(base, 0, "unused", {stage: () for stage in stages}, config, Asked({"t": questions}))


def journal(folder: Path, what: str) -> list[list[str]]:
    lines = (folder.parent / f"{folder.name}.journal").read_text().splitlines()
    return [line.split() for line in lines if line.startswith(what)]


def answer_here(questions: list[McqRecord], folder: Path) -> bytes:
    """The predictions of both stages as bytes, without Ray: what every disturbed evaluation must equal."""
    tests = {"t": questions}
    answers = FakeStages(str(folder / "here.journal")).answer(["t"] * len(questions), questions, list(STAGES))
    write_predictions(folder / PREDICTIONS, sort_predictions(answers, list(STAGES), tests))
    return (folder / PREDICTIONS).read_bytes()
