"""The tables that a finished job prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medlora.evaluation.ledger import PAGE
from medlora.evaluation.reports import Report, StageRow
from medlora.events import TrialStep
from medlora.reporting.results.browse import BROWSE
from medlora.sweep.ledger import Ledger, Trial
from medlora.sweep.results import describe_pair
from medlora.sweep.space import format_value
from medlora.sweep.summary import Summary


def print_report(report: Report | None, worked: bool) -> None:
    """The final table (stage, test, accuracy, 95 % interval, n, time) and what to know about its figures."""
    print_reports({"": report}, worked)


def print_reports(reports: Mapping[str, Report | None], worked: bool) -> None:
    """One table of the reports of several runs by name, and what to know about their figures; the name may be empty."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if not worked:
        console.print("everything is done already; nothing was computed again")
    there = {name: report for name, report in reports.items() if report is not None}
    if not there:
        return
    named, timed = list(there) != [""], any(report.get("phase_seconds") for report in there.values())
    extra = _find_columns([row for report in there.values() for row in report["stages"]])
    changes = {id(row): text for report in there.values() for row, text in _list_changes(report)}
    if changes:
        extra.insert(0, ("change", lambda row: changes.get(id(row), "")))
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
        for line in _list_findings(report):
            console.print(f"{said}{line}", markup=False)
        failed = sum(row["failed"] for row in report["stages"])
        if failed:
            console.print(f"{said}{failed} answers failed and count as wrong; see predictions.parquet, column error")
        if unwritten := sum(_count_unwritten(row) or 0 for row in report["stages"]):
            console.print(
                f"{said}{unwritten} letters were taken by likelihood: the text that the model wrote does not give them; "
                "beside them, accuracy of the answers that kept the whole format"
            )
        for note in [*report.get("notes", []), *report.get("remarks", [])]:
            console.print(f"beware: {said}{note}", markup=False)
        rate = f", {report['questions_per_s']:.1f} questions/s once running" if report.get("questions_per_s") else ""
        if "seconds" in report:
            console.print(f"{said}evaluation: {report['seconds']:.0f} s{rate}")


def _list_changes(report: Report) -> list[tuple[StageRow, str]]:
    """For each row but the first stage's, the points that it has gained or lost against the first stage."""
    if not report.get("overall"):
        return []
    first = report["overall"][0]["stage"]
    points = {
        (pair["test"], pair["after"]): f"{100 * pair['difference']:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")
        for pair in report["comparisons"]
        if pair["before"] == first
    }
    named = ((row, points.get((row["test"], row["stage"]))) for row in report["stages"])
    return [(row, text) for row, text in named if text is not None]


def print_next(folder: Path) -> None:
    """Where a finished evaluation can be read, as links that a terminal opens."""
    for what, name in (("report", PAGE), ("questions", BROWSE)):
        if (folder / name).is_file():  # an evaluation of an earlier medlora has no page of questions
            print(f"{what}: {(folder / name).resolve().as_uri()}")


def _list_findings(report: Report) -> list[str]:
    """The verdict, how many questions are paired, and what is known as sums alone."""
    lines = [str(report["verdict"])] if report.get("verdict") else []
    lines += report.get("paired") or []
    for row in report.get("totals") or []:
        low, high = row["interval"]
        share = row["correct"] / row["total"]
        lines.append(
            f"{row['stage']}, {row['test']}: {share:.1%} (95 % interval {low:.1%} to {high:.1%}, n = {row['total']:,}); "
            "a sum alone, not paired"
        )
    return lines


_Column = tuple[str, Callable[[StageRow], str]]


def _find_columns(rows: Sequence[StageRow]) -> list[_Column]:
    """The columns that only some reports need: what was unparsed, and what `reason` took by likelihood."""
    columns: list[_Column] = []
    if any(row.get("chance") is not None for row in rows):
        columns.append(("chance", lambda row: "" if row["chance"] is None else f"{row['chance']:.1%}"))
    if any(row.get("unparsed") for row in rows):
        columns.append(("unparsed", lambda row: str(row["unparsed"])))
    if any(row.get("by_likelihood") for row in rows):
        columns.append(("by likelihood", _show_unwritten))
        columns.append(("format kept", _describe_kept))
    return columns


def _count_unwritten(row: StageRow) -> int | None:
    counted = row.get("by_likelihood")
    return counted["unwritten"] if counted else None


def _show_unwritten(row: StageRow) -> str:
    unwritten = _count_unwritten(row)
    return "" if unwritten is None else str(unwritten)


def _describe_kept(row: StageRow) -> str:
    counted = row.get("by_likelihood")
    if not counted:
        return ""
    share = f"{counted['kept_accuracy']:.1%} of " if counted["kept"] else ""
    return f"{share}{counted['kept']}"


def _add_rows(table: Table, report: Report, leading: list[str], timed: bool, extra: Sequence[_Column]) -> None:
    rows = report["stages"]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = row["interval"]
        cells = [row["stage"], row["test"], f"{row['accuracy']:.1%}", f"{low:.1%} .. {high:.1%}", str(row["n"])]
        cells += [describe(row) for _, describe in extra]
        if timed:
            seconds = (report.get("phase_seconds") or {}).get(row["stage"])
            cells.append(f"{seconds:.0f} s" if seconds is not None else "")
        table.add_row(*leading, *cells, end_section=following is None or following["stage"] != row["stage"])


def make_table(trials: list[Trial], steps: Mapping[str, TrialStep] | None = None) -> Table:
    """A row a trial: how far it came, its last dev score, its values."""
    keys = list(trials[0].params) if trials else []
    table = Table("trial", "state", "step", "dev", *keys)
    for trial in trials:
        seen = (steps or {}).get(trial.id)
        step = (
            f"{max(seen['step'], trial.step)}/{seen['steps']}" if seen and trial.state == "running" else str(trial.step)
        )
        score = f"{trial.score:.3f}" if trial.score is not None else ""
        table.add_row(trial.id, trial.state, step, score, *(format_value(trial.params[key]) for key in keys))
    return table


def print_sweep(summary: Summary, ledger: Ledger, worked: bool) -> None:
    """The table of trials, the best first, then how the best compare with the unchanged config on all of dev."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if not worked:
        console.print("everything is done already; nothing was computed again")
    rest = [trial for trial in ledger.trials.values() if trial.state != "finished"]
    rest.sort(key=lambda trial: (trial.state != "stopped", -trial.step, -(trial.score or 0.0), trial.id))
    console.print(make_table([*ledger.rank(), *rest]))
    start, *best = summary["dev"]["stages"]
    console.print(
        f"on all of dev ({start['n']:,} questions), the unchanged config (trial {start['trial']}): {start['accuracy']:.1%}"
    )
    by_trial = {pair["after"]: pair for pair in summary["dev"]["pairs"]}
    for row in best:
        console.print(
            f"trial {row['trial']}: {row['accuracy']:.1%}, {describe_pair(by_trial[row['trial']])}", markup=False
        )
    for note in summary["notes"]:
        console.print(f"beware: {note}", markup=False)
    winner = summary["winner"]
    console.print(
        "no trial was better than the unchanged config"
        if winner == start["trial"]
        else f"the winner is trial {winner}; it was chosen on dev, so its advantage there is likely too large"
    )
    if (record := summary["test"]) is None:
        return
    for scored in record["tests"]:
        low, high = scored["interval"]
        console.print(
            f"test {scored['test']}, trial {record['trial']}, scored once ({record['created']}): "
            f"{scored['accuracy']:.1%} (95 % {low:.1%} .. {high:.1%}), n = {scored['n']:,}"
        )
