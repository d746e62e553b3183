"""Which job a config is for, by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medlora.errors import InputError

_JOBS = {
    "RunConfig": ("a run's", "jobs/curriculum.py"),
    "EvaluateConfig": ("an evaluation's", "jobs/evaluate_mcq.py"),
    "SweepConfig": ("a sweep's", "jobs/sweep.py"),
}
"""By the model of a job's config: whose it is, and the job that reads it."""


def refuse_other_job(path: Path, raw: Mapping[str, object], model: type[object]) -> None:
    """Raise InputError where a config that is not valid for this job is one of another."""
    found = _recognise_job(raw)
    if found is None or model.__name__ not in _JOBS or found == model.__name__:
        return
    (whose, other), (wanted, job) = _JOBS[found], _JOBS[model.__name__]
    raise InputError(f"{path}: this is {whose} config: python {other} --config {path} ({job} reads {wanted} config)")


def _recognise_job(raw: Mapping[str, object]) -> str | None:
    if "base" in raw and "phases" in raw:
        return "RunConfig"
    if "space" in raw or "config" in raw:
        return "SweepConfig"
    return "EvaluateConfig" if "stages" in raw else "RunConfig" if "phases" in raw else None
