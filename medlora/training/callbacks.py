"""Callbacks of Trainer for a segment: losses, scores on dev, checkpoints, leaving a node."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medlora import events, pulse
from medlora.config.phase import PhaseConfig
from medlora.events import OnEvent
from medlora.model.chain import save_adapter
from medlora.runs import mirror
from medlora.runs.files import append_json, read_json_lines, sync_files, write_bytes
from medlora.runs.folders import PhaseFolder
from medlora.runs.manifests import commit
from medlora.training.divergence import StepWatch
from medlora.training.segment import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("medlora.training")


validation_log = logging.getLogger("medlora.validation")


class LossLoggingCallback(TrainerCallback):
    """Writes loss, learning rate, gradient norm, tokens/s and peak memory every few steps; stops the run on a NaN."""

    def __init__(self, watch: StepWatch, on_event: OnEvent) -> None:
        self.watch, self.on_event = watch, on_event
        self.folder, self.segment, self.phase, self.batch = watch.folder, watch.segment, watch.phase.name, watch.batch
        self.since = time.monotonic()
        self.last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock when training starts or resumes."""
        self.since, self.last_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.on_event(events.training(self.phase, self.segment.name))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: object
    ) -> None:
        """One line in metrics.jsonl, one in the log, one report."""
        if "loss" not in (logs or {}):
            return
        if not math.isfinite(logs["loss"]):
            step, rate = state.global_step, logs["learning_rate"]
            raise self.watch.fail(step, f"the loss is {logs['loss']}", self.last_step - 1, rate)
        if not state.is_world_process_zero:
            return
        seen = self.segment.rows[self.last_step * self.batch : state.global_step * self.batch]
        elapsed_s, norm = time.monotonic() - self.since, float(logs["grad_norm"])
        row = {
            "segment": self.segment.name,
            "step": state.global_step,
            "steps": self.segment.steps,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            # Infinite only where float16's scaler skipped the step; JSON cannot write it.
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_s": round(sum(len(row.input_ids) for row in seen) / max(elapsed_s, 1e-9), 1),
            "peak_memory_mib": _read_peak_memory_mib(),
        }
        self.since, self.last_step = time.monotonic(), state.global_step
        append_json(self.folder.metrics, row)
        self.on_event(events.step(self.phase, row))
        log.info(
            "%(segment)s step %(step)d/%(steps)d  loss %(loss).4f  lr %(learning_rate).2e  grad %(norm).3f  "
            "%(tokens_per_s).0f tokens/s  peak %(peak_memory_mib).0f MiB",
            row | {"norm": norm},
        )


