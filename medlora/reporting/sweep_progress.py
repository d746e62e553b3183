"""What a sweep shows while it runs: one table on a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from medlora.events import Event, TrialStep
from medlora.reporting.progress import Display
from medlora.reporting.tables import make_table
from medlora.sweep.ledger import Ledger, Trial
from medlora.sweep.space import format_value

log = logging.getLogger("medlora.run")


_ROWS = 12
"""Trials that the live table shows beside those that run: the best so far."""


class SweepDisplay:
    """Shows a sweep's events: trials in one live table, all else as `Display` shows a run."""

    def __init__(self, ledger: Ledger, trials: int, console: Console | None = None) -> None:
        self.display = Display(console)
        self.console = self.display.console
        self.ledger, self.trials = ledger, trials
        self.live: Live | None = None
        self.steps: dict[str, TrialStep] = {}
        self.said: dict[str, tuple[str, int]] = {}
        self.started = time.monotonic()
        self.done_before = 0
        self.concurrency = 1
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_table()
        self.display.__exit__(kind, error, trace)

    def show(self, event: Event) -> None:
        """Take one event of a sweep."""
        with self.lock:
            if event["event"] == "search":
                self._begin_table(event["concurrency"])
            elif event["event"] == "searched":
                self._end_table()
            elif event["event"] == "trial":
                self._tell(self.ledger.trials[event["trial"]])
            elif event["event"] == "trial-step":
                self.steps[event["trial"]] = event
            elif event["event"] == "trial-note":
                self._say(f"trial {event['trial']}  {event['text']}")
            elif event["event"] == "trial-seconds":
                spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in event["seconds"].items())
                log.info("trial %s: %s", event["trial"], spent)
            else:
                self.display.show(event)
            if self.live:
                self.live.update(self._draw())

    def _begin_table(self, concurrency: int) -> None:
        self.started, self.concurrency = time.monotonic(), concurrency
        ended = [trial for trial in self.ledger.trials.values() if trial.ended]
        self.done_before = len(ended)
        self.said = {trial.id: (trial.state, trial.step) for trial in ended}
        if ended:
            self._say(f"{len(ended)} of {self.trials} trials are done already; none of them is run again")
        if self.done_before < self.trials:
            self._say(f"{self.trials - self.done_before} trials, {concurrency} at a time")
        if self.console.is_terminal:
            self.display.progress.stop()
            self.live = Live(self._draw(), console=self.console, transient=True, refresh_per_second=4)
            self.live.start()

    def _end_table(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
            self.display.progress.start()

    def _tell(self, trial: Trial) -> None:
        """A line where something about the trial is new."""
        new = (trial.state, trial.step)
        if self.said.get(trial.id) == new:
            return
        begins = trial.id not in self.said
        self.said[trial.id] = new
        dev = f"dev {trial.score:.3f}" if trial.score is not None else ""
        if begins and not trial.ended:
            values = ", ".join(f"{key} {format_value(value)}" for key, value in trial.params.items())
            self._say(f"trial {trial.id}  {'resumes' if trial.reports else 'starts'}: {values}")
        elif trial.state == "running":
            self._say(f"trial {trial.id}  step {trial.step}: {dev}")
        else:
            why = trial.why.splitlines()[0] if trial.why else ""
            at = f"at step {trial.step}" if trial.step else "before its first score"
            text = {
                "finished": f"finished: {dev}",
                "stopped": f"stopped at step {trial.step}: {dev}",
                "failed": f"failed {at}: {why}",
                "invalid": f"its values make no valid config: {why}",
            }[trial.state]
            self._say(f"trial {trial.id}  {text}; {self._sum_up()}")

    def _sum_up(self) -> str:
        done = sum(trial.ended for trial in self.ledger.trials.values())
        best = self.ledger.rank()[:1]
        said = [f"{done} of {self.trials} done"]
        said += [f"best {best[0].score:.3f} (trial {best[0].id})"] if best and best[0].score is not None else []
        here = done - self.done_before
        if here and done < self.trials:
            left_s = (time.monotonic() - self.started) / here * (self.trials - done)
            said.append(f"about {left_s / 60:.0f} min left" if left_s > 90 else f"about {left_s:.0f} s left")
        return ", ".join(said)

    def _draw(self) -> Group:
        states = [trial.state for trial in self.ledger.trials.values()]
        counts = ", ".join(
            f"{states.count(state)} {state}"
            for state in ("running", "finished", "stopped", "failed", "invalid")
            if state in states
        )
        running = self.ledger.select("running")
        others = sorted(
            (trial for trial in self.ledger.trials.values() if trial.state != "running"),
            key=lambda trial: (trial.state != "finished", -(trial.score or 0.0), trial.id),
        )
        return Group(
            make_table([*running, *others[:_ROWS]], self.steps),
            Text(f"{counts or 'no trial yet'}; {self._sum_up()}"),
        )

    def _say(self, text: str) -> None:
        self.display._say(text)
