"""A sweep's summary -> one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.reporting.svg import TEXT, finish, label_ticks, make_scale, name_hover, role, start_figure
from medlora.reporting.templates import clean, make_environment
from medlora.sweep.ledger import BEST, START
from medlora.sweep.results import describe_pair
from medlora.sweep.space import Domain, Params, Range, format_value, parse_domain
from medlora.sweep.summary import Summary, TrialRow


def write_sweep_page(path: Path, summary: Summary) -> None:
    """Write the page of a sweep (`medlora.sweep.results.write_results`) beside its other files.

    It shows the best config and links to the trials and reports that are in the same folder. Every text is escaped; the page's policy allows no script and nothing from elsewhere. The same summary
    in the same folder gives the same bytes.
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
    home, best = path.parent, path.parent / BEST
    text = environment.get_template("sweep_page.html").render(
        sweep=summary,
        start=START,
        margin=MARGIN,
        keys=list(domains),
        ranked=ranked,
        best=best.read_text(encoding="utf-8") if best.is_file() else "",
        saving=describe_saving(summary["trials"]),
        folders={trial["id"] for trial in ranked if (home / "trials" / trial["id"]).is_dir()},
        reports=[name for name in ("dev", "test") if (home / name / "report.html").is_file()],
        pairs={pair["after"]: describe_pair(pair) for pair in summary["dev"]["pairs"]},
        parallel=Markup(draw_parallel(lines, domains)),
        curves=Markup(draw_curves(lines)),
        kinds=[
            kind for kind in ("start", "winner", "finished", "stopped", "failed") if kind in {x.kind for x in lines}
        ],
    )
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def describe_saving(trials: Sequence[TrialRow]) -> str:
    """What stopping early saved, against training every stopped trial to the end; empty where nothing was stopped."""
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    full = max((trial["step"] for trial in trials if trial["state"] == "finished"), default=0)
    saved = sum(max(0, full - trial["step"]) for trial in stopped)
    if not saved:
        return ""
    planned = full * sum(trial["state"] in ("finished", "stopped") for trial in trials)
    timed = [trial for trial in trials if trial["step"]]
    step_s = sum(trial["seconds"] for trial in timed) / sum(trial["step"] for trial in timed)
    return (
        f"Stopping {len(stopped)} trial{'s' * (len(stopped) != 1)} early saved {saved:,} of {planned:,} steps ({saved / planned:.0%}): about "
        f"{saved * step_s:,.0f} s of trials, at their mean speed."
    )


def make_line(trial: TrialRow, winner: str) -> Line:
    """A trial as it is drawn."""
    kind = trial["state"] if trial["state"] in ("finished", "stopped") else "failed"
    kind = "start" if trial["id"] == START else "winner" if trial["id"] == winner else kind
    curve = [(int(row["step"]), 100 * row["score"]) for row in trial["reports"]]
    return Line(kind, trial["params"], curve, trial["id"])


_WIDTH, MARGIN = 832, 70
"""Pixels of a drawing, and of the room left and right of the outer axes: the page puts their names there."""


_LOOKS = {
    "start": ("stage-1", 1.8, 1.0),
    "winner": ("stage-2", 1.8, 1.0),
    "finished": ("stage-3", 1.1, 0.9),
    "stopped": ("muted", 0.75, 0.55),
    "failed": ("stage-4", 0.75, 0.9),
}
"""Role, width and opacity of a trial's line, by what it is."""


@dataclass(frozen=True)
class Line:
    """A trial as it is drawn: what it is (a key of the looks), its values, its scores by step in %."""

    kind: str
    params: Params
    curve: Sequence[tuple[int, float]]
    id: str = "0"

    @property
    def title(self) -> str:
        """What is shown where one points at the line."""
        score = f", dev {self.curve[-1][1]:.1f} % at step {self.curve[-1][0]:,}" if self.curve else ""
        values = "".join(f"\n{key} = {format_value(value)}" for key, value in self.params.items())
        return clean(f"trial {self.id}, {self.kind}{score}{values}")


