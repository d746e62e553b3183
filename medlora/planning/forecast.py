"""How long a run still takes: the tokens of its plan, at the rate that this run measures, or else that earlier runs measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean

from medlora import events
from medlora.events import Event, Planned, PlannedPhase, Step
from medlora.planning.figures import RunPlan
from medlora.reporting.progress import describe_seconds


def describe_left(plan: RunPlan) -> Planned:
    """What a `Forecast` needs of a plan, as an event: the phases that are left, and the evaluation."""
    phases: list[PlannedPhase] = [
        {
            "name": phase.name,
            "steps": None if phase.steps is None else phase.steps + phase.full_prompt_steps,
            "full_steps": phase.full_prompt_steps,
            "tokens": phase.tokens,
            "seconds": phase.seconds,
        }
        for phase in plan.phases
        if phase.is_left
    ]
    return events.planned(phases, bool(plan.questions), plan.evaluation_s)


class Forecast:
    """Takes a run's events and says how long the run still takes; `clock` gives seconds.

    It says nothing where the plan or the rate of a part is not known, nor where nothing follows what runs now, since that
    says its own time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.left: dict[str, PlannedPhase] = {}
        self.evaluates = False
        self.evaluation_s: float | None = None
        self.current = ""
        self.first: tuple[float, int] | None = None
        """When the first step of the current segment was reported, and the steps of its phase until then."""
        self.last: tuple[float, int] = (0.0, 0)
        self.tokens = self.trained_s = 0.0
        """What the phases trained that this run has finished, and how long their steps took."""
        self.around_s: list[float] = []
        """By phase, what was no step: starting workers, loading the base, preparing data; not building the miniature."""
        self.since: float | None = clock()
        """Since when nothing was trained; None from the first step of a phase on, also where it begins again."""
        self.building: list[float] = []
        self.ends_at: float | None = None

    def take(self, event: Event) -> None:
        """Note what an event tells of time; others change nothing."""
        now = self.clock()
        if event["event"] == "planned":
            self.left = {phase["name"]: phase for phase in event["phases"]}
            self.evaluates, self.evaluation_s, self.since = event["evaluates"], event["evaluation_s"], now
        elif event["event"] == "cluster":
            self.since = now  # a cluster starts once
        elif event["event"] == "phase":
            self._keep_rate()
            self.current, self.first = event["phase"], None
            self.evaluates = self.evaluates and event["phase"] in self.left
        elif event["event"] == "build":
            self.building = [*self.building[:1], now]
        elif event["event"] == "training" and self.since is not None:
            built_s = self.building[-1] - self.building[0] if self.building else 0.0
            self.around_s.append(max(0.0, now - self.since - built_s))
            self.since, self.building = None, []
        elif event["event"] == "step":
            self._count(event, now)
        elif event["event"] == "finished" or event["event"] == "reused":
            self._end(event["phase"], now)
        else:
            return
        seconds = self._add_up()
        self.ends_at = None if seconds is None else now + seconds

    def describe(self) -> str:
        """ "whole run 3 min left", "all phases" where the evaluation's rate is not known; empty where there is no basis."""
        if self.ends_at is None:
            return ""
        what = "all phases" if self.evaluates and self.evaluation_s is None else "whole run"
        least = "" if self.around_s else "at least "
        return f"{what} {least}{describe_seconds(max(0.0, self.ends_at - self.clock()))} left"

    def _count(self, event: Step, now: float) -> None:
        phase = self.left.get(event["phase"])
        before = phase["full_steps"] if phase and event["segment"] == "normal" else 0
        done = before + event["step"]
        if self.first is None or done - self.last[1] > event["step"]:  # a first segment that has ended early
            self._keep_rate()
            self.first = (now, done)
        self.last = (now, done)

    def _measure(self) -> tuple[float, float]:
        """The tokens of the current segment since its first reported step, and their seconds."""
        phase = self.left.get(self.current)
        if phase is None or self.first is None or not phase["steps"]:
            return 0.0, 0.0
        steps = self.last[1] - self.first[1]
        return (phase["tokens"] or 0) * steps / phase["steps"], self.last[0] - self.first[0]

    def _keep_rate(self) -> None:
        tokens, seconds = self._measure()
        self.tokens, self.trained_s = self.tokens + tokens, self.trained_s + seconds

    def _end(self, phase: str, now: float) -> None:
        self._keep_rate()
        self.left.pop(phase, None)
        self.current, self.first, self.since = "", None, now

    def _add_up(self) -> float | None:
        """Seconds until the end; None where a part of them has no basis, or where nothing follows the current phase."""
        following = [phase for name, phase in self.left.items() if name != self.current]
        scoring_s = self.evaluation_s if self.evaluates else None
        if not following and scoring_s is None:
            return None
        around = mean(self.around_s) if self.around_s else 0.0
        parts = [None if (s := self._train(phase, 1.0)) is None else s + around for phase in following]
        if (now := self.left.get(self.current)) is not None:
            done = self.last[1] / now["steps"] if self.first and now["steps"] else 0.0
            parts.append(self._train(now, 1 - done))
        known = [part for part in parts if part is not None]
        return sum(known) + (scoring_s or 0.0) if len(known) == len(parts) else None

    def _train(self, phase: PlannedPhase, share: float) -> float | None:
        """Seconds of a share of a phase's steps."""
        tokens, seconds = self._measure()
        if phase["name"] == self.current and tokens and seconds and phase["tokens"]:
            return share * phase["tokens"] * seconds / tokens
        tokens, seconds = self.tokens + tokens, self.trained_s + seconds
        if phase["tokens"] and tokens and seconds:
            return share * phase["tokens"] * seconds / tokens
        return None if phase["seconds"] is None else share * phase["seconds"]