class TrackerGuard:
    """A tracker of transformers that cannot end a phase: once it fails, that is reported and it is left alone."""

    def __init__(self, tracker: TrainerCallback, phase: str, on_event: OnEvent) -> None:
        self.tracker, self.phase, self.on_event, self.failed = tracker, phase, on_event, False

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *arguments, **options: self._hand_on(event, arguments, options)

    def _hand_on(self, event: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.failed:
            return
        try:
            getattr(self.tracker, event)(*arguments, **options)
        except Exception as error:  # a server that is gone raises what its own library likes
            self.failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            text = f"{type(self.tracker).__name__.removesuffix('Callback')} fails and is not reported to any more: {reason}"
            log.warning(text)
            self.on_event(events.note(self.phase, text))


class PulseCallback(TrainerCallback):
    """Signals after each forward pass and step that training is alive, for the watch on stalls."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """The first step compiles the model if the phase asks for it."""
        what = "compiles the model in" if self.compiled else "is in"
        pulse.begin(f"{what} step {state.global_step + 1} of {state.max_steps}", slow=self.compiled)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """One forward pass of several."""
        pulse.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """The next step begins; other callbacks announce their own work."""
        pulse.begin(f"is in step {min(state.global_step + 1, state.max_steps)} of {state.max_steps}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """The checkpoint is written, so the next step begins."""
        self.on_step_end(args, state, control)


def _read_peak_memory_mib() -> float:
    """The peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


class MCQValidationCallback(TrainerCallback):
    """Scores the dev sample every N steps, at each epoch's end and at the last step; saves the best adapter if asked."""

    def __init__(
        self,
        folder: PhaseFolder,
        segment: Segment,
        phase: PhaseConfig,
        adapter: str,
        logging_callback: LossLoggingCallback,
        on_event: OnEvent,
    ) -> None:
        self.folder, self.segment, self.phase, self.adapter, self.on_event = folder, segment, phase, adapter, on_event
        self.logging_callback = logging_callback
        self.stopped_early = False
        self.seconds = 0.0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        lr_scheduler: Any = None,
        **_: object,
    ) -> None:
        """Validate when it is due; rank 0 decides for every worker whether to stop."""
        config, step = self.phase.validation, state.global_step
        assert config is not None
        every = config.every_steps
        due = step == self.segment.steps or step % self.segment.epoch_steps == 0 or (every and step % every == 0)
        if not due:
            return
        assert model is not None  # Trainer always passes it
        started = time.monotonic()
        pulse.begin(f"scores dev after step {step}")
        try:
            score = self._validate(model, step) if state.is_world_process_zero else 0.0
        except FloatingPointError as error:  # a validation may see it before the loss is logged
            rate = lr_scheduler.get_last_lr()[0]
            raise self.logging_callback.watch.fail(step, str(error), step - 1, rate) from error
        if self.segment.stop_at_format_score is not None:
            decision = [score >= self.segment.stop_at_format_score]
            if args.world_size > 1:
                dist.broadcast_object_list(decision, src=0)
            if decision[0]:
                self.stopped_early = True
                control.should_training_stop = control.should_save = True
        pulse.begin(f"has scored dev after step {step}")
        self.seconds += time.monotonic() - started
        self.logging_callback.since += time.monotonic() - started

    def _validate(self, model: PreTrainedModel, step: int) -> float:
        assert self.segment.validate is not None and self.phase.validation is not None
        model = getattr(model, "module", model)  # DistributedDataParallel wraps it
        began = time.monotonic()
        scores = self.segment.validate(model)
        best = max(
            (
                row["score"]
                for row in read_json_lines(self.folder.validation, keys=("segment", "score"))
                if row["segment"] == self.segment.name
            ),
            default=-math.inf,
        )
        row = {"segment": self.segment.name, "step": step, **scores}
        if self.phase.validation.keep_best and scores["score"] > best:
            row["best"] = True
            save_adapter(model, self.adapter, self.folder.best)
            sync_files(self.folder.best)  # no checkpoint writes it again, so it must be on disk before the next
        append_json(self.folder.validation, row)
        self.on_event(events.validation(self.phase.name, row, round(time.monotonic() - began, 3)))
        validation_log.info(
            "%s step %d  %s",
            self.segment.name,
            step,
            "  ".join(
                f"{name} {value}" if name == "questions" else f"{name} {value:.4f}" for name, value in scores.items()
            ),
        )
        return scores.get("format_score", 0.0)


class CheckpointCallback(TrainerCallback):
    """Seals each checkpoint with a manifest once every worker has written its part, and uploads it to the run's store."""

    def __init__(self, folder: PhaseFolder) -> None:
        self.folder = folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.world_size > 1:
            _gather_random_states(checkpoint, args)
        if state.is_world_process_zero:
            # Log lines up to a checkpoint's step are not written again, so they must be on disk before it.
            sync_files(self.folder.metrics, self.folder.validation)
            if self.folder.validation.is_file():  # which adapter is the best so far is read from it
                write_bytes(checkpoint / self.folder.validation.name, self.folder.validation.read_bytes())
            commit(checkpoint, {"step": state.global_step})
            mirror.push(self.folder.root)


class Leaving(Exception):
    """The node is about to be taken away, and a checkpoint has been made; the phase resumes from it elsewhere."""


class LeaveCallback(TrainerCallback):
    """When the node is about to be taken away, makes a checkpoint after the current step, then raises Leaving.

    With several workers, one whose node or process is about to end is enough.
    """

    def __init__(self, is_leaving: Callable[[], bool], steps: int) -> None:
        self.is_leaving, self.steps = is_leaving, steps
        self.noticed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a checkpoint, unless this was the last step."""
        if state.global_step == self.steps:
            return
        decisions = [self.is_leaving()] * args.world_size
        if args.world_size > 1:
            dist.all_gather_object(decisions, decisions[0])
        if any(decisions):
            self.noticed = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """After CheckpointCallback, which has sealed the checkpoint."""
        if self.noticed:
            log.warning("leaves its node after step %d, with a checkpoint", state.global_step)
            raise Leaving


def _gather_random_states(checkpoint: Path, args: TrainingArguments) -> None:
    """Copy what each worker wrote on its own machine to rank 0; also a barrier."""
    own = checkpoint / f"rng_state_{args.process_index}.pth"
    written: list[Any] = [None] * args.world_size
    dist.all_gather_object(written, (own.name, own.read_bytes()))
    for name, content in written if args.process_index == 0 else ():
        if not (checkpoint / name).is_file():
            write_bytes(checkpoint / name, content)
