"""Train one segment of a phase on one worker, with transformers.Trainer and our callbacks."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from medlora import events, pulse
from medlora.config.phase import SettledPhase
from medlora.kernels.memory import describe_device
from medlora.kernels.supervised_head import SupervisedHead
from medlora.kernels.varlen import carry_plan, using
from medlora.model.adapter_files import find_non_finite
from medlora.model.chain import load_adapter_weights, save_adapter
from medlora.runs.files import read_json_lines, truncate_json_lines, write_bytes
from medlora.runs.folders import PhaseFolder
from medlora.runs.manifests import check_files, read_manifest
from medlora.training.batches import Collator, FlatCollator
from medlora.training.callbacks import (
    CheckpointCallback,
    LeaveCallback,
    LossLoggingCallback,
    MCQValidationCallback,
    PulseCallback,
    TrackerGuard,
)
from medlora.training.divergence import StepWatch, check_checkpoint, forget_divergence, read_divergence
from medlora.training.segment import Segment, SegmentFigures, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("medlora.training")


STATE_BYTES = 8
"""Of AdamW for each trained number: two in float32."""

_STATES_SHARE = 0.1
"""Largest part of a card's free memory that these may take."""

_SCHEDULES: dict[str, SchedulerType] = {
    "constant": SchedulerType.CONSTANT_WITH_WARMUP,
    "linear": SchedulerType.LINEAR,
    "cosine": SchedulerType.COSINE,
    "wsd": SchedulerType.WARMUP_STABLE_DECAY,
}


