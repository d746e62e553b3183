"""Fit a segment into memory: measure one step before training starts, and halve the batch if memory still runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from medlora import events
from medlora.config.phase import SettledPhase
from medlora.errors import InputError
from medlora.events import NoteKind
from medlora.kernels.memory import clear_memory, describe_device
from medlora.kernels.modes import keeping_modes
from medlora.kernels.supervised_head import SupervisedHead
from medlora.kernels.varlen import using
from medlora.runs.folders import PhaseFolder
from medlora.tokens.rows import Row
from medlora.training.segment import Segment, SegmentFigures, Worker
from medlora.training.trainer import STATE_BYTES, recompute_activations, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from medlora.training.batches import Collator, FlatCollator

log = logging.getLogger("medlora.phase")


_SHARE = 0.85
"""Share of the free memory that a step may take, since the dry run does not see everything."""


def train_in_memory(
    model: PreTrainedModel,
    segment: Segment,
    phase: SettledPhase,
    collator: Collator | FlatCollator,
    folder: PhaseFolder,
    worker: Worker,
) -> tuple[SegmentFigures, SettledPhase]:
    """Train a segment; when memory runs out, resume from the last checkpoint with smaller forward passes.

    The global batch does not change, so the result is the same within float error. Returns the segment's figures and the phase
    as it was trained. Raises InputError when not even one sequence fits, or when several workers would have to agree.
    """

    def note(text: str, level: int = logging.WARNING, kind: NoteKind = "run") -> None:
        log.log(level, text)
        worker.on_event(events.note(phase.name, text, kind))

    alone = not dist.is_initialized()
    if segment.longest and (alone or _may_raise(model, phase)):
        phase = fit_batch(model, segment.longest, phase, collator, note)
        if not alone:
            phase = _agree(phase)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    while True:
        try:
            return train(model, segment, phase, collator, folder, worker), phase
        except torch.OutOfMemoryError as error:
            smaller = shrink(phase)
            if smaller is None or dist.is_initialized():
                raise InputError(
                    f"phases.{phase.name}: out of memory with batch_size {phase.batch_size}; lower batch_size (and raise "
                    "accumulation) or max_tokens, set gradient_checkpointing: true, or take base.quantization: nf4"
                ) from error
        # Outside of `except`: the traceback holds the tensors that did not fit.
        note(f"out of memory: {_describe_change(phase, smaller)}", kind="training")
        phase = smaller
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        clear_memory()


def _describe_change(phase: SettledPhase, smaller: SettledPhase) -> str:
    if smaller.batch_size == phase.batch_size:
        return "activations are computed again in the backward pass (gradient_checkpointing), a third more time"
    return (
        f"batch_size {phase.batch_size} becomes {smaller.batch_size}, accumulation {phase.accumulation} becomes "
        f"{smaller.accumulation}; the global batch stays"
    )


def shrink(phase: SettledPhase) -> SettledPhase | None:
    """The phase with at most half the sequences in a forward pass and the same global batch.

    With one sequence, activations are recomputed if the config allows it. None when no memory is left to save.
    """
    total = phase.batch_size * phase.accumulation
    sizes = [size for size in range(1, phase.batch_size // 2 + 1) if total % size == 0]
    if sizes:
        return phase.model_copy(update={"batch_size": sizes[-1], "accumulation": total // sizes[-1]})
    if phase.gradient_checkpointing == "auto":
        return phase.model_copy(update={"gradient_checkpointing": True})
    return None


def fit_batch(
    model: PreTrainedModel,
    longest: Sequence[Row],
    phase: SettledPhase,
    collator: Collator | FlatCollator,
    note: Callable[..., None],
) -> SettledPhase:
    """The phase with a batch size that fits, from a dry run of its longest rows, one and then two, before the first step.

    The memory of a forward pass has a fixed part and a part that grows with its rows. A `batch_size` that does not fit is
    lowered. With `batch_size: auto` on CUDA it is raised, since fewer and larger passes use a GPU better, and tried; else
    a note says when a larger one would fit. The global batch stays.
    """
    cost = _measure_cost(model, longest, phase, collator)
    if cost is None and phase.may_grow and phase.gradient_checkpointing == "auto":
        smaller = phase.model_copy(update={"gradient_checkpointing": True})
        note(f"one of the longest rows does not fit: {_describe_change(phase, smaller)}")
        phase, cost = smaller, _measure_cost(model, longest, smaller, collator)
    if cost is None:
        return phase  # training itself then handles it, as whenever memory runs out
    free = describe_device(model.device).free_bytes
    total = phase.batch_size * phase.accumulation
    most = cost.count_rows(_SHARE * free - _count_states(model))
    fits = max(size for size in range(1, min(most, total) + 1) if total % size == 0)
    if _may_raise(model, phase):
        fits, taken = _try_sizes(model, longest, phase, collator, fits)
        larger = phase.model_copy(update={"batch_size": fits, "accumulation": total // fits})
        note(
            f"batch_size auto: {fits} of the longest rows in a forward pass take {_size(taken or cost.add_up(fits))} of "
            f"{free / 2**30:.1f} GiB free; accumulation {total // fits}",
            logging.INFO,
        )
        return larger
    needs = f"{_size(cost.add_up(phase.batch_size))} of {free / 2**30:.1f} GiB free"
    if fits < phase.batch_size:
        smaller = phase.model_copy(update={"batch_size": fits, "accumulation": total // fits})
        note(f"a forward pass of {phase.batch_size} rows would take {needs}: {_describe_change(phase, smaller)}")
        return smaller
    more = f"; batch_size {fits}, accumulation {total // fits} would fit, too" if fits > phase.batch_size else ""
    note(f"a forward pass of {phase.batch_size} of the longest rows takes {needs}{more}", logging.INFO)
    return phase


@dataclass(frozen=True)
class _Cost:
    """Bytes of a forward and backward pass: what it takes whatever its rows, and what every row adds."""

    fixed: int
    row: int

    def add_up(self, rows: int) -> int:
        """Bytes of a pass of so many rows."""
        return self.fixed + self.row * rows

    def count_rows(self, limit: float) -> int:
        """The most rows whose pass stays within the limit; at least one."""
        return max(int((limit - self.fixed) / self.row), 1)


def _measure_cost(
    model: PreTrainedModel, longest: Sequence[Row], phase: SettledPhase, collator: Collator | FlatCollator
) -> _Cost | None:
    """From passes of one and of two rows; None where even one does not fit."""
    try:
        one = measure_step(model, longest[:1], phase, collator)
        two = measure_step(model, longest[:2], phase, collator) if len(longest) > 1 else 2 * one
    except torch.OutOfMemoryError:
        _clear(model)
        return None
    row = max(two - one, 1)
    return _Cost(max(one - row, 0), row)


def _may_raise(model: PreTrainedModel, phase: SettledPhase) -> bool:
    """Whether the dry run says how many rows a pass has. On CPU it does not: bytes must not depend on the free memory."""
    return phase.may_grow and torch.device(model.device).type == "cuda"


def _try_sizes(
    model: PreTrainedModel,
    longest: Sequence[Row],
    phase: SettledPhase,
    collator: Collator | FlatCollator,
    fits: int,
) -> tuple[int, int]:
    """The largest size from `fits` down whose pass over the longest rows runs, and its bytes (0 where none was tried)."""
    total = phase.batch_size * phase.accumulation
    for size in sorted((n for n in range(1, fits + 1) if total % n == 0), reverse=True):
        if size <= 2:
            return size, 0  # `_measure_cost` has run these
        try:
            taken = measure_step(model, longest[:size], phase, collator)
        except torch.OutOfMemoryError:
            _clear(model)
            continue
        return size, taken
    return 1, 0


def _clear(model: PreTrainedModel) -> None:
    model.zero_grad(set_to_none=True)
    clear_memory()


def _count_states(model: PreTrainedModel) -> int:
    """Bytes of the optimiser's states, which do not exist yet; on CPU they lie beside the free memory that is reported."""
    if torch.device(model.device).type != "cuda":
        return 0
    return STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _agree(phase: SettledPhase) -> SettledPhase:
    """What fits every worker: the smallest pass, and recomputed activations where one of them needs that."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (phase.batch_size, phase.gradient_checkpointing))
    size, total = min(size for size, _ in found), phase.batch_size * phase.accumulation
    recomputed = True if any(each is True for _, each in found) else phase.gradient_checkpointing
    return phase.model_copy(
        update={"batch_size": size, "accumulation": total // size, "gradient_checkpointing": recomputed}
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def measure_step(
    model: PreTrainedModel, rows: Sequence[Row], phase: SettledPhase, collator: Collator | FlatCollator
) -> int:
    """Bytes that a forward and backward pass over `rows` takes beside the model.

    On CUDA that is the peak, on CPU everything saved for the backward pass. Weights, gradients and random numbers are left
    unchanged.
    """
    device, head = torch.device(model.device), SupervisedHead(model)
    cuda = device.type == "cuda"
    batch = {key: value.to(device) for key, value in collator(rows).items()}
    labels, supervised = batch.pop("labels"), batch.pop("supervised")
    saved: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with keeping_modes(model), torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        with (
            recompute_activations(model.train(), phase.gradient_checkpointing is True),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast(device.type, model.dtype, enabled=cuda and model.dtype != torch.float32),
            head.at(supervised),
            using(batch.pop("plan", None)),
        ):
            loss = head.compute_loss(model(**batch, use_cache=False), labels)
        loss.backward()
    model.zero_grad(set_to_none=True)
    if not cuda:
        return sum(saved.values())
    del batch, labels, supervised, loss
    taken = torch.cuda.max_memory_allocated(device) - before
    clear_memory()  # what the allocator keeps would count as taken when the free memory is read
    return taken
