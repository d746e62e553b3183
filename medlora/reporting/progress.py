"""What a run looks like while it goes on: a live line on a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medlora.events import Event

log = logging.getLogger("medlora.run")


_PLAIN_EVERY_S = 10.0


_SCORES: tuple[Literal["accuracy", "format_score", "perplexity", "token_f1"], ...] = (
    "accuracy",
    "format_score",
    "perplexity",
    "token_f1",
)
"""Of a validation, in this order."""


class Display:
    """Shows a run's events: one bar per phase on a terminal, at most a line every ten seconds elsewhere.

    Runs side by side have a display each, `beside` the first one and on its console, that says its run's name on every
    line. What is said goes to the logger `log`, too.
    """

    def __init__(self, console: Console | None = None, name: str = "", beside: Display | None = None) -> None:
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
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
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
        if event["event"] == "step":
            figures = (
                f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s  {event['peak_memory_mib']:,.0f} MiB"
            )
            label = phase if event["segment"] == "normal" else f"{phase} {event['segment']}"
            self._advance(label, event["step"], event["steps"], figures)
        elif event["event"] == "build":
            self._advance(event["what"], event["step"], event["total"], f"loss {event['loss']:.3f}")
        elif event["event"] == "preparing":
            self._advance(phase, event["done"], event["total"], "records")
        elif event["event"] == "evaluating":
            self._begin("evaluation")
            self.total, self.answered, self.rates = event["total"], event["known"], deque(maxlen=16)
            if event["known"]:
                self._say(f"evaluation  {event['known']} of {event['total']} questions are answered already")
        elif event["event"] == "evaluation":
            self.answered += event["questions"]
            self.rates.append((time.monotonic(), event["questions"], event["seconds"]))
            self._advance("evaluation", self.answered, self.total, f"{self._measure_rate():.1f} questions/s")
        elif event["event"] == "validation":
            scores = "  ".join(f"{name} {event[name]:.3f}" for name in _SCORES if name in event)
            self._say(f"{phase}  dev at step {event['step']}: {scores}")
        elif event["event"] == "phase":
            self._begin(phase)
            self._say(f"{phase}  on {event['device']}")
        elif event["event"] == "finished":
            self._begin("")
            around = f", and {event['around_s']:.0f} s to start and end its workers" if event["around_s"] else ""
            self._say(f"{phase}  done in {event['seconds']:.0f} s{around}")
        elif event["event"] == "reused":
            self._say(f"{phase}  is finished already and reused")
        elif event["event"] == "cluster":
            how = "started Ray here" if event["started_here"] else "connected to the running Ray cluster"
            self._say(f"{how}: {event['text']} ({event['seconds']:.1f} s)")
        elif event["event"] == "note" or event["event"] == "refused" or event["event"] == "failed":
            self._say(f"{phase}  {event['text']}")

    def _measure_rate(self) -> float:
        """Questions/s over the last batches; the first one's own time stands for what was before it."""
        first_end, first_questions, first_s = self.rates[0]
        elapsed_s = self.rates[-1][0] - first_end + first_s
        return sum(questions for _, questions, _ in self.rates) / max(elapsed_s, 1e-9)

    def _begin(self, label: str) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.label = None, label
        self.started = time.monotonic()

    def _advance(self, label: str, step: int, total: int, figures: str) -> None:
        if self.task is None or label != self.label:
            self._begin(label)
            self.task = self.progress.add_task(self.name + label, total=total, figures=figures)
            self.first_step = step
        self.progress.update(self.task, completed=step, total=total, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.said > _PLAIN_EVERY_S or step == total):
            done = step - self.first_step
            left = f"  {(now - self.started) / done * (total - step):.0f} s left" if done and step < total else ""
            self._say(f"{label}  {step}/{total}  {figures}{left}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        self.log.info(text)
        self.console.print(self.name + text, markup=False)
