"""A report -> one HTML page that needs nothing else: readable offline, on paper, in the dark, without any script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import Curve, OverallRow, PairRow, Report, StageRow
from medlora.records import LETTERS, McqRecord
from medlora.reporting import svg as shapes
from medlora.reporting.changes import _TEXT_LIMIT, list_changes
from medlora.reporting.results.story import draw_curve
from medlora.reporting.templates import make_environment

if TYPE_CHECKING:
    from markupsafe import Markup

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
    "prompts",
    *_TIMES,
    "phase_seconds",
    "stage_seconds",
    "config",
    "versions",
    "hashes",
)
"""What a report may hold beside what is computed."""


def write_page(
    path: Path,
    report: Report,
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]] | None = None,
    browse: str = "",
) -> None:
    """Write the page of a report (`medlora.reporting.report.build_report`) and of the predictions it was built from.

    `questions` maps tests to their questions; where one is not there, its letters are shown alone.
    `browse` names a page of all questions beside this one, "" where there is none. Every text of the
    report, the predictions and the questions is escaped; the page's policy allows no script and nothing from elsewhere.
    The same arguments give the same bytes.
    """
    environment = make_environment()
    tests = list(dict.fromkeys(row["test"] for row in report["stages"]))
    stages = [row["stage"] for row in report["overall"]]
    text = environment.get_template("page.html").render(
        report={**dict.fromkeys(_ABOUT), **report},
        stages=stages,
        tests=tests,
        rows={test: [row for row in report["stages"] if row["test"] == test] for test in tests},
        draw=Drawings(report, stages),
        times={name: report[name] for name in _TIMES if report.get(name) is not None},
        listing=list_changes(report, predictions, questions or {}),
        text_limit=_TEXT_LIMIT,
        letters=LETTERS,
        letters_chosen=_list_chosen,
        browse=browse,
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
    sections = re.findall(r'<section id="([a-z]+)">\s*<h2>([^<]+)</h2>', text)
    return "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)


class Drawings:
    """The page's figures, asked for by the template: SVG that needs no escaping, for it holds none of the data's text."""

    def __init__(self, report: Report, stages: Sequence[str]) -> None:
        self.places = {stage: place for place, stage in enumerate(stages)}
        scored = [*report["stages"], *report["overall"]]
        ends = [end for row in scored for end in row["interval"]]
        chances = [row["chance"] for row in scored if row["chance"] is not None]
        self.accuracy = shapes.make_scale([100 * x for x in [*ends, *chances]])
        pairs = report["comparisons"]
        self.difference = shapes.make_scale([0, *(100 * end for pair in pairs for end in (pair["low"], pair["high"]))])
        self.subject = shapes.make_scale([0, 100])

    def accuracy_of(self, row: StageRow | OverallRow) -> Markup:
        """One stage's accuracy with its interval; dashed: chance."""
        return _safe(shapes.draw_points([self._point(row["stage"], row)], self.accuracy, _percent(row["chance"])))

    def subject_of(self, rows: Iterable[StageRow], subject: str) -> Markup:
        """All stages' accuracies on one subject."""
        given = [row for row in rows if subject in row["subjects"]]
        points = [
            shapes.Point(
                self.places[row["stage"]], *(100 * row["subjects"][subject][x] for x in ("value", "low", "high"))
            )
            for row in given
        ]
        return _safe(shapes.draw_points(points, self.subject, _percent(given[0]["chance"])))

    def difference_of(self, pair: PairRow) -> Markup:
        """A difference with its interval; dashed: none."""
        ends = (100 * pair["difference"], 100 * pair["low"], 100 * pair["high"])
        return _safe(shapes.draw_points([shapes.Point(self.places[pair["after"]], *ends)], self.difference, 0))

    def scale_of(self, name: str) -> Markup:
        """The numbers under a column of one of the three kinds above."""
        return _safe(shapes.draw_scale(getattr(self, name), signed=name == "difference"))

    def letters_of(self, rows: Sequence[StageRow]) -> Markup:
        """Chosen against gold letters of all stages on one test."""
        golds = rows[0]["letters"]["gold"]
        names = [x for x in LETTERS if any(x in row["letters"]["gold"] for row in rows)]
        gold = {x: golds.get(x, 0) / (sum(golds.values()) or 1) for x in names}
        chosen = [(self.places[row["stage"]], _shares(row["letters"]["chosen"])) for row in rows]
        return _safe(shapes.draw_letters(gold, chosen))

    def reliability_of(self, row: StageRow) -> Markup:
        """Accuracy against confidence of one stage on one test."""
        calibration = row["calibration"]
        assert calibration is not None  # the template draws no other row
        return _safe(shapes.draw_reliability(calibration["bins"], self.places[row["stage"]]))

    def curve_of(self, points: Curve, stage: str, percent: bool = False) -> Markup:
        """A phase's loss or dev accuracy by step, in its stage's colour."""
        return _safe(draw_curve(points, self.places.get(stage, 0), percent))

    def marker_of(self, stage: str) -> Markup:
        """The stage's sign."""
        return _safe(shapes.draw_marker(self.places[stage]))

    def _point(self, stage: str, row: StageRow | OverallRow) -> shapes.Point:
        value = row["accuracy"] if "accuracy" in row else row["micro"]
        return shapes.Point(self.places[stage], 100 * value, *(100 * end for end in row["interval"]))


def _safe(svg: str) -> Markup:
    from markupsafe import Markup

    return Markup(svg)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {letter: count / total for letter, count in counts.items()}
