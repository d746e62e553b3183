"""A plan as people read it: a table for the terminal, a few lines for a run's log."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from medlora.planning.figures import PhasePlan, RunPlan
from medlora.reporting.progress import describe_seconds

_STATES = {
    "finished": "finished, is reused",
    "resumes": "resumes from its checkpoint",
    "changed": "made from something else",
    "new": "is trained",
}


def describe_plan(plan: RunPlan) -> list[str]:
    """The plan in a few lines, for a log."""
    lines = [f"plan: base {plan.base} ({_count(plan.parameters)} parameters, {plan.quantization}), on {plan.device}"]
    for phase in plan.phases:
        learns = f"{_count(phase.steps)} steps of {phase.global_batch} rows, {_count(phase.tokens)} tokens"
        takes = f", memory about {_size(sum(phase.memory_bytes.values()))}" if phase.memory_bytes else ""
        lines.append(
            f"plan: phase {phase.name} {_STATES[phase.state]}: {learns}, {_count(phase.trainable)} trainable{takes}, "
            + (f"time {phase.rate}" if phase.seconds is None else f"about {_time(phase.seconds)} ({phase.rate})")
        )
    if plan.questions:
        lines.append(f"plan: evaluation asks {plan.asked:,} times ({plan.stages} stages, scoring {plan.scoring})")
    lines += [f"plan: beware: {warning}" for warning in plan.warnings]
    return lines


def print_plan(plan: RunPlan) -> None:
    """The whole plan, as tables."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(f"run {plan.name} in {plan.place}", markup=False)
    console.print(
        f"base {plan.base}: {_count(plan.parameters)} parameters, {plan.quantization} (by {plan.shape_basis})",
        markup=False,
    )
    table = Table("phase", "what happens", "adapters", "steps", "batch", "epochs", "tokens", "trainable", "time")
    for phase in plan.phases:
        full = f"{phase.full_prompt_steps} + " if phase.full_prompt_steps else ""
        epochs = f"{phase.epochs:g}" if phase.epochs is not None else "?"
        cells = [phase.name, _STATES[phase.state], " + ".join(phase.chain), f"{full}{_count(phase.steps)}"]
        cells += [str(phase.global_batch), epochs, _count(phase.tokens), _count(phase.trainable), _time(phase.seconds)]
        table.add_row(*cells)
    console.print(table)
    console.print(_make_sources(plan))
    if any(phase.memory_bytes for phase in plan.phases):
        console.print(_make_memory(plan))
    for line in _describe_rest(plan):
        console.print(line, markup=False)


def _make_sources(plan: RunPlan) -> Table:
    table = Table("phase", "learns from", "kind", "records", "rows", "tokens", "counted on")
    for phase in plan.phases:
        for i, source in enumerate(phase.sources):
            cells = [phase.name if not i else "", source.source, source.kind, f"{source.records:,}"]
            table.add_row(*cells, _count(source.rows), _count(source.tokens), source.basis)
    return table


def _make_memory(plan: RunPlan) -> Table:
    parts = next(phase.memory_bytes for phase in plan.phases if phase.memory_bytes)
    table = Table(f"memory of a worker ({plan.device})", "rows a pass", *parts, "together")
    for phase in plan.phases:
        if phase.memory_bytes:
            sizes = [_size(size) for size in phase.memory_bytes.values()]
            table.add_row(phase.name, str(phase.pass_rows), *sizes, _size(sum(phase.memory_bytes.values())))
    return table


def _describe_rest(plan: RunPlan) -> list[str]:
    left = [phase for phase in plan.phases if phase.is_left]
    lines = []
    if left:
        lines.append("memory: activations are an estimate by formula; a dry run measures them before the first step")
        known = f"about {_time(plan.seconds)} of training alone; " if plan.seconds is not None else ""
        lines.append(f"time: {known}{_describe_rates(left)}")
        lines.append(f"disk: at most {_size(plan.disk_bytes)} for adapters and checkpoints")
    if plan.left_out_records:
        lines.append(f"data: {plan.left_out_records:,} records are left out by data.overlap or data.dedupe")
    if plan.questions:
        tests = ", ".join(f"{name} {n:,}" for name, n in plan.questions.items())
        lines.append(
            f"evaluation: {tests} questions x {plan.stages} stages, scoring {plan.scoring}: {plan.asked:,} answers"
            + (f", about {_time(plan.evaluation_s)}" if plan.evaluation_s is not None else "")
        )
    if plan.cluster:
        lines.append(f"cluster: {plan.cluster}")
    return [*lines, *(f"beware: {warning}" for warning in plan.warnings)]


def _describe_rates(phases: list[PhasePlan]) -> str:
    bases = list(dict.fromkeys(phase.rate for phase in phases))
    return "; ".join(bases)


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _size(n: int | None) -> str:
    if n is None:
        return "?"
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else describe_seconds(seconds)
