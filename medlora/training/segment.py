"""A stretch of a phase's training with an optimiser and a schedule of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medlora.tokens.rows import Row


@dataclass(frozen=True)
class Segment:
    """A stretch of a phase with one optimiser and one schedule: the whole phase, or its part in one prompt mode.

    `validate` scores the model where it stands; `stop_at_format_score` ends the segment early on it.
    """

    name: str
    rows: Sequence[Row]
    """In training order, repeated over epochs: steps x global batch of them."""
    steps: int
    epoch_steps: int
    longest: Sequence[Row] = ()
    """The two longest of them, of which a step's memory is told."""
    validate: Callable[[Any], dict[str, float]] | None = None
    stop_at_format_score: float | None = None
    name_rows: Callable[[Sequence[int]], list[str]] | None = None
    """Which records the rows at these places are made from."""
