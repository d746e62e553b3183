"""The page's figures as SVG files of their own, for a paper or slides: labelled, in print colours, text as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markupsafe import escape

from medlora.evaluation.reports import Report, StageRow
from medlora.reporting.results.drawings import Drawings
from medlora.reporting.templates import clean, format_percent, format_points, read_template

FOLDER = "figures"
"""Beside the page."""

_FONT = "Helvetica, Arial, 'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
_EDGE, _LINE, _HEAD = 12, 24, 30
"""Pixels: the margin, the height of a row, and of a group's name."""
_NAME, _DRAWN, _NUMBERS = 180, 220, 170
"""Pixels of a row: the stage's name, the drawing, the numbers."""
_SCALE = 4 / 3
"""Pixels a point: a drawing gives its size in points."""


class FigureRow(NamedTuple):
    """A line of a figure: what it belongs to, its name, its drawing and its numbers."""

    group: str
    name: str
    drawing: str
    numbers: str


class Panel(NamedTuple):
    """A drawing of its own with a caption."""

    caption: str
    drawing: str


def write_figures(folder: Path, report: Report, draw: Drawings) -> list[str]:
    """Write the figures of a report into `folder` and return their names.

    `accuracy.svg` and `letters.svg` are always there, the others where the report has what they show. Every text of
    the report is escaped. The same report gives the same bytes.
    """
    first = report["overall"][0]["stage"]
    made = {
        "accuracy.svg": draw_rows("Right answers in %", [*_list_accuracies(report, draw)], draw.scale_of("accuracy")),
        "changes.svg": draw_rows(
            f"Change against {first} in points", [*_list_changes(report, draw)], draw.scale_of("difference")
        ),
        "letters.svg": draw_panels("Chosen letters and right ones (bars) in %", [*_list_letters(report, draw)], 2),
        "calibration.svg": draw_panels("Accuracy by confidence in %", [*_list_calibrations(report, draw)], 4),
        "training.svg": draw_panels("Training by step", [*_list_curves(report, draw)], 2),
    }
    made = {name: text for name, text in made.items() if text}
    folder.mkdir(exist_ok=True)
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
    return list(made)


def _list_accuracies(report: Report, draw: Drawings) -> Iterator[FigureRow]:
    for row in _sort_by_test(report):
        numbers = f"{format_percent(row['accuracy'])} ({' to '.join(map(format_percent, row['interval']))})"
        yield FigureRow(f"{row['test']}, n = {row['n']:,}", row["stage"], draw.accuracy_of(row), numbers)


def _sort_by_test(report: Report) -> list[StageRow]:
    tests = list(dict.fromkeys(row["test"] for row in report["stages"]))
    return sorted(report["stages"], key=lambda row: tests.index(row["test"]))


def _list_changes(report: Report, draw: Drawings) -> Iterator[FigureRow]:
    for pair in report["comparisons"]:
        if pair["before"] == report["overall"][0]["stage"]:
            group = f"{pair['test'] if pair['test'] is not None else 'all tests together'}, n = {pair['total']:,}"
            interval = f"{format_points(pair['low'])} to {format_points(pair['high'])}"
            yield FigureRow(
                group, pair["after"], draw.difference_of(pair), f"{format_points(pair['difference'])} ({interval})"
            )


def _list_letters(report: Report, draw: Drawings) -> Iterator[Panel]:
    rows = _sort_by_test(report)
    for test in dict.fromkeys(row["test"] for row in rows):
        yield Panel(test, draw.letters_of([row for row in rows if row["test"] == test]))


def _list_calibrations(report: Report, draw: Drawings) -> Iterator[Panel]:
    for row in _sort_by_test(report):
        if row["calibration"]:
            yield Panel(f"{row['stage']} on {row['test']}", draw.reliability_of(row))


def _list_curves(report: Report, draw: Drawings) -> Iterator[Panel]:
    for phase in report.get("phases") or []:
        if len(phase["loss"]) > 1:
            yield Panel(f"{phase['name']}: training loss", draw.curve_of(phase["loss"], phase["name"]))
        if phase["dev"]:
            yield Panel(f"{phase['name']}: dev accuracy in %", draw.curve_of(phase["dev"], phase["name"], True))


def draw_rows(title: str, rows: list[FigureRow], scale: str) -> str:
    """A figure with a line for each row and a scale below; empty without rows."""
    if not rows:
        return ""
    parts, y, group = [_write(_EDGE, 20, title, 14, bold=True)], float(_HEAD), ""
    at = _EDGE + _NAME
    for row in rows:
        if row.group != group:
            group = row.group
            parts.append(_write(_EDGE, y + 20, group, 13, bold=True))
            y += _HEAD
        parts += [_write(_EDGE, y + 16, row.name, 13), _place(at, y, row.drawing)]
        parts.append(_write(at + _DRAWN + 16, y + 16, row.numbers, 13))
        y += _LINE
    parts.append(_place(at, y, scale))
    return _finish(parts, _EDGE + _NAME + _DRAWN + _NUMBERS, y + _HEAD)


def draw_panels(title: str, panels: list[Panel], across: int) -> str:
    """A figure of several drawings of one size, with captions above them; empty without panels."""
    if not panels:
        return ""
    sizes = [_measure(panel.drawing) for panel in panels]
    width, height = (max(size[i] for size in sizes) for i in (0, 1))
    parts = [_write(_EDGE, 20, title, 14, bold=True)]
    for i, panel in enumerate(panels):
        x, y = _EDGE + i % across * (width + 2 * _EDGE), _HEAD + i // across * (height + _HEAD + _EDGE)
        parts += [_write(x, y + 18, panel.caption, 12), _place(x, y + _HEAD - 4, panel.drawing)]
    columns, lines = min(across, len(panels)), -(-len(panels) // across)
    return _finish(parts, _EDGE + columns * (width + 2 * _EDGE), _HEAD + lines * (height + _HEAD + _EDGE))


def _write(x: float, y: float, text: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{weight}>{escape(clean(" ".join(text.split())))}</text>'


def _place(x: float, y: float, drawing: str) -> str:
    width, height = _measure(drawing)
    colours = _read_colours()
    drawing = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], drawing)
    return re.sub(
        r'^<svg width="[^"]*" height="[^"]*"',
        f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" overflow="visible"',
        drawing,
    )


def _measure(drawing: str) -> tuple[float, float]:
    found = re.match(r'<svg width="([\d.]+)pt" height="([\d.]+)pt"', drawing)
    assert found, drawing[:80]
    return float(found[1]) * _SCALE, float(found[2]) * _SCALE


def _finish(parts: Iterable[str], width: float, height: float) -> str:
    """One file that needs nothing else: the page's colours by day, on white paper."""
    colours = _read_colours()
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="{_FONT}" fill="{colours["ink"]}">\n<rect width="100%" height="100%" fill="{colours["paper"]}"/>\n'
        f"{body}\n</svg>\n"
    )


@cache
def _read_colours() -> dict[str, str]:
    style = read_template("page.css")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", style[: style.index("@media")]))
