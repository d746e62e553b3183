"""A loss, gradient or weight that is not finite: found at its step, explained, and avoided by the next resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from medlora.config.phase import SettledPhase
from medlora.errors import InputError
from medlora.model.adapter_files import find_non_finite, read_tensors
from medlora.runs import mirror
from medlora.runs.files import read_json, write_json
from medlora.runs.folders import PhaseFolder

if TYPE_CHECKING:
    from medlora.training.segment import Segment

_MOST_SKIPPED = 24
"""Steps in a row that float16's gradient scaler may skip: after 16 its scale of 65,536 is down to 1."""


_MOST_SHOWN = 8
"""Rows of a batch that a message names."""


class Diverged(InputError):
    """Training met a number that is not finite; what was saved before that step is complete and finite."""


@dataclass
class StepWatch:
    """Checks the loss and the gradient norm of every step before the optimizer uses them.

    `batch` counts the rows of a step over all workers. With float16 a gradient scaler skips steps whose gradient
    overflowed, which is no divergence unless it happens many times in a row.
    """

    phase: SettledPhase
    segment: Segment
    folder: PhaseFolder
    batch: int
    dtype: torch.dtype = torch.float32
    losses: list[torch.Tensor] = field(default_factory=list)
    """The loss of each forward pass since the last step; they stay on the device until the step is checked."""
    skipped: int = 0

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss of one forward pass."""
        self.losses.append(loss.detach())

    def check(
        self, step: int, grad_norm: float | torch.Tensor | None, learning_rate: float, scaled: bool = False
    ) -> None:
        """Raise Diverged when step number `step` may not be made; reads losses and norm from the device at once."""
        norm = torch.as_tensor(grad_norm, dtype=torch.float32)
        held = [norm, *(loss.to(norm.device, torch.float32) for loss in self.losses)]
        values: list[float] = torch.stack([value.reshape(()) for value in held]).tolist()
        self.losses = []
        gradient, losses = values[0], values[1:]
        sound = all(map(math.isfinite, losses))
        if math.isfinite(gradient) and sound:
            self.skipped = 0
            return
        if scaled and sound:
            self.skipped += 1
            if self.skipped <= _MOST_SKIPPED:
                return
        by_worker = [losses]
        if not math.isfinite(gradient) and dist.is_initialized():
            # Gradients are summed over the workers, so all of them are here; a loss may be infinite on one alone.
            by_worker = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(by_worker, losses)
        bad = [loss for part in by_worker for loss in part if not math.isfinite(loss)]
        what = f"the loss is {bad[0]}" if bad else f"the gradient norm is {gradient} at a finite loss"
        if scaled and not bad:
            what += f", and the {self.skipped} steps before were skipped for the same"
        # A finite loss shows that the weights before this step were sound, and so is a checkpoint of them.
        usable = step - 1 if not bad else step - 2
        raise self.fail(step, what, usable, learning_rate, self._find_rows(step, by_worker))

    def _find_rows(self, step: int, by_worker: Sequence[Sequence[float]]) -> list[int]:
        """Places of the step's rows in the segment: of the forward passes without a finite loss, else all of them."""
        first, size, workers = (step - 1) * self.batch, self.phase.batch_size, len(by_worker)
        if workers == 1 and dist.is_initialized():
            return list(range(first, first + self.batch))
        passes = [
            number * workers + worker
            for worker, losses in enumerate(by_worker)
            for number, loss in enumerate(losses)
            if not math.isfinite(loss)
        ]
        chosen = [first + each * size + i for each in sorted(passes) for i in range(size)]
        return [place for place in chosen if place < len(self.segment.rows)] or list(range(first, first + self.batch))

    def fail(
        self, step: int, what: str, usable: int, learning_rate: float, rows: Sequence[int] | None = None
    ) -> Diverged:
        """The error for a step; also notes for the next resume that checkpoints after step `usable` are suspect."""
        if rows is None:
            rows = range((step - 1) * self.batch, min(step * self.batch, len(self.segment.rows)))
        if not dist.is_initialized() or dist.get_rank() == 0:
            note = {"segment": self.segment.name, "step": step, "usable": max(usable, 0), "what": what}
            write_json(_note_path(self.folder), note)
            mirror.push(self.folder.root)
        return Diverged(self._explain(step, what, usable, learning_rate, rows))

    def _explain(self, step: int, what: str, usable: int, learning_rate: float, rows: Sequence[int]) -> str:
        name = self.phase.name
        records = ""
        if self.segment.name_rows is not None:
            records = f". Records of the batch: {'; '.join(self.segment.name_rows(rows[:_MOST_SHOWN]))}"
            records += f"; and {len(rows) - _MOST_SHOWN} more rows" if len(rows) > _MOST_SHOWN else ""
        wider = {torch.float16: "bfloat16", torch.bfloat16: "float32"}.get(self.dtype)
        steps = [_read_step(path) for path in (self.folder.checkpoints / self.segment.name).glob("checkpoint-*")]
        broken = "; before any step, the base or an adapter below may be broken, too" if step == 1 else ""
        before = max((each for each in steps if each <= usable), default=0)
        return (
            f"phase {name}, step {step}: {what} (of {self.segment.steps} steps, learning rate {learning_rate:.2e})"
            f"{records}. Nothing of this step was saved. To fix it, lower phases.{name}.learning_rate "
            f"({self.phase.learning_rate:.2g} at its highest), raise phases.{name}.warmup_ratio"
            + (f", set base.compute_dtype to {wider}" if wider else "")
            + f" or remove the records{broken}. A changed key needs --redo {name}, which sets this phase aside, or another "
            f"--set name=.... The same command resumes from {f'step {before}' if before else 'the beginning'}, before the "
            "last finite loss; without a change it diverges again unless a device was at fault."
        )


def check_checkpoint(checkpoint: Path) -> str | None:
    """Why a complete checkpoint must not be resumed from, a weight or logged loss that is not finite; None if it may be."""
    if bad := find_non_finite(read_tensors(checkpoint)):
        return f"{len(bad)} of its tensors hold values that are not finite, {bad[0]} among them"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    for row in state.get("log_history", ()):
        if not math.isfinite(row.get("loss", 0.0)):
            return f"the loss was {row['loss']} at step {row['step']}"
    return None


def read_divergence(folder: PhaseFolder, segment: str) -> dict[str, Any] | None:
    """What `StepWatch.fail` noted of the last attempt at this segment: `step`, `usable`, `what`."""
    note = read_json(_note_path(folder))
    return note if isinstance(note, dict) and note.get("segment") == segment else None


def forget_divergence(folder: PhaseFolder) -> None:
    """Delete the note once the suspect checkpoints are deleted; later ones are sound."""
    _note_path(folder).unlink(missing_ok=True)


def _note_path(folder: PhaseFolder) -> Path:
    return folder.checkpoints / "diverged.json"


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
