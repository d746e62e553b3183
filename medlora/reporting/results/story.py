"""What a run's phases learned from and how: plain values for the report, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medlora.config.phase import PhaseConfig
from medlora.evaluation.reports import Curve, DataRow, PhaseRow
from medlora.reporting import svg as shapes
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder

_POINTS = 200
"""Most points of a curve on the page."""


def describe_phases(
    run: RunFolder, phases: Sequence[PhaseConfig], manifests: Mapping[str, Mapping[str, Any]]
) -> list[PhaseRow]:
    """A row for each phase: what it is for, what it learned from, what it took, and its curves."""
    rows: list[PhaseRow] = []
    for phase in phases:
        steps = read_json_lines(run.phase(phase.name).metrics, keys=("segment", "step", "loss"))
        dev = read_json_lines(run.phase(phase.name).validation, keys=("segment", "step"))
        seconds = manifests.get(phase.name, {}).get("seconds", {})
        rows.append(
            {
                "name": phase.name,
                "description": phase.description,
                "chain": phase.chain,
                "sources": [source.source for source in phase.sources],
                "replayed": [f"{replay.share:.0%} of {replay.phase}" for replay in phase.replay],
                "tokens": sum_counts(manifests.get(phase.name, {}).get("counts"), "tokens"),
                "seconds": round(seconds["all"] - seconds.get("base", 0.0), 2) if "all" in seconds else None,
                "tokens_per_s": max((float(row.get("tokens_per_s") or 0) for row in steps), default=None),
                "peak_memory_mib": max((float(row.get("peak_memory_mib") or 0) for row in steps), default=None),
                "loss": _make_curve(steps, "loss"),
                "dev": _make_curve(dev, "accuracy"),
            }
        )
    return rows


def sum_counts(counts: object, name: str) -> int | None:
    """A count over the sources of a phase: of each as much as the segment that has most of it; None where it is not known."""
    most: dict[str, int] = {}
    for sources in counts.values() if isinstance(counts, Mapping) else ():
        for source, figures in sources.items():
            if name in figures:  # earlier versions counted less
                most[source] = max(most.get(source, 0), int(figures[name]))
    return sum(most.values()) if most else None


def describe_data(card: Mapping[str, Any]) -> list[DataRow]:
    """The data card as rows: each source with its counts and licence, training data first."""
    return [
        {
            "use": use,
            "source": str(part["source"]),
            "licence": part.get("licence"),
            "records": int(part["records"]),
            "quarantined": sum(part.get("quarantine", {}).values()),
        }
        for use, key in (("training", "training"), ("dev and test", "held_out"))
        for part in card.get(key, {}).values()
    ]


def _make_curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Points of a figure by step; a second segment counts on from where the first one ended."""
    points: Curve = []
    base = last = 0
    segment = None
    for row in rows:
        if segment is not None and row["segment"] != segment:
            base += last
        segment, last = row["segment"], int(row["step"])
        if name in row:
            points.append([base + last, float(row[name])])
    every = max(1, -(-len(points) // _POINTS))
    return [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]


def draw_curve(points: Curve, place: int, percent: bool = False) -> str:
    """A line by step; `percent` is an axis from 0 to 100 for shares."""
    figure, axes = shapes.start_figure(250, 130, left=36, bottom=22, right=12, top=8)
    values = [100 * value if percent else value for _, value in points]
    steps = [step for step, _ in points]
    ticks = (0.0, 50.0, 100.0) if percent else shapes.make_scale(values).ticks
    across = shapes.make_scale([0, *steps]).ticks
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_xlim(0, across[-1])
    shapes.label_ticks(axes, "y", ticks)
    shapes.label_ticks(axes, "x", across[:: max(1, len(across) // 4)])
    colour = shapes.role(f"stage-{place % shapes.COLOURS}")
    axes.plot(steps, values, color=colour, linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=3)
    return shapes.finish(figure)
