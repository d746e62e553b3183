"""Numbers -> small drawings as SVG text, inline in a page.

matplotlib draws them; they hold no text but numbers and the letters of options. Colours are CSS variables of the page
(`--ink`, `--muted`, `--faint`, `--stage-0` ...), so that a drawing follows the page into dark mode and onto paper. A
stage has its own colour (Okabe and Ito 2008, safe for the colour-blind) and its own marker. Lengths are CSS pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from medlora.evaluation.reports import Bin
from medlora.evaluation.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
"""How many stage colours the page has to define."""


_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


_ROLES = ("ink", "muted", "faint", *(f"stage-{i}" for i in range(COLOURS)))


_MARGIN = 8  # left and right of a scale, for what sticks out of it


TEXT = 9  # points: 12 px


@dataclass(frozen=True, slots=True)
class Scale:
    """A horizontal axis from the first to the last of its ticks."""

    ticks: tuple[float, ...]
    width: int = 220


@dataclass(frozen=True, slots=True)
class Point:
    """A value with its interval; `place` is the number of its stage, which gives it colour and marker."""

    place: int
    value: float
    low: float
    high: float


def make_scale(values: Sequence[float], width: int = 220) -> Scale:
    """A scale with round ticks that holds all `values`."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], min_n_ticks=3).tick_values(low, high)
    return Scale(tuple(round(float(tick), 6) for tick in ticks), width)


def draw_points(points: Sequence[Point], scale: Scale, reference: float | None) -> str:
    """Dots with their intervals, one under the other, and a dashed line at `reference`; fits a table's row."""
    pitch = 24 if len(points) == 1 else 10
    height = pitch * len(points) + (0 if len(points) == 1 else 8)
    figure, axes = start_figure(scale.width, height)
    _lay_scale(axes, scale, height)
    for tick in scale.ticks:
        axes.axvline(tick, color=role("faint"), linewidth=0.75)
    if reference is not None:
        axes.axvline(reference, color=role("muted"), linewidth=0.75, dashes=(3, 2.25))
    for row, point in enumerate(points):
        y = height / 2 + (len(points) - 1) * pitch / 2 - row * pitch
        colour = role(f"stage-{point.place % COLOURS}")
        axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
        _mark(axes, point.value, y, point.place, 4.4 if len(points) == 1 else 3.8)
    return finish(figure)


def draw_scale(scale: Scale, signed: bool = False) -> str:
    """The numbers of a scale, for below a column of `draw_points`."""
    figure, axes = start_figure(scale.width, 20)
    _lay_scale(axes, scale, 20)
    for tick in scale.ticks:
        text = f"{tick:+g}" if signed and tick else f"{tick:g}"
        axes.plot([tick, tick], [16, 20], color=role("muted"), linewidth=0.75)
        axes.text(tick, 3, text.replace("-", "\N{MINUS SIGN}"), ha="center", color=role("muted"), fontsize=TEXT)
    return finish(figure)


def draw_letters(gold: Mapping[str, float], chosen: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """Shares by letter: a bar where the gold share lies, a stem from it to each stage's share of choices."""
    width, height = 340, 190
    figure, axes = start_figure(width, height, left=34, bottom=24, right=4, top=8)
    highest = max([*gold.values(), *(share for _, shares in chosen for share in shares.values())])
    ticks = make_scale([0, 100 * highest]).ticks
    axes.set_xlim(-0.5, len(gold) - 0.5)
    axes.set_ylim(0, ticks[-1])
    label_ticks(axes, "y", ticks)
    axes.set_xticks(range(len(gold)), list(gold), color=role("ink"), fontsize=TEXT)
    step = min(0.2, 0.7 / len(chosen))
    for x, (letter, share) in enumerate(gold.items()):
        axes.plot([x - 0.42, x + 0.42], [100 * share] * 2, color=role("ink"), linewidth=1.5, solid_capstyle="butt")
        for i, (place, shares) in enumerate(chosen):
            at, value = x + (i - (len(chosen) - 1) / 2) * step, 100 * shares.get(letter, 0)
            axes.plot([at, at], [100 * share, value], color=role(f"stage-{place % COLOURS}"), linewidth=0.9)
            _mark(axes, at, value, place, 4)
    return finish(figure)


def draw_reliability(bins: Sequence[Bin], place: int) -> str:
    """Accuracy against confidence by bin, in %: Wilson intervals, dots whose area grows with the bin's count."""
    figure, axes = start_figure(162, 156, left=32, bottom=22, right=6, top=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    label_ticks(axes, "y", (0, 50, 100))
    label_ticks(axes, "x", (0, 50, 100))
    axes.plot([0, 100], [0, 100], color=role("muted"), linewidth=0.75, dashes=(3, 2.25))
    filled = [b for b in bins if b["count"]]
    most = max(b["count"] for b in filled)
    for b in filled:
        accuracy, confidence = b["accuracy"], b["confidence"]
        assert accuracy is not None and confidence is not None  # a bin without answers has neither
        low, high = wilson(round(accuracy * b["count"]), b["count"])
        x, colour = 100 * confidence, role(f"stage-{place % COLOURS}")
        axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=0.9, solid_capstyle="butt", clip_on=False)
        _mark(axes, x, 100 * accuracy, place, 2.5 + 4.5 * (b["count"] / most) ** 0.5)
    return finish(figure)


@cache
def draw_marker(place: int) -> str:
    """A stage's marker alone, for legends and tables."""
    figure, axes = start_figure(12, 12)
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 12)
    _mark(axes, 6, 6, place, 5)
    return finish(figure)


