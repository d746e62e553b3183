"""The figures of a plan: of one phase, and of the whole run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from medlora.planning.lengths import SourceLengths


@dataclass(frozen=True)
class PhasePlan:
    """What one phase will do. A figure that cannot be known before the run is None."""

    name: str
    state: str
    """`finished`, `resumes`, `changed` or `new`."""
    chain: tuple[str, ...]
    """The stage's adapters, oldest first; the last is trained."""
    sources: tuple[SourceLengths, ...]
    rows: int | None
    """Of one epoch."""
    global_batch: int
    steps: int | None
    full_prompt_steps: int
    """At most so many steps with a worked example, before `steps`."""
    epochs: float | None
    tokens: int | None
    """In all steps."""
    trainable: int | None
    memory_bytes: dict[str, int] | None
    """Of one worker, by part; an estimate."""
    pass_rows: int | None
    """Rows of the forward pass that it is of. With `batch_size: auto` on CUDA a dry run has the last word; 1 on an unknown card."""
    workers: int
    adapter_bytes: int | None
    checkpoint_bytes: int | None
    seconds: float | None
    rate: str
    """Where the rate was measured that `seconds` comes from."""
    cut_answers: dict[str, tuple[int, int]]
    """For each dev source with written answers: how many are longer than `validation.max_tokens`, of how many."""

    @property
    def is_left(self) -> bool:
        """Whether it has to be trained."""
        return self.state != "finished"


@dataclass(frozen=True)
class RunPlan:
    """What a run will do."""

    name: str
    place: str
    base: str
    parameters: int | None
    quantization: str
    shape_basis: str
    device: str
    """`cuda` or `cpu`: what memory is estimated for."""
    phases: tuple[PhasePlan, ...]
    stages: int
    questions: dict[str, int]
    """Of each test."""
    scoring: str
    asked: int
    """Questions x stages, and x samples or orders of the options where the config asks for them."""
    left_out_records: int
    evaluation_s: float | None = None
    """By the answers per second of an earlier evaluation on the same base, starting its actors included."""
    cluster: str = ""
    warnings: tuple[str, ...] = field(default=())

    @property
    def disk_bytes(self) -> int | None:
        """What the phases that are left will hold on disk at most, checkpoints of one phase at a time."""
        left = [phase for phase in self.phases if phase.is_left]
        if any(phase.adapter_bytes is None for phase in left):
            return None
        return sum(phase.adapter_bytes or 0 for phase in left) + max(
            (phase.checkpoint_bytes or 0 for phase in left), default=0
        )

    @property
    def seconds(self) -> float | None:
        """Of training alone, all phases that are left; None where one is not known."""
        known = [phase.seconds for phase in self.phases if phase.is_left]
        return None if None in known else sum(seconds or 0 for seconds in known)

    def as_plain(self) -> dict[str, object]:
        """The plan as plain values for JSON."""
        return {**asdict(self), "disk_bytes": self.disk_bytes, "seconds": self.seconds}