class _AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained adapter alone instead of every adapter of the chain."""

    def __init__(self, adapter: str, model: PreTrainedModel, watch: StepWatch, **arguments: Any) -> None:
        self.adapter, self.watch, self.head = adapter, watch, SupervisedHead(model)
        super().__init__(model=model, compute_loss_func=self.head.compute_loss, **arguments)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Like Trainer's, but logits are computed at supervised positions only."""
        plan = inputs.pop("plan", None)
        plan = None if plan is None else plan.to(inputs["input_ids"].device)  # where no data loader has moved it
        with self.head.at(inputs.pop("supervised")), using(plan):
            return super().compute_loss(model, inputs, *arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Like Trainer's; the loss is noted for the check of the step."""
        loss = super().training_step(*arguments, **options)
        self.watch.add(loss)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: float | None = None) -> float | torch.Tensor | None:
        """Like Trainer's, which calls it right before the optimizer's step; raises Diverged."""
        norm: float | torch.Tensor | None = super()._get_grad_norm(  # type: ignore[no-untyped-call]
            model, grad_norm=grad_norm
        )
        scaled = self.accelerator.scaler is not None
        self.watch.check(self.state.global_step + 1, norm, self._get_learning_rate(), scaled)
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        step, rate = self.state.global_step, self._get_learning_rate()
        pulse.begin(f"writes the checkpoint of step {step}")
        assert self.model is not None
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # Every worker looks, so that none waits for one that has stopped; rank 0's writing looks once more.
        if self.args.world_size > 1 and (bad := find_non_finite(trained)):
            raise self.watch.fail(step, f"{bad[0]} is not finite behind the step", step - 1, rate)
        try:
            super()._save_checkpoint(model, trial)
        except FloatingPointError as error:
            raise self.watch.fail(step, f"behind the step {error}", step - 1, rate) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_adapter(
                self.accelerator.unwrap_model(self.model), self.adapter, Path(output_dir or str(self.args.output_dir))
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter_weights(
            self.accelerator.unwrap_model(model or self.model), self.adapter, Path(resume_from_checkpoint)
        )


def find_checkpoint(folder: Path, newest: int | None = None, warn: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint, of step `newest` at most, that may be resumed from; None when there is none.

    Its manifest exists, every hash is right, and no weight or logged loss in it is NaN or infinite.
    """
    for checkpoint in sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True
    ):
        if newest is not None and int(checkpoint.name.rpartition("-")[2]) > newest:
            continue
        manifest = read_manifest(checkpoint)
        wrong = check_files(checkpoint, manifest) if manifest else "no manifest"
        if wrong:
            warn(f"checkpoint {checkpoint.name} is not whole ({wrong}); an earlier one is used")
        elif poison := check_checkpoint(checkpoint):
            warn(f"checkpoint {checkpoint.name} is not used, since {poison}; an earlier one is used")
        else:
            return checkpoint
    return None


@dataclass(frozen=True)
class _Resume:
    """Where a segment begins: the checkpoint to load, if any, and its step."""

    checkpoint: Path | None = None
    step: int = 0
    ended_early: bool = False
    """Whether the segment has already stopped before its step budget."""


def train(
    model: PreTrainedModel,
    segment: Segment,
    phase: SettledPhase,
    collator: Collator | FlatCollator,
    folder: PhaseFolder,
    worker: Worker,
) -> SegmentFigures:
    """Train the phase's adapter through a segment, from its last complete checkpoint if there is one.

    Returns plain figures: steps done, mean loss, seconds, whether it stopped early. The weights are left in the model.
    Raises Leaving, after a checkpoint, when `worker.is_leaving` is true; Diverged when a loss or gradient is not finite.
    """
    resume = _find_resume(segment, phase, folder, worker)
    optimizer = choose_optimizer(model, phase, resume.checkpoint)
    arguments = _make_arguments(model, segment, phase, folder, worker, optimizer)
    watch = StepWatch(phase, segment, folder, phase.count_batch(worker.world), model.dtype)
    losses = LossLoggingCallback(watch, worker.on_event)
    validation = None
    if segment.validate is not None and phase.validation is not None:
        validation = MCQValidationCallback(folder, segment, phase, phase.name, losses, worker.on_event)
    started = time.monotonic()
    with worker.tracking.open(worker.tracking.name_run(phase.name, segment.name)):
        trainer = _AdapterTrainer(
            phase.name,
            model=model,
            watch=watch,
            args=arguments,
            train_dataset=segment.rows,
            data_collator=collator,
            callbacks=_list_callbacks(segment, phase, folder, worker, losses, validation),
        )
        _tidy_callbacks(trainer, phase.name, worker)
        _optimise(trainer, model, segment, phase, resume)
    logged = [
        row for row in read_json_lines(folder.metrics, keys=("segment", "loss")) if row["segment"] == segment.name
    ]
    return {
        "segment": segment.name,
        "steps": max(trainer.state.global_step, resume.step),
        "planned_steps": segment.steps,
        "stopped_early": resume.ended_early or bool(validation and validation.stopped_early),
        "last_loss": logged[-1]["loss"] if logged else None,
        "train_s": round(time.monotonic() - started, 2),
        "validation_s": round(validation.seconds, 2) if validation else 0.0,
        "resumed_from_step": resume.step or None,
        "optimizer": optimizer,
    }


def _tidy_callbacks(trainer: Trainer, phase: str, worker: Worker) -> None:
    """Take off the default printer, since our callback logs the same in a better form, and keep trackers from ending a phase."""
    kept = [each for each in trainer.callback_handler.callbacks if type(each).__name__ != "PrinterCallback"]
    trainer.callback_handler.callbacks = [
        TrackerGuard(each, phase, worker.on_event) if type(each).__module__.endswith("integration_utils") else each
        for each in kept
    ]


def _find_resume(segment: Segment, phase: SettledPhase, folder: PhaseFolder, worker: Worker) -> _Resume:
    """Where the segment begins; what was written after that step is deleted, since it is written again."""

    def warn(text: str) -> None:
        log.warning(text)
        worker.on_event(events.note(phase.name, text))

    output = folder.checkpoints / segment.name
    diverged = read_divergence(folder, segment.name)
    if diverged:
        warn(
            f"step {diverged['step']} diverged before ({diverged['what']}): no checkpoint of a step after "
            f"{diverged['usable']} is resumed from"
        )
    checkpoint = find_checkpoint(output, diverged["usable"] if diverged else None, warn)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    ended_early = _stopped_early(checkpoint)
    worker.wait_for_others()  # nobody tidies up before everybody has found the same checkpoint
    if worker.is_first:
        _forget_after(folder, segment.name, output, step)
        forget_divergence(folder)
    if checkpoint:
        worker.on_event(events.note(phase.name, f"resumes from step {step} of {segment.steps}", kind="training"))
        log.info("%s resumes from step %d of %d", segment.name, step, segment.steps)
    return _Resume(checkpoint, step, ended_early)


def _make_arguments(
    model: PreTrainedModel,
    segment: Segment,
    phase: SettledPhase,
    folder: PhaseFolder,
    worker: Worker,
    optimizer: str,
) -> TrainingArguments:
    """The settings of transformers.Trainer for a segment."""
    cuda = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints / segment.name),
        max_steps=segment.steps,
        per_device_train_batch_size=phase.batch_size,
        gradient_accumulation_steps=phase.accumulation,
        learning_rate=phase.learning_rate,
        lr_scheduler_type=_SCHEDULES[phase.schedule],
        lr_scheduler_kwargs=_get_schedule_options(phase, segment.steps),
        warmup_steps=round(phase.warmup_ratio * segment.steps),
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
        optim=optimizer,
        bf16=cuda and model.dtype == torch.bfloat16,
        fp16=cuda and model.dtype == torch.float16,
        logging_steps=phase.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=phase.checkpoint_every_steps,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        ddp_backend="gloo" if worker.world > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        seed=segment.seed,
        data_seed=segment.seed,
        report_to=list(worker.tracking.to) or "none",
        run_name=worker.tracking.name_run(phase.name, segment.name) if worker.tracking.to else None,
        torch_compile=phase.compile,
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would mean DataParallel; Ray gives each worker its own
    return arguments


def choose_optimizer(model: PreTrainedModel, phase: SettledPhase, checkpoint: Path | None = None) -> str:
    """The optimiser of a segment: the config's, or with `auto` AdamW in float32 unless a card is too full for its states.

    8 bytes a trained number are little beside a base, and fused AdamW is one kernel a step. Where that would take more than
    a tenth of what is free on the card, the paged 8-bit one does with a quarter. A segment that resumes keeps the kind of its
    checkpoint, whose states another kind could not read.
    """
    if phase.optimizer != "auto":
        return phase.optimizer
    if model.device.type != "cuda":
        return "adamw_torch"
    if checkpoint is not None:
        return "paged_adamw_8bit" if _has_quantized_states(checkpoint) else "adamw_torch_fused"
    states = STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_short = states > _STATES_SHARE * describe_device(model.device).free_bytes
    return "paged_adamw_8bit" if is_short else "adamw_torch_fused"


def _has_quantized_states(checkpoint: Path) -> bool:
    """Whether the optimiser of a checkpoint was bitsandbytes' 8-bit one."""
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    return bool(saved["state"]) and not any("exp_avg" in state for state in saved["state"].values())


def _list_callbacks(
    segment: Segment,
    phase: SettledPhase,
    folder: PhaseFolder,
    worker: Worker,
    losses: LossLoggingCallback,
    validation: MCQValidationCallback | None,
) -> list[TrainerCallback]:
    """The callbacks in the order in which Trainer calls them: a checkpoint is sealed before a worker leaves."""
    callbacks: list[TrainerCallback] = [PulseCallback(phase.compile), losses, CheckpointCallback(folder)]
    if validation is not None:
        callbacks.append(validation)
    if worker.is_leaving is not None:
        callbacks.append(LeaveCallback(worker.is_leaving, segment.steps))
    return callbacks


def _optimise(
    trainer: _AdapterTrainer, model: PreTrainedModel, segment: Segment, phase: SettledPhase, resume: _Resume
) -> None:
    """Take the steps that are left; a segment without any only loads its last checkpoint."""
    if resume.checkpoint and (resume.ended_early or resume.step >= segment.steps):
        load_adapter_weights(model, phase.name, resume.checkpoint)
        return
    with recompute_activations(model, phase.gradient_checkpointing is True):
        trainer.train(resume_from_checkpoint=str(resume.checkpoint) if resume.checkpoint else None)


@contextmanager
def recompute_activations(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within this context, if `wanted`, activations are computed again in the backward pass instead of stored."""
    if not wanted:
        yield
        return
    # transformers 5.23 renamed both and warns of the old names, which 5.17 alone has.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable({"use_reentrant": False, "context_fn": carry_plan})
    try:
        yield
    finally:
        disable()


def _get_schedule_options(phase: SettledPhase, steps: int) -> dict[str, object]:
    if phase.schedule != "wsd":
        return {}
    return {"num_decay_steps": round(phase.decay_ratio * steps), "decay_type": "linear"}


def _stopped_early(checkpoint: Path | None) -> bool:
    """Whether the checkpoint is the last of a segment that ended before its step budget."""
    if checkpoint is None:
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state["stateful_callbacks"].get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop")) and state["global_step"] < state["max_steps"]


def _forget_after(folder: PhaseFolder, segment: str, output: Path, step: int) -> None:
    """Delete what was written after the step from which the segment resumes; it is written again."""
    for path in (folder.metrics, folder.validation):
        truncate_json_lines(
            path, lambda row: row["segment"] != segment or row["step"] <= step, keys=("segment", "step")
        )
    # Without a lost line, a worse score could pass for the best. The checkpoint's copy is as whole as the checkpoint.
    sealed = output / f"checkpoint-{step}" / folder.validation.name
    if sealed.is_file() and len(read_json_lines(sealed)) > len(read_json_lines(folder.validation)):
        write_bytes(folder.validation, sealed.read_bytes())
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
