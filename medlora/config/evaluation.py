"""The keys of a config for tests, scoring and the stages to score."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from medlora.config.base import McqStyle, Name, Scoring, Section
from medlora.config.model import BaseModelConfig
from medlora.config.placement import ActorPlacement, Storage
from medlora.config.sources import FewShot, ReadingConfig, SourceConfig, TestConfig

Normalisation = Literal["sum", "token", "character"]

Dequantize = Literal["auto", "always", "never"]


class EvaluationConfig(Section):
    """How every stage is scored after the last phase."""

    tests: tuple[TestConfig, ...] = Field(min_length=1)
    scoring: Scoring = "letter"
    """`letter`: log-likelihood of each option's letter. `reason`: greedy reasoning up to the answer field, then that.
    `generate`: what the model writes, read as a letter or none. `option_text`: log-likelihood of each option's text."""
    style: McqStyle = "reasoning"
    """`kormedmcqa`: the text of lm-evaluation-harness's task of that name, for numbers that compare."""
    worked_example: SourceConfig | None = None
    """Of style `reasoning_full`: every prompt shows the first question with a rationale of this source, solved."""
    few_shot: FewShot | None = None
    """Solved questions before every question; unset = 0-shot."""
    max_tokens: int = Field(256, ge=1)
    """Most new tokens of reasoning or of a generated answer."""
    normalisation: Normalisation = "character"
    """How `option_text` compares options: by the sum of their tokens' log-likelihoods, per token or per character
    (`acc` and `acc_norm` of lm-evaluation-harness are `sum` and `character`)."""
    samples: int = Field(1, ge=1)
    """Answers of `generate` per question; the majority wins."""
    temperature: float = Field(0.0, ge=0)
    """Of `generate`; 0 = greedy."""
    rotations: bool = False
    """Ask every question under all cyclic orders of its options and average: as many times the work, no letter bias."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens of a forward pass; unset = found on CUDA from free memory."""
    batch_size: int | None = Field(None, ge=1)
    """Questions handed to an actor at a time; unset = 32 on CPU, on GPUs 1,024 of scoring `letter`, else 256."""
    dequantize: Dequantize = "auto"
    """Turn a quantized base's weights into 16-bit ones once, before the first question: faster, for 2 bytes a weight.
    `auto`: nf4 on a GPU with room for it, which is the same function; never int8, where it is another one. With `base.dequantize`
    it is always done."""
    placement: ActorPlacement | None = None

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        if self.scoring == "reason" and self.style not in ("reasoning", "reasoning_full"):
            raise ValueError(f"scoring: `reason` needs style: reasoning; {self.style!r} has no reasoning to write")
        if (self.style == "reasoning_full") != (self.worked_example is not None):
            raise ValueError("worked_example: style: reasoning_full needs one, and only that style shows it")
        if self.scoring != "generate" and (self.samples > 1 or self.temperature > 0):
            raise ValueError(f"samples, temperature: only scoring: generate samples, not {self.scoring!r}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: more than 1 need a temperature above 0; greedy samples are all the same")
        return self


class StageEvaluationConfig(EvaluationConfig):
    """How every stage of a run is scored: after the last phase, and before it on what is free."""

    beside_training: Literal["auto"] | bool = "auto"
    """Score a finished stage, and the base at first, while later phases train, on what they leave free; the rest after the
    last phase. The answers are the same bytes either way. `auto`: where questions are answered on GPUs; true: on CPUs, too."""


class StageConfig(Section):
    """A stage by its adapters."""

    name: Name
    adapters: tuple[str, ...] = ()
    """Folders or `s3://` / `gs://` URIs of PEFT adapters, all active, oldest first; none = the plain base."""


class EvaluateConfig(Section):
    """What `jobs/evaluate_mcq.py` reads: a base, stages on it, and how they are scored."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    base: BaseModelConfig
    stages: tuple[str | StageConfig, ...] = Field(min_length=1)
    """Each a mapping of name and adapters, or stages of a finished run: `runs/quickstart:base,00,01,02`."""
    evaluation: EvaluationConfig
    data: ReadingConfig = ReadingConfig()
    placement: ActorPlacement = ActorPlacement()
    storage: Storage = Storage(folder="evaluations")
