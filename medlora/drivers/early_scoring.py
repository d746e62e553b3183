"""Finished stages scored while later phases train, on what these leave free; the last evaluation takes the answers over."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from medlora import endings, events
from medlora.config.evaluation import EvaluationConfig
from medlora.config.placement import ActorPlacement, Placement
from medlora.curriculum.chains import Link
from medlora.drivers.evaluation import ask_stages
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, LEDGER, read_ledger
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.questions import Asked
from medlora.evaluation.statistics import accuracy
from medlora.events import OnEvent
from medlora.on_ray.answer_questions import AnswersQuestions
from medlora.on_ray.cluster import Cluster, Node
from medlora.on_ray.inbox import beside_driver, listen
from medlora.on_ray.placement import count_gpus, count_room, find_free, is_group_waiting
from medlora.records import McqRecord
from medlora.runs import mirror
from medlora.runs.files import read_mapping, remove, write_sealed
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import find_differences

POLL_S = 1.0


GRACE_S = 4.0
"""How long a phase waits for a place before what is scored early gives its own up: the phase before needs some to end."""


Build = Callable[[str, Sequence[Link], ActorPlacement], Callable[[], AnswersQuestions]]
"""A stage's name, its chain and where it is scored -> what builds its model in an actor."""


@dataclass(frozen=True)
class _Stage:
    name: str
    chain: Sequence[Link]
    fingerprint: Mapping[str, Any]
    """What its answers depend on."""


_GOING: set[EarlyScoring] = set()
"""Of all runs of this driver, those that are scoring a stage now."""


