"""What a run looks like while it goes on: a live line on a terminal, plain lines in a log, a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("medlora.run")

_PLAIN_EVERY_S = 10.0


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

    def show(self, event: Mapping[str, Any]) -> None:
        """Take one event of a run."""
        kind, phase = event["event"], event.get("phase", "")
        if kind == "step":
            figures = (
                f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s  {event['peak_memory_mib']:,.0f} MiB"
            )
            label = phase if event["segment"] == "normal" else f"{phase} {event['segment']}"
            self._advance(label, event["step"], event["steps"], figures)
        elif kind == "build":
            self._advance(event["what"], event["step"], event["total"], f"loss {event['loss']:.3f}")
        elif kind == "preparing":
            self._advance(phase, event["done"], event["total"], "records")
        elif kind == "evaluating":
            self._begin("evaluation")
            self.total, self.answered, self.rates = event["total"], event["known"], deque(maxlen=16)
            if event["known"]:
                self._say(f"evaluation  {event['known']} of {event['total']} questions are answered already")
        elif kind == "evaluation":
            self.answered += event["questions"]
            self.rates.append((time.monotonic(), event["questions"], event["seconds"]))
            self._advance("evaluation", self.answered, self.total, f"{self._measure_rate():.1f} questions/s")
        elif kind == "validation":
            scores = "  ".join(
                f"{name} {event[name]:.3f}"
                for name in ("accuracy", "format_score", "perplexity", "token_f1")
                if name in event
            )
            self._say(f"{phase}  dev at step {event['step']}: {scores}")
        elif kind == "phase":
            self._begin(phase)
            self._say(f"{phase}  on {event['device']}")
        elif kind == "finished":
            self._begin("")
            around = f", and {event['around_s']:.0f} s to start and end its workers" if event["around_s"] else ""
            self._say(f"{phase}  done in {event['seconds']:.0f} s{around}")
        elif kind == "reused":
            self._say(f"{phase}  is finished already and reused")
        elif kind == "cluster":
            how = "started Ray here" if event["started_here"] else "connected to the running Ray cluster"
            self._say(f"{how}: {event['text']} ({event['seconds']:.1f} s)")
        elif kind != "training":
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


def print_report(report: Mapping[str, Any] | None, worked: bool) -> None:
    """The final table (stage, test, accuracy, 95 % interval, n, time) and what to know about its figures."""
    print_reports({"": report}, worked)


def print_reports(reports: Mapping[str, Mapping[str, Any] | None], worked: bool) -> None:
    """One table of the reports of several runs by name, and what to know about their figures; the name may be empty."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if not worked:
        console.print("everything is done already; nothing was computed again")
    there = {name: report for name, report in reports.items() if report is not None}
    if not there:
        return
    named, timed = list(there) != [""], any(report.get("phase_seconds") for report in there.values())
    extra = _find_columns([row for report in there.values() for row in report["stages"]])
    table = Table(
        *(["run"] if named else []),
        *("stage", "test", "accuracy", "95 % interval", "n"),
        *(name for name, _ in extra),
        *(["trained in"] if timed else []),
    )
    for name, report in there.items():
        _add_rows(table, report, [name] if named else [], timed, extra)
    console.print(table)
    for name, report in there.items():
        said = f"{name}: " if named else ""
        failed = sum(row["failed"] for row in report["stages"])
        if failed:
            console.print(f"{said}{failed} answers failed and count as wrong; see predictions.parquet, column error")
        if unwritten := sum((row.get("by_likelihood") or {}).get("unwritten", 0) for row in report["stages"]):
            console.print(
                f"{said}{unwritten} letters were taken by likelihood: the text that the model wrote does not give them; "
                "beside them, accuracy of the answers that kept the whole format"
            )
        for note in [*report.get("notes", []), *report.get("remarks", [])]:
            console.print(f"beware: {said}{note}", markup=False)
        rate = f", {report['questions_per_s']:.1f} questions/s once running" if report.get("questions_per_s") else ""
        if "seconds" in report:
            console.print(f"{said}evaluation: {report['seconds']:.0f} s{rate}")


_Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _find_columns(rows: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """The columns that only some reports need: what was unparsed, and what `reason` took by likelihood."""
    columns: list[_Column] = []
    if any(row.get("unparsed") for row in rows):
        columns.append(("unparsed", lambda row: str(row["unparsed"])))
    if any(row.get("by_likelihood") for row in rows):
        columns.append(("by likelihood", lambda row: str((row.get("by_likelihood") or {}).get("unwritten", ""))))
        columns.append(("format kept", _describe_kept))
    return columns


def _describe_kept(row: Mapping[str, Any]) -> str:
    counted = row.get("by_likelihood")
    if not counted:
        return ""
    share = f"{counted['kept_accuracy']:.1%} of " if counted["kept"] else ""
    return f"{share}{counted['kept']}"


def _add_rows(
    table: Table, report: Mapping[str, Any], leading: list[str], timed: bool, extra: Sequence[_Column]
) -> None:
    rows = report["stages"]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = row["interval"]
        cells = [row["stage"], row["test"], f"{row['accuracy']:.1%}", f"{low:.1%} .. {high:.1%}", str(row["n"])]
        cells += [describe(row) for _, describe in extra]
        if timed:
            seconds = (report.get("phase_seconds") or {}).get(row["stage"])
            cells.append(f"{seconds:.0f} s" if seconds is not None else "")
        table.add_row(*leading, *cells, end_section=following is None or following["stage"] != row["stage"])
