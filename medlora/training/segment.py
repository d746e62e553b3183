"""The segments of a phase, from its rows to what `trainer.train` is given, and the worker that trains them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch.distributed as dist

from medlora.config.base import McqStyle
from medlora.config.phase import PhaseConfig
from medlora.curriculum.tracking import Tracking
from medlora.events import OnEvent
from medlora.records import McqRecord
from medlora.seeds import derive_seed
from medlora.tokens.phase_rows import Drawn, PreparedPart, draw_rows
from medlora.tokens.rows import Row
from medlora.training.validation import Validator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MOST_TRIED = 64
"""Rows of the largest forward pass that a dry run tries."""


class SegmentFigures(TypedDict):
    """What became of a segment, in figures."""

    segment: str
    steps: int
    planned_steps: int
    stopped_early: bool
    last_loss: float | None
    train_s: float
    validation_s: float
    resumed_from_step: int | None
    optimizer: str


class FittedFigures(SegmentFigures):
    """The same with what fitted into memory, for the manifest."""

    batch_size: int
    accumulation: int
    gradient_checkpointing: bool | Literal["auto"]
    padding: float


@dataclass(frozen=True)
class Segment:
    """A part of a phase with one optimiser and one schedule: the whole phase, or its part in one prompt style.

    `validate` scores the model as it is now. `stop_at_format_score` ends the segment once that score is reached.
    """

    name: str
    rows: Sequence[Row]
    """In training order, repeated over epochs: steps x global batch of them."""
    steps: int
    epoch_steps: int
    longest: Sequence[Row] = ()
    """The longest of them, the longest first; the dry run measures the memory of a step with these."""
    validate: Callable[[PreTrainedModel], dict[str, float]] | None = None
    stop_at_format_score: float | None = None
    name_rows: Callable[[Sequence[int]], list[str]] | None = None
    """Which records the rows at these places are made from."""
    seed: int = 0


@dataclass(frozen=True)
class SegmentRows:
    """The rows of a segment by source, and the style in which its prompts are written."""

    name: str
    style: McqStyle
    parts: dict[str, PreparedPart]

    @property
    def count(self) -> int:
        """Rows of one epoch."""
        return sum(part.part.size for part in self.parts.values())

    def bind(
        self, validator: Validator | None, worked: McqRecord | None
    ) -> Callable[[PreTrainedModel], dict[str, float]] | None:
        """What scores the model in this segment; full prompts are scored with full prompts."""
        if validator is None:
            return None
        style = self.style if self.name == "full" else None
        return lambda model: validator.score(model, style, worked)


def count_rows(segments: Sequence[SegmentRows]) -> dict[str, dict[str, dict[str, int]]]:
    """Examples, rows and tokens of each source of each segment."""
    return {each.name: {key: asdict(part.rows.lengths) for key, part in each.parts.items()} for each in segments}


def draw(rows: SegmentRows, phase: PhaseConfig, batch: int, seed: int) -> Drawn:
    """The rows of a segment in training order; `batch` counts the rows of a step over all workers."""
    if rows.name == "full" and phase.full_prompt:
        steps = phase.full_prompt.max_steps
    else:
        steps = phase.max_steps or max(1, round(phase.epochs * rows.count / batch + 0.499))
    return draw_rows(rows.parts, steps * batch, phase.weights == "tokens", seed)


def make_segment(
    rows: SegmentRows,
    drawn: Drawn,
    phase: PhaseConfig,
    batch: int,
    seed: int,
    validate: Callable[[PreTrainedModel], dict[str, float]] | None,
) -> Segment:
    """The segment that trains on the rows as they were drawn."""
    full = phase.full_prompt if rows.name == "full" else None
    return Segment(
        name=rows.name,
        rows=drawn,
        steps=len(drawn) // batch,
        epoch_steps=max(1, -(-rows.count // batch)),
        longest=drawn.find_longest(max(2, min(batch, MOST_TRIED))),
        validate=validate,
        name_rows=drawn.name_rows,
        stop_at_format_score=full.until_format_score if full else None,
        seed=derive_seed(seed, rows.name),
    )


@dataclass(frozen=True)
class Worker:
    """One of the processes that train a phase together: its device, its rank, and its way to report to the driver.

    `on_event` takes events; only the first worker reports. `is_leaving` is whether the node is about to be taken away.
    """

    device: str
    on_event: OnEvent
    is_leaving: Callable[[], bool] | None = None
    rank: int = 0
    world: int = 1
    tracking: Tracking = Tracking()

    @classmethod
    def here(cls, device: str, on_event: OnEvent, is_leaving: Callable[[], bool] | None = None) -> Worker:
        """This process, with the rank that torch.distributed gave it; alone where it gave none."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return cls(device, on_event if rank == 0 else lambda event: None, is_leaving, rank, world)

    @property
    def is_first(self) -> bool:
        """Whether this worker writes the files that all workers share."""
        return self.rank == 0

    def wait_for_others(self) -> None:
        """Return once every worker has come to this point."""
        if self.world > 1:
            dist.barrier()

    def gather_hosts(self) -> list[str]:
        """The names of the hosts that the phase's workers run on."""
        hosts: list[Any] = [socket.gethostname()]
        if self.world > 1:
            hosts = [None] * self.world
            dist.all_gather_object(hosts, socket.gethostname())
        return sorted(set(hosts))
