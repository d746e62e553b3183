"""The keys of a config for one phase: sources, replay, optimisation, validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from medlora.config.base import Name, PlainStyle, Scoring, Section
from medlora.config.model import LoraSettings
from medlora.config.placement import Placement
from medlora.config.sources import SourceConfig, TrainSource


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
    batch_size: int = Field(2, ge=1)
    """Sequences per worker and forward pass."""
    accumulation: int = Field(16, ge=1)
    """Forward passes per optimiser step; global batch = batch_size x accumulation x workers."""
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up; `wsd` stays constant and decays linearly to 0 over `decay_ratio` of the steps."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    decay_ratio: float = Field(0.5, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(0.3, gt=0)
    optimizer: Literal["auto", "adamw_torch", "paged_adamw_8bit"] = "auto"
    """`auto`: paged_adamw_8bit on CUDA, adamw_torch on CPU."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Less memory for about a third more time; `auto` when one sequence does not fit without."""
    compile: bool = False
    """torch.compile the model: minutes before the first step, faster steps after it where shapes repeat (padded batches)."""
    batching: Literal["auto", "flat", "padded"] = "auto"
    """`flat`: the rows of a batch end to end, no token for nothing. `padded`: as a rectangle. The same gradients; `auto` is
    flat on CPU, padded on CUDA and where `compile` is on."""
    share_prefix: bool = True
    """Flat batches compute a beginning that all their rows share once; with LoRA dropout they share its dropout, too."""
    log_every_steps: int = Field(5, ge=1)
    checkpoint_every_steps: int = Field(100, ge=1)
    placement: Placement | None = None
    """Where this phase runs, if not where the run's `placement` puts it."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Dumps stand in the records of finished runs: a key that came later must not make them look changed.
        dumped: dict[str, Any] = serialise(self)
        return {key: value for key, value in dumped.items() if key != "description" or value}
