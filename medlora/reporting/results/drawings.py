"""A report's figures, each drawn once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from medlora.evaluation.reports import Curve, OverallRow, PairRow, Report, StageRow
from medlora.records import LETTERS
from medlora.reporting import svg as shapes
from medlora.reporting.results.story import draw_curve

if TYPE_CHECKING:
    from markupsafe import Markup


class Drawings:
    """The figures of a report: SVG that needs no escaping, for it holds none of the data's text."""

    def __init__(self, report: Report) -> None:
        self.report = report  # while it lives, no other row can have the identity of one of its rows
        self.drawn: dict[tuple[object, ...], Markup] = {}
        self.places = {row["stage"]: place for place, row in enumerate(report["overall"])}
        scored = [*report["stages"], *report["overall"]]
        ends = [end for row in scored for end in row["interval"]]
        chances = [row["chance"] for row in scored if row["chance"] is not None]
        self.accuracy = shapes.make_scale([100 * x for x in [*ends, *chances]])
        pairs = report["comparisons"]
        self.difference = shapes.make_scale([0, *(100 * end for pair in pairs for end in (pair["low"], pair["high"]))])
        self.subject = shapes.make_scale([0, 100])

    def accuracy_of(self, row: StageRow | OverallRow) -> Markup:
        """One stage's accuracy with its interval; dashed: chance."""
        point, chance = self._point(row["stage"], row), _percent(row["chance"])
        return self._draw(("accuracy", id(row)), lambda: shapes.draw_points([point], self.accuracy, chance))

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
        point = shapes.Point(self.places[pair["after"]], *ends)
        return self._draw(("difference", id(pair)), lambda: shapes.draw_points([point], self.difference, 0))

    def scale_of(self, name: str) -> Markup:
        """The numbers under a column of one of the three kinds above."""
        return self._draw(("scale", name), lambda: shapes.draw_scale(getattr(self, name), name == "difference"))

    def letters_of(self, rows: Sequence[StageRow]) -> Markup:
        """Chosen against gold letters of all stages on one test."""
        golds = rows[0]["letters"]["gold"]
        names = [x for x in LETTERS if any(x in row["letters"]["gold"] for row in rows)]
        gold = {x: golds.get(x, 0) / (sum(golds.values()) or 1) for x in names}
        chosen = [(self.places[row["stage"]], _shares(row["letters"]["chosen"])) for row in rows]
        return self._draw(("letters", id(rows[0])), lambda: shapes.draw_letters(gold, chosen))

    def reliability_of(self, row: StageRow) -> Markup:
        """Accuracy against confidence of one stage on one test."""
        calibration = row["calibration"]
        assert calibration is not None  # the template draws no other row
        bins, place = calibration["bins"], self.places[row["stage"]]
        return self._draw(("reliability", id(row)), lambda: shapes.draw_reliability(bins, place))

    def curve_of(self, points: Curve, stage: str, percent: bool = False) -> Markup:
        """A phase's loss or dev accuracy by step, in its stage's colour."""
        return self._draw(("curve", id(points)), lambda: draw_curve(points, self.places.get(stage, 0), percent))

    def marker_of(self, stage: str) -> Markup:
        """The stage's sign."""
        return _safe(shapes.draw_marker(self.places[stage]))

    def _draw(self, what: tuple[object, ...], draw: Callable[[], str]) -> Markup:
        if what not in self.drawn:
            self.drawn[what] = _safe(draw())
        return self.drawn[what]

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
