"""A stand-in for the model of an evaluation: answers by the question's text and breaks where the text says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from medlora.evaluation.predictions import Prediction
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
