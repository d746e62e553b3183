"""What `sweep.json` holds."""

from __future__ import annotations

from typing import TypedDict


class ComparedPair(TypedDict):
    """A trial against the unchanged config, on all of dev."""

    after: str
    total: int
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    gained: int
    lost: int


class ComparedRow(TypedDict):
    """A trial's accuracy on all of dev."""

    trial: str
    accuracy: float
    interval: list[float]
    n: int


class Comparison(TypedDict):
    """The unchanged config and the best trials, on all of dev."""

    stages: list[ComparedRow]
    pairs: list[ComparedPair]
    created: str | None


class FinalRow(TypedDict):
    """The winner on one test."""

    test: str
    accuracy: float
    interval: list[float]
    n: int


class Record(TypedDict):
    """What the winner scored on the tests."""

    trial: str
    created: str
    tests: list[FinalRow]


class TrialRow(TypedDict):
    """A trial in `sweep.json`."""

    id: str
    state: str
    params: dict[str, object]
    about: dict[str, object]
    score: float | None
    step: int
    reports: list[dict[str, float]]
    seconds: float
    deaths: int
    why: str


class Summary(TypedDict):
    """What `sweep.json` holds."""

    name: str
    created: str
    config: dict[str, object]
    searched: list[str]
    scoring: str
    space: dict[str, object]
    trials: list[TrialRow]
    states: dict[str, int]
    importance: dict[str, float]
    winner: str
    dev: Comparison
    test: Record | None
    concurrency: int
    notes: list[str]
    exhausted: bool
    trial_seconds: float
    versions: dict[str, str]