def draw_parallel(lines: Sequence[Line], domains: Mapping[str, Domain]) -> str:
    """A vertical axis for each key and one for the last dev score; the page names them below."""
    keys = list(domains)
    figure, axes = start_figure(_WIDTH, 250, left=MARGIN, bottom=10, right=MARGIN, top=12)
    axes.set_xlim(0, len(keys))
    axes.set_ylim(0, 1)
    scores = [line.curve[-1][1] for line in lines if line.curve]
    places = [_place([line.params[key] for line in lines], domain) for key, domain in domains.items()]
    places.append(_lay([min(scores, default=0.0), max(scores, default=0.0)], False, "{:.1f}"))
    for x, (_, ticks) in enumerate(places):
        axes.plot([x, x], [0, 1], color=role("ink"), linewidth=0.9)
        for at, text in ticks:
            side = 1 if x == len(keys) else -1
            axes.text(
                x + side * 0.012 * len(keys),
                at,
                text.replace("-", "\N{MINUS SIGN}"),
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=TEXT,
                color=role("muted"),
                parse_math=False,
            )
    for line in _sort(lines):
        heights = [place(line.params[key]) for key, (place, _) in zip(keys, places, strict=False)]
        heights += [places[-1][0](line.curve[-1][1])] if line.curve else []
        colour, width, opacity = _LOOKS[line.kind]
        axes.plot(
            range(len(heights)), heights, color=role(colour), linewidth=width, alpha=opacity, gid=name_hover(line.id)
        )
    return finish(figure, {line.id: line.title for line in lines})


Axis = tuple[Callable[[Any], float], list[tuple[float, str]]]
"""Value -> height in [0, 1], and the ticks: their heights and texts."""


def _place(values: Sequence[Any], domain: Domain) -> Axis:
    """An axis that holds all values: a tick each for those of a choice, three for a range, by its logarithm if it is one of ratios.

    The unchanged config may lie outside of the domain.
    """
    if isinstance(domain, Range):
        return _lay([domain.low, domain.high, *values], domain.log and min(values) > 0, "{:.2g}")
    extra = [value for value in values if value not in domain.values]
    names = list(dict.fromkeys(format_value(value) for value in [*domain.values, *extra]))
    steps = {name: _inside(i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    return lambda value: steps[format_value(value)], [(at, name) for name, at in steps.items()]


def _lay(values: Sequence[float], log: bool, form: str) -> Axis:
    low, high = float(min(values)), float(max(values))
    if low == high:
        return lambda value: 0.5, [(0.5, form.format(low))]
    bend = math.log if log else float

    def place(value: float) -> float:
        return _inside((bend(value) - bend(low)) / (bend(high) - bend(low)))

    middle = math.sqrt(low * high) if log else (low + high) / 2
    return place, [(place(value), form.format(value)) for value in (low, middle, high)]


def _inside(share: float) -> float:
    """A little away from the ends of an axis."""
    return 0.06 + 0.88 * share


def draw_curves(lines: Sequence[Line]) -> str:
    """Dev score in % by step; a cross where the scheduler stopped a trial, a dot where one was done."""
    figure, axes = start_figure(_WIDTH, 300, left=40, bottom=26, right=12, top=10)
    points = [point for line in lines for point in line.curve]
    steps, scores = [step for step, _ in points] or [0, 1], [score for _, score in points] or [0, 1]
    across, up = make_scale([0, max(steps)]).ticks, make_scale([min(scores), max(scores)]).ticks
    axes.set_xlim(0, max(steps) * 1.01)
    axes.set_ylim(up[0], up[-1])
    label_ticks(axes, "y", up)
    label_ticks(axes, "x", [tick for tick in across if tick <= max(steps)])
    for line in _sort(lines):
        if line.curve:
            colour, width, opacity = _LOOKS[line.kind]
            # A score alone is drawn as a line of no length, so that one can point at it, too.
            xs, ys = zip(*(line.curve if len(line.curve) > 1 else [*line.curve, *line.curve]), strict=True)
            axes.plot(xs, ys, color=role(colour), linewidth=width, alpha=opacity, gid=name_hover(line.id))
            marker, size = ("x", 5.5) if line.kind == "stopped" else ("o", 4.5)
            end = line.curve[-1]
            axes.plot([end[0]], [end[1]], marker, color=role(colour), markersize=size, mew=1.2 if marker == "x" else 0)
    return finish(figure, {line.id: line.title for line in lines})


def _sort(lines: Sequence[Line]) -> list[Line]:
    """The ones that matter last, on top."""
    order = ("failed", "stopped", "finished", "start", "winner")
    return sorted(lines, key=lambda line: order.index(line.kind))
