"""What `report.json` holds: the rows of stages, the comparisons, and what the job reports of itself beside them."""

from __future__ import annotations

from typing import NotRequired, TypedDict, final


class Share(TypedDict):
    """A `statistics.Accuracy` as JSON."""

    correct: int
    total: int
    unparsed: int
    failed: int
    value: float
    low: float
    high: float


class Letters(TypedDict):
    """A `statistics.LetterBias` as JSON."""

    chosen: dict[str, int]
    gold: dict[str, int]
    none: int
    distance: float


class Bin(TypedDict):
    """A `statistics.ReliabilityBin` as JSON."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


class Calibrated(TypedDict):
    """A `statistics.Calibration` as JSON."""

    ece: float
    bins: list[Bin]
    counted: int
    without: int


class ByLikelihood(TypedDict):
    """How many letters of scoring `reason` are not in the text that the model wrote."""

    answers: int
    unwritten: int
    unwritten_correct: int
    kept: int
    kept_accuracy: float | None


class Kept(TypedDict):
    """Answers that have every field of the asked format, and how many of them are right."""

    answers: int
    correct: int
    accuracy: float | None
    interval: list[float] | None


class TotalRow(TypedDict):
    """A result that is known as a sum alone."""

    stage: str
    test: str
    metric: str
    correct: int
    total: int
    interval: list[float]


Curve = list[list[float]]
"""Pairs of step and value."""


class PhaseRow(TypedDict):
    """What a phase learned from, and how."""

    name: str
    description: str
    chain: str
    sources: list[str]
    replayed: list[str]
    tokens: NotRequired[int | None]
    """Of its examples, each once."""
    seconds: float | None
    tokens_per_s: float | None
    peak_memory_mib: float | None
    loss: Curve
    dev: Curve


class DataRow(TypedDict):
    """A source of the data card."""

    use: str
    source: str
    licence: str | None
    records: int
    quarantined: int


class PromptShown(TypedDict):
    """One prompt as the model saw it; `template` is whether a chat template wrote it."""

    test: str
    id: str
    text: str
    template: bool


class _Counted(TypedDict):
    interval: list[float]
    n: int
    correct: int
    unparsed: int
    failed: int
    chance: float | None
    macro: float


@final
class StageRow(_Counted):
    """One stage on one test."""

    stage: str
    test: str
    accuracy: float
    subjects: dict[str, Share]
    letters: Letters
    confusion: NotRequired[dict[str, dict[str, int]]]
    calibration: Calibrated | None
    rotations: NotRequired[dict[str, object] | None]
    format_score: NotRequired[float | None]
    total: NotRequired[float | None]
    format_kept: NotRequired[Kept | None]
    by_likelihood: NotRequired[ByLikelihood | None]


@final
class OverallRow(_Counted):
    """One stage on all its tests."""

    stage: str
    tests: list[str]
    micro: float


class PairRow(TypedDict):
    """Two stages on one test, or on all of them together where `test` is None."""

    test: str | None
    before: str
    after: str
    total: int
    gained: list[list[str]]
    lost: list[list[str]]
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float


class Report(TypedDict):
    """A report; what is not required comes from the job that made it."""

    seed: int
    resamples: int
    verdict: NotRequired[str]
    stages: list[StageRow]
    overall: list[OverallRow]
    comparisons: list[PairRow]
    remarks: NotRequired[list[str]]
    forgetting: dict[str, object]
    name: NotRequired[str]
    trial: NotRequired[str]
    created: NotRequired[str]
    notes: NotRequired[list[str]]
    phases: NotRequired[list[PhaseRow]]
    data: NotRequired[list[DataRow]]
    prompt_shown: NotRequired[PromptShown | None]
    paired: NotRequired[list[str]]
    totals: NotRequired[list[TotalRow]]
    prompts: NotRequired[str]
    seconds: NotRequired[float]
    seconds_to_first_answer: NotRequired[float | None]
    questions_asked: NotRequired[int]
    questions_per_s: NotRequired[float | None]
    phase_seconds: NotRequired[dict[str, float]]
    stage_seconds: NotRequired[dict[str, float]]
    config: NotRequired[dict[str, object]]
    versions: NotRequired[dict[str, str]]
    hashes: NotRequired[dict[str, object]]
