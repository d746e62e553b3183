"""What a run shows while it runs: a live line on a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from medlora.events import Event, Validation

log = logging.getLogger("medlora.run")


_PLAIN_EVERY_S = 10.0

_WAITING = "-"
"""The label of a task that is waited for; no phase can have it."""


_SCORES: tuple[Literal["accuracy", "format_score", "perplexity", "token_f1"], ...] = (
    "accuracy",
    "format_score",
    "perplexity",
    "token_f1",
)
"""Of a validation, in this order."""


def describe_times(elapsed_s: float, left_s: float | None) -> str:
    """ "16 s, 1 s left": what has passed, and what is left where that is known."""
    return describe_seconds(elapsed_s) + ("" if left_s is None else f", {describe_seconds(left_s)} left")


def describe_seconds(seconds: float) -> str:
    """ "16 s", "10 min", "2.5 h"."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def measure_rate(batches: Sequence[tuple[float, int, float]]) -> float:
    """Questions/s from batches by the second in which they were told, their questions and their own seconds.

    The first batch's own seconds stand for what was before it, so that loading a model is no part of the rate.
    """
    first_end, _, first_s = batches[0]
    elapsed_s = batches[-1][0] - first_end + first_s
    return sum(questions for _, questions, _ in batches) / max(elapsed_s, 1e-9)


