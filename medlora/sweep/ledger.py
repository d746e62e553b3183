"""What a sweep has done so far: its trials, every score of each and how it ended, in one file of JSON lines.

The file is all that a killed sweep resumes from. No pickle is read; the sampler and the scheduler are given its trials
and scores again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from medlora.runs.files import append_json, cut_json_lines

FINGERPRINT, LEDGER, REPORT, TABLE, PAGE, BEST = (
    "fingerprint.json",
    "trials.jsonl",
    "sweep.json",
    "trials.parquet",
    "sweep.html",
    "best.yaml",
)
"""Files of a sweep's folder."""


State = Literal["running", "finished", "stopped", "failed", "invalid"]
"""`stopped` by the scheduler, `failed` by a loss that is no number or a process that died again and again, `invalid`
where the values together make no valid config."""


START = "000"
"""The trial of the unchanged config."""


@dataclass
class Trial:
    """One trial: its values, its scores by step, its end."""

    id: str
    params: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    """Of a population: member, generation, parent."""
    state: State = "running"
    reports: list[dict[str, float]] = field(default_factory=list)
    """`step` and `score`, in order."""
    why: str = ""
    """Of a failed trial."""
    seconds: float = 0.0
    """In which it held a slot and ran."""
    deaths: int = 0
    """How often its process died."""
    since: float | None = None

    @property
    def score(self) -> float | None:
        """The last score, or None before the first."""
        return self.reports[-1]["score"] if self.reports else None

    @property
    def step(self) -> int:
        """The step of the last score."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state != "running"


class Ledger:
    """The trials of a sweep by id, each change appended to the file as it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: dict[str, Trial] = {}
        self.damage = cut_json_lines(path, self._accept)
        """What was wrong with a line, at which the file was cut: what came after it is done again."""
        for trial in self.trials.values():
            trial.since = None  # what ran when the sweep was killed ran until its last report

    def begin(self, params: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Trial:
        """A new trial, named by its number."""
        id = f"{len(self.trials):03}"
        self._write(
            {"event": "begun", "trial": id, "params": dict(params), **({"about": dict(about)} if about else {})}
        )
        return self.trials[id]

    def run(self, id: str) -> None:
        """The trial's process has begun to work at it."""
        self._write({"event": "running", "trial": id})

    def add_score(self, id: str, step: int, score: float, stop: bool) -> bool:
        """A score, and whether it ends the trial: both in one line, so that a kill cannot part them.

        False where the score is not new: a trial that resumes from a checkpoint scores steps again, and the first score
        counts.
        """
        new = step > self.trials[id].step
        if new:
            self._write({"event": "score", "trial": id, "step": step, "score": score, "stop": stop})
        return new

    def die(self, id: str) -> None:
        """The trial's process died."""
        self._write({"event": "died", "trial": id})

    def end(self, id: str, state: State, why: str = "") -> None:
        """The trial is over."""
        self._write({"event": "ended", "trial": id, "state": state, "why": why})

    def select(self, *states: State) -> list[Trial]:
        """The trials in one of the states, in the order of their numbers."""
        return [trial for trial in self.trials.values() if trial.state in states]

    def rank(self) -> list[Trial]:
        """Finished trials, the best last score first, the earlier of equal ones first: these have an adapter."""
        return sorted(self.select("finished"), key=lambda trial: (-(trial.score or 0.0), trial.id))

    def describe_progress(self) -> str:
        """What is saved, for whoever ended the sweep."""
        ended = sum(trial.ended for trial in self.trials.values())
        return f"{ended} of {len(self.trials)} trials are over; the same command resumes the others"

    def _write(self, line: dict[str, object]) -> None:
        line["time"] = round(time.time(), 3)
        append_json(self.path, line)
        self._take(line)

    def _accept(self, line: Mapping[str, object]) -> bool:
        """Take a line that makes sense after those before it; a damaged one of an older file, without checksum, may not."""
        known = line.get("trial") in self.trials
        number = isinstance(line.get("time"), int | float)
        right = {
            "begun": not known and isinstance(line.get("params"), dict) and isinstance(line.get("about", {}), dict),
            "running": known,
            "died": known,
            "score": known and all(isinstance(line.get(key), int | float) for key in ("step", "score", "stop")),
            "ended": known and line.get("state") in get_args(State) and isinstance(line.get("why"), str),
        }
        if not (number and isinstance(line.get("trial"), str) and right.get(str(line.get("event")), False)):
            return False
        self._take(line)
        return True

    def _take(self, line: Mapping[str, Any]) -> None:
        event, id, now = line["event"], line["trial"], line["time"]
        if event == "begun":
            self.trials[id] = Trial(id, line["params"], line.get("about", {}))
            return
        trial = self.trials[id]
        if trial.since is not None:
            trial.seconds += now - trial.since
        trial.since = now
        if event == "score":
            trial.reports.append({"step": line["step"], "score": line["score"]})
            if line["stop"]:
                trial.state, trial.since = "stopped", None
        elif event == "died":
            trial.deaths, trial.since = trial.deaths + 1, None
        elif event == "ended":
            trial.state, trial.why, trial.since = line["state"], line["why"], None
