"""How far a job is: the events that workers and drivers report.

An event is a plain dict, since it crosses processes. Its key `event` names its kind, and the kind decides which other keys it has.
Make one with the function of its kind. No reader decides by the wording of a text: what it needs to know is a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypedDict

NoteKind = Literal["run", "training", "data", "actor", "weights"]
"""What a note is about: the run, the progress of one training, what is in the data, an actor that is ready, or the weights
that it computes with where they are not those of the config."""


class Note(TypedDict):
    """A line for people."""

    event: Literal["note"]
    phase: str
    text: str
    kind: NoteKind


class PlannedPhase(TypedDict):
    """What a plan counts of a phase that is left; None where it cannot be known. `seconds` is by rates of earlier runs."""

    name: str
    steps: int | None
    full_steps: int
    tokens: int | None
    seconds: float | None


class Planned(TypedDict):
    """The work that a run has left. `evaluation_s` is by rates of earlier runs, None where there is none."""

    event: Literal["planned"]
    phases: list[PlannedPhase]
    evaluates: bool
    evaluation_s: float | None


class PhaseStarted(TypedDict):
    """A phase, or the evaluation, has its workers and begins."""

    event: Literal["phase"]
    phase: str
    device: str


class Building(TypedDict):
    """The miniature base is being trained: `step` of `total`."""

    event: Literal["build"]
    phase: str
    what: str
    step: int
    total: int
    loss: float
    letters: float


class Preparing(TypedDict):
    """`done` of `total` records are tokens."""

    event: Literal["preparing"]
    phase: str
    done: int
    total: int


class Training(TypedDict):
    """The first step of a segment begins."""

    event: Literal["training"]
    phase: str
    segment: str


class Step(TypedDict):
    """Optimiser steps are done; the figures are those of metrics.jsonl."""

    event: Literal["step"]
    phase: str
    segment: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    peak_memory_mib: float


class _Validated(TypedDict):
    event: Literal["validation"]
    phase: str
    segment: str
    step: int
    score: float
    seconds: float


class Validation(_Validated, total=False):
    """The dev sample was scored; which scores there are depends on its records."""

    best: bool
    questions: int
    accuracy: float
    format_score: float
    perplexity: float
    token_f1: float


class Finished(TypedDict):
    """A phase or the evaluation is finished; `around_s` went into starting and ending its workers."""

    event: Literal["finished"]
    phase: str
    seconds: float
    around_s: float


class Reused(TypedDict):
    """A phase was finished before and is reused."""

    event: Literal["reused"]
    phase: str


class ClusterFound(TypedDict):
    """The driver is connected to a cluster."""

    event: Literal["cluster"]
    text: str
    started_here: bool
    seconds: float


class Evaluating(TypedDict):
    """`total` questions are asked; `known` of them are answered already."""

    event: Literal["evaluating"]
    total: int
    known: int


class Answered(TypedDict):
    """An actor has answered so many questions."""

    event: Literal["evaluation"]
    questions: int
    seconds: float


class Loading(TypedDict):
    """An actor loads its model."""

    event: Literal["loading"]


class Ready(TypedDict):
    """An actor has its model; `weights` says what it computes with where that is not what the config names."""

    event: Literal["ready"]
    host: str
    weights: str


class Refused(TypedDict):
    """Something that only the user can fix: the text of an InputError."""

    event: Literal["refused"]
    text: str


class Leaving(TypedDict):
    """A worker saved a checkpoint and leaves; `why` is empty where its driver asked for it."""

    event: Literal["leaving"]
    why: str
    rank: int


class Failure(TypedDict):
    """An exception as text: what a message and a log need."""

    text: str
    host: str
    at: str
    traceback: str


class Failed(Failure):
    """A worker's own exception."""

    event: Literal["failed"]
    rank: int


class WatchedProcess(TypedDict):
    """A process that is watched, and how it is found on its node."""

    event: Literal["beat"]
    who: str
    pid: int
    created: float
    node: str
    host: str
    stacks: str


class Beat(WatchedProcess):
    """A process is alive: what it works at, and how often that has changed."""

    count: int
    doing: str
    slow: bool
    thread: tuple[str, int, int]


class Search(TypedDict):
    """A sweep begins to try, so many trials at a time."""

    event: Literal["search"]
    concurrency: int


class Searched(TypedDict):
    """All trials of a sweep have ended."""

    event: Literal["searched"]


class TrialChanged(TypedDict):
    """The ledger has something new of a trial."""

    event: Literal["trial"]
    trial: str


class TrialStep(TypedDict):
    """Optimiser steps of a trial are done."""

    event: Literal["trial-step"]
    trial: str
    phase: str
    segment: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    peak_memory_mib: float


class TrialNote(TypedDict):
    """A line for people about a trial."""

    event: Literal["trial-note"]
    trial: str
    text: str