class EarlyScoring:
    """One stage after another is scored in a process of its own, which may die without harm to the training.

    Nothing waits for it: it begins where a phase has its workers and there is room beside them, node by node, and ends
    when a phase of this driver lacks that room or the last phase is done. What was answered stands in the stage's ledger.
    """

    def __init__(
        self,
        folder: Path,
        config: EvaluationConfig,
        asked: Asked,
        describe: Callable[[str, Sequence[Link]], Mapping[str, Any]],
        build: Build,
        placement: ActorPlacement,
        cluster: Cluster,
        on_event: OnEvent,
        log_file: Path,
    ) -> None:
        self.folder, self.config, self.asked, self.describe, self.build = folder, config, asked, describe, build
        self.placement, self.cluster, self.on_event, self.log_file = placement, cluster, on_event, log_file
        self.gpus = count_gpus(placement, cluster)
        self.waiting: deque[_Stage] = deque()
        self.going: tuple[_Stage, Any, float] | None = None
        """The stage that is scored now, the task that does it, and since when."""
        self.phase: tuple[Placement, float, float] | None = None
        """The phase that waits for its workers: its placement, GPUs per worker, and since when."""
        self.trains = False
        self.lock, self.ended = threading.Lock(), threading.Event()

    def add(self, name: str, chain: Sequence[Link]) -> None:
        """Score a stage, unless it has answered everything already; answers of another stage of that name are removed."""
        folder, fingerprint = self.folder / name, self.describe(name, chain)
        if find_differences(read_mapping(folder / FINGERPRINT), fingerprint):
            remove(folder)
        write_sealed(folder / FINGERPRINT, fingerprint)
        known, total = len(read_ledger(folder / LEDGER, [name])), sum(map(len, self.asked.tests.values()))
        if known < total:
            with self.lock:
                self.waiting.append(_Stage(name, chain, fingerprint))

    def phase_asks(self, placement: Placement, gpus: float) -> None:
        """A phase asks for its workers; until it has them no stage is begun."""
        with self.lock:
            self.phase, self.trains = (placement, gpus, time.monotonic()), False

    def phase_has(self) -> None:
        """The phase has its workers."""
        with self.lock:
            self.phase, self.trains = None, True

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Score while inside; at the end what is not answered yet is left."""
        with listen(self.on_event) as inbox:
            thread = threading.Thread(target=self._watch, args=(inbox,), name="medlora-early", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self.ended.set()
                if not endings.is_ending():  # then it ends with Ray
                    thread.join(timeout=60)
                    self._interrupt()

    def _watch(self, inbox: Any) -> None:
        try:
            while not self.ended.wait(POLL_S):
                self._go_on(inbox)
        except Exception as error:  # the training goes on
            self._say("evaluation", f"every stage is scored after the training: {error!r}")

    def _go_on(self, inbox: Any) -> None:
        with self.lock:
            phase, ready = self.phase, self.trains and self.waiting and not self.going
        if self.going:
            self._look()
        elif ready and (room := _count(self.placement, self.gpus, find_free())):
            self._begin(min(room, self.placement.workers), inbox)
        if phase and time.monotonic() - phase[2] > GRACE_S and _GOING and self._lacks_room(phase[0], phase[1]):
            for each in list(_GOING):
                each._interrupt()

    def _lacks_room(self, placement: Placement, gpus: float) -> bool:
        """Whether a phase waits for a place that it would have on the nodes that are there, were they free."""
        return is_group_waiting() and _count(placement, gpus, self.cluster.there) >= placement.workers

    def _begin(self, actors: int, inbox: Any) -> None:
        stage = self.waiting.popleft()
        placement = self.placement.model_copy(update={"workers": actors, "min_workers": None})
        score = ray.remote(max_retries=0, **beside_driver())(_score_alone)
        task = score.remote(
            self.folder / stage.name,
            dict(stage.fingerprint),
            {stage.name: [link.model_dump() for link in stage.chain]},
            self.asked.tests,
            self.config,
            self.build(stage.name, stage.chain, placement),
            placement,
            self.cluster,
            inbox,
            self.log_file,
        )
        with self.lock:
            self.going = (stage, task, time.monotonic())
            _GOING.add(self)

    def _look(self) -> None:
        """Say what became of the stage that was scored, once it has ended."""
        with self.lock:
            if self.going is None or not ray.wait([self.going[1]], timeout=0)[0]:
                return
            stage, task, began = self.going
            self.going = None
            _GOING.discard(self)
        try:
            ray.get(task)
        except (ray.exceptions.RayError, InputError, RuntimeError, OSError) as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
            self._say(stage.name, f"could not be scored beside the training, it is scored after it: {reason[0]}")
            return
        answers = read_ledger(self.folder / stage.name / LEDGER, [stage.name])
        shown = [f"{test} {accuracy([p for p in answers if p.test == test]).value:.1%}" for test in self.asked.tests]
        self._say(stage.name, f"scored beside the training in {time.monotonic() - began:.0f} s: {', '.join(shown)}")

    def _interrupt(self) -> None:
        """End what is scored now; it comes first when there is room again."""
        with self.lock:
            if self.going is None:
                return
            stage, task, _ = self.going
            ray.cancel(task, force=True)
            ray.wait([task], timeout=30)
            self.going = None
            _GOING.discard(self)
            self.waiting.appendleft(stage)

    def _say(self, stage: str, text: str) -> None:
        self.on_event(events.note(stage, text))


def take_over(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> list[Prediction]:
    """What stages have answered early, by their names and what their answers depend on."""
    found: list[Prediction] = []
    for stage, fingerprint in stages.items():
        if not find_differences(read_mapping(folder / stage / FINGERPRINT), fingerprint):
            found += read_ledger(folder / stage / LEDGER, [stage])
    return found


def _count(placement: Placement, gpus: float, nodes: Sequence[Node]) -> int:
    return sum(count_room(placement, gpus, node) for node in nodes)


def _score_alone(
    folder: Path,
    fingerprint: dict[str, Any],
    stages: dict[str, list[dict[str, str]]],
    tests: dict[str, list[McqRecord]],
    config: EvaluationConfig,
    build: Callable[[], AnswersQuestions],
    placement: ActorPlacement,
    cluster: Cluster,
    inbox: Any,
    log_file: Path,
) -> None:
    """What the process of its own does; that of a driver that was killed may live on for seconds, and holds the lock."""
    (stage,) = stages
    chains = {name: [Link(**link) for link in chain] for name, chain in stages.items()}

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "note" and "ready on" not in event["text"]:
            inbox.put({**event, "phase": stage})

    with hold_file_lock(folder.with_name(f".{stage}.lock"), f"stage {stage} of {folder.parent}", wait_s=180):
        mirror.push(folder)  # what was answered before this was interrupted is here and may not be there yet
        mirror.pull(folder)
        ask_stages(folder, fingerprint, chains, tests, config, build, placement, cluster, hear, log_file)
        mirror.push(folder)
