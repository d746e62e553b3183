"""A sweep's summary -> one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlora.page import make_environment
from medlora.sweep_ledger import START
from medlora.sweep_plots import MARGIN, Line, draw_curves, draw_parallel
from medlora.sweep_report import describe_pair
from medlora.sweep_space import format_value, parse_domain


def write_sweep_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page of a sweep (`medlora.sweep_report.write_results`).

    Every text is escaped; the page's policy allows no script and nothing from elsewhere. The same summary gives the same
    bytes.
    """
    from markupsafe import Markup

    environment = make_environment()
    environment.filters |= {"value": format_value}
    lines = [make_line(trial, summary["winner"]) for trial in summary["trials"] if trial["state"] != "invalid"]
    domains = {key: parse_domain(key, text) for key, text in summary["space"].items()}
    states = {"finished": 0, "stopped": 1, "failed": 2, "invalid": 3}
    ranked = sorted(
        summary["trials"],
        key=lambda trial: (states.get(trial["state"], 4), -trial["step"], -(trial["score"] or 0.0), trial["id"]),
    )
    text = environment.get_template("sweep_page.html").render(
        sweep=summary,
        start=START,
        margin=MARGIN,
        keys=list(domains),
        ranked=ranked,
        pairs={pair["after"]: describe_pair(pair) for pair in summary["dev"]["pairs"]},
        parallel=Markup(draw_parallel(lines, domains)),
        curves=Markup(draw_curves(lines)),
        kinds=[
            kind for kind in ("start", "winner", "finished", "stopped", "failed") if kind in {x.kind for x in lines}
        ],
    )
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def make_line(trial: Mapping[str, Any], winner: str) -> Line:
    """A trial as it is drawn."""
    kind = trial["state"] if trial["state"] in ("finished", "stopped") else "failed"
    kind = "start" if trial["id"] == START else "winner" if trial["id"] == winner else kind
    return Line(kind, trial["params"], [(int(row["step"]), 100 * row["score"]) for row in trial["reports"]])
