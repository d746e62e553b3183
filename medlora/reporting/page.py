"""A report -> one HTML page that needs nothing else: readable offline, on paper, in the dark, without its script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import Report
from medlora.records import LETTERS, McqRecord
from medlora.reporting.changes import _TEXT_LIMIT, list_changes
from medlora.reporting.results.drawings import Drawings
from medlora.reporting.results.paper import make_tables
from medlora.reporting.templates import load_script, make_environment

_TIMES: tuple[Literal["seconds", "seconds_to_first_answer", "questions_asked", "questions_per_s"], ...] = (
    "seconds",
    "seconds_to_first_answer",
    "questions_asked",
    "questions_per_s",
)


_ABOUT = (
    "name",
    "created",
    "notes",
    "remarks",
    "verdict",
    "paired",
    "totals",
    "phases",
    "data",
    "prompt_shown",
    "prompts",
    *_TIMES,
    "phase_seconds",
    "stage_seconds",
    "config",
    "versions",
    "hashes",
)
"""What a report may hold beside what is computed."""


@dataclass(frozen=True)
class Beside:
    """What is beside a page: the name of the page of all questions, and the paths of figures; both may be empty."""

    browse: str = ""
    figures: Sequence[str] = ()


def write_page(
    path: Path,
    report: Report,
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]] | None = None,
    beside: Beside = Beside(),
    draw: Drawings | None = None,
) -> None:
    """Write the page of a report (`medlora.reporting.report.build_report`) and of the predictions it was built from.

    `questions` maps tests to their questions; where one is not there, its letters are shown alone. `draw` has the
    figures where they were drawn before. Every text of the report, the predictions and the questions is escaped. The
    page's policy allows the one script that comes with medlora, known by its hash, and nothing from elsewhere.
    The same arguments give the same bytes.
    """
    environment = make_environment()
    tests = list(dict.fromkeys(row["test"] for row in report["stages"]))
    shown = report.get("prompt_shown")
    text = environment.get_template("page.html").render(
        report={**dict.fromkeys(_ABOUT), **report},
        stages=[row["stage"] for row in report["overall"]],
        tests=tests,
        rows={test: [row for row in report["stages"] if row["test"] == test] for test in tests},
        draw=draw or Drawings(report),
        times={name: report[name] for name in _TIMES if report.get(name) is not None},
        listing=list_changes(report, predictions, questions or {}),
        prompt_answers=[p for p in predictions if shown and (p.test, p.id) == (shown["test"], shown["id"])],
        text_limit=_TEXT_LIMIT,
        letters=LETTERS,
        letters_chosen=_list_chosen,
        beside=beside,
        tables=make_tables(report),
        script=load_script("copy.js"),
    )
    text = text.replace(_CONTENTS, _list_contents(text), 1)
    # A lone half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a replacement character.
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def _list_chosen(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The letters of a confusion's columns in order, no letter ("") last."""
    chosen = {letter for counts in confusion.values() for letter in counts} | set(confusion)
    return sorted(chosen, key=lambda letter: (not letter, letter))


_CONTENTS = "<!--contents-->"
"""Where the template wants the table of contents; texts of others are escaped, so none of them holds it."""


def _list_contents(text: str) -> str:
    sections = re.findall(r'<section id="([a-z]+)"[^>]*>\s*<h2>([^<]+)</h2>', text)
    return "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)