def start_figure(
    width: int, height: int, left: int = 0, bottom: int = 0, right: int = 0, top: int = 0
) -> tuple[Figure, Axes]:
    """A drawing of that many pixels, with margins, without ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 96, height / 96))  # CSS: 96 pixels an inch
    figure.patch.set_visible(False)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    axes = figure.add_axes(box, frameon=False)
    axes.set_xticks([])
    axes.set_yticks([])
    return figure, axes


def _lay_scale(axes: Axes, scale: Scale, height: int) -> None:
    low, high = scale.ticks[0], scale.ticks[-1]
    margin = (high - low) * _MARGIN / (scale.width - 2 * _MARGIN) or 0.5  # a single value is drawn in the middle
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0, height)


def label_ticks(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """Numbers and faint lines at the ticks of an axis, `x` or `y`."""
    for tick in ticks:
        (axes.axhline if which == "y" else axes.axvline)(tick, color=role("faint"), linewidth=0.75, clip_on=False)
    place = axes.set_yticks if which == "y" else axes.set_xticks
    place(list(ticks), [f"{tick:g}" for tick in ticks], color=role("muted"), fontsize=TEXT)
    axes.tick_params(length=0, pad=4)


def _mark(axes: Axes, x: float, y: float, place: int, size: float) -> None:
    colour = role(f"stage-{place % COLOURS}")
    axes.plot([x], [y], _MARKERS[place % len(_MARKERS)], color=colour, markersize=size, mew=0, clip_on=False, zorder=3)


def role(name: str) -> str:
    """A placeholder colour for a role of the page (`ink`, `muted`, `faint`, `stage-0` ...); `finish` writes its variable."""
    return f"#0102{_ROLES.index(name) + 16:02x}"


def finish(figure: Figure, titles: Mapping[str, str] | None = None) -> str:
    """The drawing as SVG for use inside a page: colours by variable, no style sheet, id or date.

    `titles` are shown where one points at a line: by the key for which the line's gid is `name_hover(key)`.
    """
    import matplotlib
    from markupsafe import escape

    for artist in figure.axes[0].get_children():
        artist.set_clip_on(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text, in the page's font
        figure.savefig(text, format="svg")
    svg = re.sub(r"\s*\n\s*", " ", text.getvalue()).replace("> <", "><").strip()
    svg = svg[svg.index("<svg") :]
    # A style sheet or an id inside would hold for the whole page, and a date would make every page differ.
    shapes = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', svg))
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|<g id=\"[^\"]*\"/>", "", svg)
    svg = re.sub(
        r'<use xlink:href="#(\w+)" x="([^"]*)" y="([^"]*)"',
        lambda use: f'<path d="{shapes[use[1]]}" transform="translate({use[2]} {use[3]})"',
        svg,
    )
    # Above a line lies a broad one that nobody sees, since a thin one is hard to point at.
    svg = re.sub(
        rf'<g id="{name_hover("([0-9]+)")}"><path d="([^"]*)"([^>]*)/></g>',
        r'<path d="\2"\3/><path d="\2" class="hover" data-key="\1"/>',
        svg,
    )
    svg = re.sub(r' id="[^"]*"| xmlns[:a-z]*="[^"]*"| version="[^"]*"| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"</?g>|font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"#0102([0-9a-f]{2})", lambda found: f"var(--{_ROLES[int(found[1], 16) - 16]})", svg)
    return re.sub(
        r' data-key="([0-9]+)"/>', lambda found: f"><title>{escape((titles or {})[found[1]])}</title></path>", svg
    )


def name_hover(key: str) -> str:
    """The gid of a line that shows a title; `key` is a number."""
    return f"hover-{key}"
