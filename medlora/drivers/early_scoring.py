"""Stages scored while later phases train, on the resources that these leave free; the final evaluation reuses the answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from medlora import endings, events
from medlora.config.placement import ActorPlacement, Placement
from medlora.curriculum.chains import Link
from medlora.drivers.evaluation import ask_stages
from medlora.evaluation.ledger import FINGERPRINT, LEDGER, read_ledger
from medlora.evaluation.plan import EvaluationTask
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.statistics import accuracy
from medlora.events import Event
from medlora.on_ray.answer_questions import Actors, Build, make_builder
from medlora.on_ray.cluster import Cluster, Node
from medlora.on_ray.inbox import Inbox, listen
from medlora.on_ray.placement import count_gpus, count_room, find_free, is_group_waiting
from medlora.on_ray.workers.background import BackgroundTask
from medlora.runs import mirror
from medlora.runs.files import read_mapping, remove, write_with_checksum
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import find_differences

POLL_S = 1.0
GRACE_S = 4.0
"""How long a phase waits for resources before early scoring gives its own up: the phase before needs some time to end."""


class Task(Protocol):
    """What scores a stage in a process of its own: `on_ray.workers.background.BackgroundTask`, or a fake of it."""

    def has_ended(self) -> bool:
        """Whether it is over."""

    def find_failure(self) -> str | None:
        """Why it failed, where it did."""

    def cancel(self) -> None:
        """End it."""


@dataclass(frozen=True)
class _Scoring:
    """A stage that is scored now."""

    stage: str
    task: Task
    since: float


@dataclass(frozen=True)
class _Waiting:
    """A phase that waits for its workers."""

    placement: Placement
    gpus: float
    since: float


_ACTIVE: set[EarlyScoring] = set()
"""Of all runs of this driver, those that are scoring a stage now."""


class EarlyScoring:
    """Scores one stage after another in a process of its own, which may die without harm to the training.

    It begins where a phase has its workers and there is room beside them, node by node. It is cancelled when a phase of
    this driver lacks that room, or when the last phase is done. What was answered is in the stage's ledger.
    """

    def __init__(
        self,
        folder: Path,
        task: EvaluationTask,
        actors: Actors,
        build: Callable[[EvaluationTask, Actors], Build] = make_builder,
        start: Callable[..., Task] = BackgroundTask,
    ) -> None:
        self.folder, self.task, self.actors, self.build, self.start = folder, task, actors, build, start
        self.gpus = count_gpus(actors.placement, actors.cluster)
        self.stages: dict[str, EvaluationTask] = {}
        self.waiting: deque[str] = deque()
        self.scoring: _Scoring | None = None
        self.phase: _Waiting | None = None
        self.trains = False
        self.lock, self.ended = threading.Lock(), threading.Event()

    def add(self, stage: str, chain: Sequence[Link]) -> None:
        """Score a stage unless all its answers are there; answers of another stage of that name are removed."""
        folder, task = self.folder / stage, self.task.select(stage, chain)
        if find_differences(read_mapping(folder / FINGERPRINT), task.fingerprint):
            remove(folder)
        write_with_checksum(folder / FINGERPRINT, task.fingerprint)
        if len(read_ledger(folder / LEDGER, [stage])) < task.asked.count:
            with self.lock:
                self.stages[stage] = task
                self.waiting.append(stage)

    def phase_asks(self, placement: Placement, gpus: float) -> None:
        """A phase asks for its workers; until it has them no stage is begun."""
        with self.lock:
            self.phase, self.trains = _Waiting(placement, gpus, time.monotonic()), False

    def phase_has(self) -> None:
        """The phase has its workers."""
        with self.lock:
            self.phase, self.trains = None, True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Score while inside; at the end what is not answered yet is left to the final evaluation."""
        with listen(self.actors.on_event) as inbox:
            thread = threading.Thread(target=self._watch, args=(inbox,), name="medlora-early", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self.ended.set()
                if not endings.is_ending():  # then it ends with Ray
                    thread.join(timeout=60)
                    self._cancel()

    def _watch(self, inbox: Inbox) -> None:
        try:
            while not self.ended.wait(POLL_S):
                self._look(inbox)
        except Exception as error:  # the training continues
            self._note("evaluation", f"every stage is scored after the training: {error!r}")

    def _look(self, inbox: Inbox) -> None:
        with self.lock:
            phase, ready = self.phase, self.trains and self.waiting and not self.scoring
        if self.scoring:
            self._report_end()
        elif ready and (room := _count(self.actors.placement, self.gpus, find_free())):
            self._begin(min(room, self.actors.placement.workers), inbox)
        if phase and time.monotonic() - phase.since > GRACE_S and _ACTIVE and self._lacks_room(phase):
            for each in list(_ACTIVE):
                each._cancel()

    def _lacks_room(self, phase: _Waiting) -> bool:
        """Whether a phase waits for resources that the present nodes would have, were they free."""
        room = _count(phase.placement, phase.gpus, self.actors.cluster.there)
        return is_group_waiting() and room >= phase.placement.workers

    def _begin(self, workers: int, inbox: Inbox) -> None:
        stage = self.waiting.popleft()
        task = self.stages[stage]
        placement = self.actors.placement.model_copy(update={"workers": workers, "min_workers": None})
        build = self.build(task, replace(self.actors, placement=placement))
        begun = self.start(
            _score_alone,
            self.folder / stage,
            task,
            build,
            placement,
            self.actors.cluster,
            self.actors.log_file,
            inbox,
        )
        with self.lock:
            self.scoring = _Scoring(stage, begun, time.monotonic())
            _ACTIVE.add(self)

    def _report_end(self) -> None:
        """Report what became of the stage that was scored, once its task has ended."""
        with self.lock:
            if self.scoring is None or not self.scoring.task.has_ended():
                return
            ended, self.scoring = self.scoring, None
            _ACTIVE.discard(self)
        if (reason := ended.task.find_failure()) is not None:
            self._note(ended.stage, f"could not be scored beside the training, it is scored after it: {reason}")
            return
        answers = read_ledger(self.folder / ended.stage / LEDGER, [ended.stage])
        tests = self.task.asked.tests
        shown = [f"{test} {accuracy([p for p in answers if p.test == test]).value:.1%}" for test in tests]
        seconds = time.monotonic() - ended.since
        self._note(ended.stage, f"scored beside the training in {seconds:.0f} s: {', '.join(shown)}")

    def _cancel(self) -> None:
        """End what is scored now; it comes first when there is room again."""
        with self.lock:
            if self.scoring is None:
                return
            self.scoring.task.cancel()
            self.waiting.appendleft(self.scoring.stage)
            self.scoring = None
            _ACTIVE.discard(self)

    def _note(self, stage: str, text: str) -> None:
        self.actors.on_event(events.note(stage, text))


def take_over(folder: Path, stages: Mapping[str, Mapping[str, object]]) -> list[Prediction]:
    """What stages have answered early, by their names and fingerprints."""
    found: list[Prediction] = []
    for stage, fingerprint in stages.items():
        if not find_differences(read_mapping(folder / stage / FINGERPRINT), fingerprint):
            found += read_ledger(folder / stage / LEDGER, [stage])
    return found


def _count(placement: Placement, gpus: float, nodes: Sequence[Node]) -> int:
    return sum(count_room(placement, gpus, node) for node in nodes)


def _score_alone(
    folder: Path,
    task: EvaluationTask,
    build: Build,
    placement: ActorPlacement,
    cluster: Cluster,
    log_file: Path,
    inbox: Inbox,
) -> None:
    """What the task's process does. That of a killed driver may live on for seconds, and holds the lock so long."""
    (stage,) = task.stages

    def forward(event: Event) -> None:
        if event["event"] == "note" and event["kind"] != "actor":
            inbox.put({**event, "phase": stage})

    actors = Actors(placement, cluster, forward, log_file)
    with hold_file_lock(folder.with_name(f".{stage}.lock"), f"stage {stage} of {folder.parent}", wait_s=180):
        mirror.push(folder)  # answers from before an interruption may not be in the store yet
        mirror.pull(folder)
        ask_stages(task, folder, build, actors)
        mirror.push(folder)