class _CountColumn(ProgressColumn):
    """How much of a task is done; nothing where that cannot be counted."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _TimesColumn(ProgressColumn):
    """The times of a task in the words of a log."""

    def render(self, task: Task) -> Text:
        text = describe_times(task.elapsed or 0.0, task.time_remaining)
        return Text(", ".join(filter(None, [text, task.fields["describe_run"]()])))


class Outlook(Protocol):
    """Says how long the whole run still takes: `planning.forecast.Forecast`."""

    def take(self, event: Event) -> None:
        """An event of the run."""

    def describe(self) -> str:
        """ "whole run 3 min left"; empty where that is not known."""


class Display:
    """Shows a run's events: one bar per phase on a terminal, at most a line every ten seconds elsewhere.

    Runs side by side have a display each, `beside` the first one and on its console, that says its run's name on every
    line. What is said goes to the logger `log`, too. `phases` maps the names of all phases to their descriptions, and
    `outlook` says when the whole run ends.
    """

    def __init__(
        self,
        console: Console | None = None,
        name: str = "",
        beside: Display | None = None,
        phases: Mapping[str, str] | None = None,
        outlook: Outlook | None = None,
    ) -> None:
        self.outlook = outlook
        self.phases = dict(phases or {})
        self.losses: dict[str, list[float]] = {}
        self.best: dict[tuple[str, str], float] = {}
        self.name = f"{name}  " if name else ""
        self.log = logging.getLogger(f"medlora.run.{name}") if name else log
        if console is None and beside is not None:
            console = beside.console
        self.console: Console = console or Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        self.progress: Progress = (
            beside.progress
            if beside is not None
            else Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                _CountColumn(),
                TextColumn("{task.fields[figures]}"),
                _TimesColumn(),
                console=self.console,
                transient=True,
                disable=not self.console.is_terminal,
            )
        )
        self.task: TaskID | None = None
        self.label = ""
        self.started = self.said = time.monotonic()
        self.total = self.answered = 0
        self.rates: deque[tuple[float, int, float]] = deque(maxlen=16)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Take one event of a run."""
        phase = str(event.get("phase", ""))
        if self.outlook:
            self.outlook.take(event)
        if event["event"] == "step":
            figures = (
                f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s  {event['peak_memory_mib']:,.0f} MiB"
            )
            self.losses.setdefault(phase, []).append(event["loss"])
            label = phase if event["segment"] == "normal" else f"{phase} {event['segment']}"
            self._advance(label, event["step"], event["steps"], figures)
        elif event["event"] == "build":
            self._advance(event["what"], event["step"], event["total"], f"loss {event['loss']:.3f}")
        elif event["event"] == "preparing":
            self._advance(phase, event["done"], event["total"], "records")
        elif event["event"] == "evaluating":
            self._begin("evaluation")
            self._wait("evaluation")
            self.total, self.answered, self.rates = event["total"], event["known"], deque(maxlen=16)
            if event["known"]:
                self._say(f"evaluation  {event['known']} of {event['total']} questions are answered already")
        elif event["event"] == "evaluation":
            self.answered += event["questions"]
            self.rates.append((time.monotonic(), event["questions"], event["seconds"]))
            self._advance("evaluation", self.answered, self.total, f"{measure_rate(self.rates):.1f} questions/s")
        elif event["event"] == "validation":
            self._say(f"{phase}  dev at step {event['step']}: {self._describe_dev(phase, event)}")
        elif event["event"] == "phase":
            self._begin(phase)
            self.losses.pop(phase, None)
            self._say(f"{phase}  {self._place(phase)}on {event['device']}")
            self._wait(phase)
        elif event["event"] == "finished":
            self._begin("")
            around = f", and {event['around_s']:.0f} s to start and end its workers" if event["around_s"] else ""
            lines = [f"{phase}  done in {event['seconds']:.0f} s{self._describe_losses(phase)}{around}"]
            self._say("; ".join(filter(None, [*lines, self._describe_run()])))
        elif event["event"] == "planned":
            if text := self._describe_run():
                self._say(f"plan  {text}, by what earlier runs measured")
        elif event["event"] == "reused":
            self._say(f"{phase}  is finished already and reused")
        elif event["event"] == "cluster":
            how = "started Ray here" if event["started_here"] else "connected to the running Ray cluster"
            self._say(f"{how}: {event['text']} ({event['seconds']:.1f} s)")
        elif event["event"] == "note" or event["event"] == "refused" or event["event"] == "failed":
            self._say(f"{phase}  {event['text']}")
            if phase in self.phases and self.task is None:
                self._wait(phase)

    def _describe_run(self) -> str:
        return self.outlook.describe() if self.outlook else ""

    def _place(self, phase: str) -> str:
        """Which phase of how many this is, and what it is for."""
        if phase not in self.phases:
            return ""
        about = f" ({self.phases[phase]})" if self.phases[phase] else ""
        return f"phase {list(self.phases).index(phase) + 1} of {len(self.phases)}{about}, "

    def _describe_losses(self, phase: str) -> str:
        losses = self.losses.get(phase, [])
        return f": loss {losses[0]:.3f} -> {losses[-1]:.3f}" if len(losses) > 1 else ""

    def _describe_dev(self, phase: str, event: Validation) -> str:
        """Shares in % with n where it is known, and the best score of the phase so far."""
        shown = []
        for name in _SCORES:
            if name in event:
                value = event[name]
                shown.append(f"{name} {value:.3f}" if name == "perplexity" else f"{name} {100 * value:.1f} %")
        n = event.get("questions")
        if n and shown and shown[0].startswith("accuracy"):
            shown[0] += f" (n {n:,})"
        key = (phase, event["segment"])
        before = self.best.get(key)
        self.best[key] = event["score"] if before is None else max(before, event["score"])
        if before is not None:
            best = abs(self.best[key])  # of perplexity, the score is its negative
            text = f"{best:.3f}" if event["score"] < 0 else f"{100 * best:.1f} %"
            shown.append("best so far" if event["score"] > before else f"best so far {text}")
        return "  ".join(shown)

    def _begin(self, label: str) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.label = None, label
        self.started = time.monotonic()

    def _wait(self, phase: str) -> None:
        """A bar without an end and its seconds, until the first step of the phase comes."""
        self.task = self.progress.add_task(
            self.name + phase, total=None, figures="workers start", describe_run=self._describe_run
        )
        self.label = _WAITING

    def _advance(self, label: str, step: int, total: int, figures: str) -> None:
        if self.task is None or label != self.label:
            self._begin(label)
            self.task = self.progress.add_task(
                self.name + label, total=total, figures=figures, describe_run=self._describe_run
            )
            self.first_step = step
        self.progress.update(self.task, completed=step, total=total, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.said > _PLAIN_EVERY_S or step == total):
            done = step - self.first_step
            left = (now - self.started) / done * (total - step) if done and step < total else None
            times = filter(None, [describe_times(now - self.started, left), self._describe_run()])
            self._say(f"{label}  {step}/{total}  {figures}  {', '.join(times)}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        self.log.info(text)
        self.console.print(self.name + text, markup=False)
