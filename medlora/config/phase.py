"""The keys of a config for one phase: sources, replay, optimisation, validation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config.base import Name, PlainStyle, Scoring, Section
from medlora.config.model import LoraSettings
from medlora.config.placement import Placement
from medlora.config.sources import SourceConfig, TrainSource

CPU_ROWS = 2
"""Sequences of a forward pass on CPU, unless configured. More would hardly be faster, and a number that depends on the free
memory would give a resumed phase other bytes."""

ACCUMULATION = 16
GLOBAL_BATCH = CPU_ROWS * ACCUMULATION


class Replay(Section):
    """An earlier phase's sources mixed in, against forgetting."""

    phase: Name
    share: float = Field(gt=0, lt=1)
    """Share of all examples of the phase."""


class Validation(Section):
    """Scoring of dev records during training: MCQ accuracy, perplexity of text, token F1 of translations."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Dev splits, never a test."""
    every_steps: int | None = Field(None, ge=1)
    """Also every so many steps; each epoch's end and the last step are always scored."""
    sample: int = Field(64, ge=1)
    """Seeded sample of so many records per source."""
    scoring: Scoring = "letter"
    style: PlainStyle = "reasoning"
    max_tokens: int = Field(128, ge=1)
    """Most new tokens of greedy reasoning or translation."""
    keep_best: bool = False
    """End with the adapter of the best validation instead of the last one."""


class FullPrompt(Section):
    """Begin an MCQ phase with a worked example in the prompt, then switch to the normal prompt."""

    records: int = Field(500, ge=1)
    """Train on the first so many records (seeded order) while in this mode."""
    max_steps: int = Field(100, ge=1)
    """Switch after so many steps at the latest."""
    until_format_score: float = Field(0.7, gt=0, le=1)
    """Switch as soon as the reasoning-format score on dev reaches this."""


class PhaseConfig(Section):
    """One phase of the curriculum."""

    name: Name
    description: str = Field("", max_length=200)
    """What the phase is for, in a few words; shown on the terminal and in the report, and no part of the fingerprint."""
    chain: Literal["new", "continue", "stack"]
    """`new`: an adapter on the base alone. `continue`: train the last adapter on. `stack`: freeze what is there, which
    stays active, and train one more adapter."""
    sources: tuple[TrainSource, ...] = Field(min_length=1)
    weights: Literal["records", "tokens"] = "records"
    """What the weights of sources and the shares of replay count."""
    replay: tuple[Replay, ...] = ()
    validation: Validation | None = None
    full_prompt: FullPrompt | None = None
    lora: LoraSettings | None = None
    """Shape of this phase's adapter where it differs from the run's; a phase that continues has its parent's."""
    train_extra_tokens: bool = False
    """Train the embedding rows of `base.extra_tokens` too."""

    max_tokens: int = Field(512, ge=8)
    """Sequence length; a longer example is dropped and counted, plain text is split, never cut silently."""
    packing: bool = True
    """Fill sequences with several plain-text documents, no attention across them."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; overrides epochs."""
    global_batch: int | None = Field(None, ge=1)
    """Sequences of an optimiser step over all workers, 32 unless said otherwise; of packed text that is up to so many times
    `max_tokens` tokens. How they are cut into forward passes changes no result beyond rounding."""
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per worker and forward pass; `auto`: on CUDA as many as a dry run says fit, on CPU 2."""
    accumulation: int | None = Field(None, ge=1)
    """Forward passes per optimiser step, instead of `global_batch`: then a step is of batch_size x accumulation x workers
    sequences. With a number for `batch_size` alone it is 16."""
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up; `wsd` stays constant and decays linearly to 0 over `decay_ratio` of the steps."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    decay_ratio: float = Field(0.5, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(0.3, gt=0)
    optimizer: Literal["auto", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"] = "auto"
    """`auto`: adamw_torch on CPU; on CUDA adamw_torch_fused where its states are a small part of the free memory, else
    paged_adamw_8bit, whose states are a quarter as large and may leave the card."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Less memory for about a third more time; `auto` when one sequence does not fit without."""
    compile: bool = False
    """torch.compile the model: minutes before the first step, faster steps after it where shapes repeat (padded batches)."""
    batching: Literal["auto", "flat", "padded"] = "auto"
    """`flat`: the rows of a batch end to end, no token for nothing. `padded`: as a rectangle. The same gradients; `auto` is
    flat on CPU and where a trial of varlen attention passes on CUDA (bfloat16 or float16, Ampere or newer), else padded,
    as where `compile` is on."""
    share_prefix: bool = True
    """Flat batches compute a beginning that all their rows share once; with LoRA dropout they share its dropout, too."""
    log_every_steps: int = Field(5, ge=1)
    checkpoint_every_steps: int = Field(100, ge=1)
    placement: Placement | None = None
    """Where this phase runs, if not where the run's `placement` puts it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_numbers(cls, given: object) -> object:
        # Either number alone means what it meant before there was `global_batch`.
        if not isinstance(given, dict) or given.get("global_batch") is not None:
            return given
        size, passes = given.get("batch_size", "auto"), given.get("accumulation")
        if size != "auto" and passes is None:
            return {**given, "accumulation": ACCUMULATION}
        if "batch_size" not in given and passes is not None:
            return {**given, "batch_size": CPU_ROWS}
        return given

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if self.accumulation is not None and self.global_batch is not None:
            raise ValueError(
                "global_batch: it says how many sequences a step has, and accumulation says it once more; keep one of them"
            )
        if self.accumulation is not None and self.batch_size == "auto":
            raise ValueError("accumulation: with batch_size auto it follows from global_batch; set that instead")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Dumps stand in the records of finished runs: a key that came later must not make them look changed.
        dumped: dict[str, object] = serialise(self)
        optional = ("description", "global_batch", "accumulation")
        return {key: value for key, value in dumped.items() if key not in optional or value}

    def count_batch(self, workers: int) -> int:
        """Sequences of an optimiser step over all workers."""
        if self.accumulation is not None and self.batch_size != "auto":
            return self.batch_size * self.accumulation * workers
        return self.global_batch or GLOBAL_BATCH

    def settle(self, workers: int) -> SettledPhase:
        """The phase with numbers for `batch_size` and `accumulation`, on one of so many workers."""
        share = max(1, self.count_batch(workers) // workers)
        most = CPU_ROWS if self.batch_size == "auto" else self.batch_size
        size = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
        values = {name: getattr(self, name) for name in PhaseConfig.model_fields}
        values |= {"batch_size": size, "accumulation": share // size, "may_grow": self.batch_size == "auto"}
        return SettledPhase.model_construct(**values)


class SettledPhase(PhaseConfig):
    """A phase on a worker, its step cut into forward passes."""

    batch_size: int
    accumulation: int
    may_grow: bool = False
    """Whether a dry run may raise `batch_size`, the global batch staying what it is."""


def name_as_before(phase: dict[str, object]) -> None:
    """Write the default of `batch_size` into a dumped phase as fingerprints have it: 2 and 16, the same global batch."""
    if phase.get("batch_size") == "auto" and phase.get("global_batch") in (None, GLOBAL_BATCH):
        phase.pop("global_batch", None)
        phase |= {"batch_size": CPU_ROWS, "accumulation": ACCUMULATION}