class TrialSeconds(TypedDict):
    """What the seconds of a trial's process were spent on."""

    event: Literal["trial-seconds"]
    trial: str
    seconds: dict[str, float]


Event = (
    Note
    | Planned
    | PhaseStarted
    | Building
    | Preparing
    | Training
    | Step
    | Validation
    | Finished
    | Reused
    | ClusterFound
    | Evaluating
    | Answered
    | Loading
    | Ready
    | Refused
    | Leaving
    | Failed
    | Beat
    | Search
    | Searched
    | TrialChanged
    | TrialStep
    | TrialNote
    | TrialSeconds
)

OnEvent = Callable[[Event], None]
"""Takes an event when it happens."""


def note(phase: str, text: str, kind: NoteKind = "run") -> Note:
    """A line for people about a phase or another part of a run."""
    return {"event": "note", "phase": phase, "text": text, "kind": kind}


def planned(phases: list[PlannedPhase], evaluates: bool, evaluation_s: float | None) -> Planned:
    """A run begins that has this left to do."""
    return {"event": "planned", "phases": phases, "evaluates": evaluates, "evaluation_s": evaluation_s}


def phase_started(phase: str, device: str) -> PhaseStarted:
    """A phase begins on a device."""
    return {"event": "phase", "phase": phase, "device": device}


def building(phase: str, progress: Mapping[str, object]) -> Building:
    """What `model.miniature_base.build` reports, as an event of a phase."""
    return {"event": "build", "phase": phase, **progress}  # type: ignore[typeddict-item]


def preparing(phase: str, done: int, total: int) -> Preparing:
    """Records are made into tokens."""
    return {"event": "preparing", "phase": phase, "done": done, "total": total}


def training(phase: str, segment: str) -> Training:
    """A segment's first step begins."""
    return {"event": "training", "phase": phase, "segment": segment}


def step(phase: str, row: Mapping[str, object]) -> Step:
    """A row of metrics.jsonl as an event."""
    return {"event": "step", "phase": phase, **row}  # type: ignore[typeddict-item]


def validation(phase: str, row: Mapping[str, object], seconds: float) -> Validation:
    """A row of validation.jsonl as an event."""
    return {"event": "validation", "phase": phase, **row, "seconds": seconds}  # type: ignore[typeddict-item]


def finished(phase: str, seconds: float, around_s: float = 0.0) -> Finished:
    """A phase or the evaluation is finished."""
    return {"event": "finished", "phase": phase, "seconds": seconds, "around_s": around_s}


def reused(phase: str) -> Reused:
    """A finished phase is reused."""
    return {"event": "reused", "phase": phase}


def cluster_found(text: str, started_here: bool, seconds: float) -> ClusterFound:
    """The driver is connected to a cluster."""
    return {"event": "cluster", "text": text, "started_here": started_here, "seconds": seconds}


def evaluating(total: int, known: int) -> Evaluating:
    """An evaluation begins to ask."""
    return {"event": "evaluating", "total": total, "known": known}


def answered(questions: int, seconds: float) -> Answered:
    """A batch of questions is answered."""
    return {"event": "evaluation", "questions": questions, "seconds": seconds}


def loading() -> Loading:
    """An actor begins to load its model."""
    return {"event": "loading"}


def ready(host: str, weights: str = "") -> Ready:
    """An actor has loaded its model."""
    return {"event": "ready", "host": host, "weights": weights}


def refused(text: str) -> Refused:
    """The work cannot continue until the user fixes something."""
    return {"event": "refused", "text": text}


def leaving(why: str, rank: int) -> Leaving:
    """A worker leaves with its node, or with its driver."""
    return {"event": "leaving", "why": why, "rank": rank}


def failed(rank: int, described: Failure) -> Failed:
    """A worker's exception, as `on_ray.workers.failures.describe_exception` gives it."""
    return {"event": "failed", "rank": rank, **described}


def search(concurrency: int) -> Search:
    """A sweep's search begins."""
    return {"event": "search", "concurrency": concurrency}


def searched() -> Searched:
    """A sweep's search has ended."""
    return {"event": "searched"}


def trial_changed(trial: str) -> TrialChanged:
    """The ledger has something new of a trial."""
    return {"event": "trial", "trial": trial}


def trial_step(trial: str, step: Step) -> TrialStep:
    """A step of a trial's phase, as an event of the sweep."""
    return {**step, "event": "trial-step", "trial": trial}


def trial_note(trial: str, text: str) -> TrialNote:
    """A line for people about a trial."""
    return {"event": "trial-note", "trial": trial, "text": text}


def trial_seconds(trial: str, seconds: dict[str, float]) -> TrialSeconds:
    """What a trial's seconds were spent on."""
    return {"event": "trial-seconds", "trial": trial, "seconds": seconds}
