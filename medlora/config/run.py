"""The config of a curriculum and the rules between its parts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config.base import Name, Section
from medlora.config.evaluation import StageEvaluationConfig
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import PhaseConfig
from medlora.config.placement import Placement, Storage
from medlora.config.sources import DataConfig


class RunConfig(Section):
    """A whole run: base, phases and evaluation."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    base: BaseModelConfig
    lora: LoraSettings = LoraSettings()
    start: tuple[str, ...] = ()
    """Folders or `s3://` / `gs://` URIs of PEFT adapters from elsewhere, oldest first, below the first phase."""
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    evaluation: StageEvaluationConfig | None = None
    data: DataConfig = DataConfig()
    placement: Placement = Placement()
    storage: Storage = Storage()
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Also show losses there; servers and keys come from the environment. Without a key W&B writes files for `wandb sync`."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, object]:
        # As for sources: dumps are in the fingerprints of sweeps that are finished.
        dumped: dict[str, object] = serialise(self)
        if not dumped.get("report_to"):
            dumped.pop("report_to", None)
        return dumped

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        seen: dict[str, int] = {}
        if self.base.extra_tokens and not any(phase.train_extra_tokens for phase in self.phases):
            raise ValueError(
                "base.extra_tokens: no phase trains them; set train_extra_tokens in a `new` phase, or remove the tokens"
            )
        tests = (
            {test.source: f"evaluation.tests.{i}" for i, test in enumerate(self.evaluation.tests)}
            if self.evaluation
            else {}
        )
        for i, phase in enumerate(self.phases):
            at = f"phases.{i}"
            if phase.name in seen:
                raise ValueError(
                    f"{at}.name: {phase.name!r} is the name of phases.{seen[phase.name]} too; names must differ"
                )
            if phase.name in ("base", "start"):
                raise ValueError(f"{at}.name: {phase.name!r} is the name of a stage before any phase; choose another")
            if i == 0 and phase.chain != "new" and not self.start:
                raise ValueError(
                    f"{at}.chain: {phase.chain!r} needs a phase before it; the first phase must be 'new', or name adapters in start"
                )
            if phase.chain == "continue" and phase.lora is not None:
                raise ValueError(f"{at}.lora: a phase that continues keeps its parent's adapter shape; remove the key")
            for j, replay in enumerate(phase.replay):
                if replay.phase not in seen:
                    raise ValueError(
                        f"{at}.replay.{j}.phase: {replay.phase!r} is no earlier phase; earlier: {', '.join(seen) or 'none'}"
                    )
            if sum(replay.share for replay in phase.replay) >= 1:
                raise ValueError(
                    f"{at}.replay: the shares add up to 1 or more; nothing would be left for the phase's sources"
                )
            weighted = [source.weight is not None for source in phase.sources]
            if any(weighted) and not all(weighted):
                raise ValueError(f"{at}.sources: give every source a weight or none")
            if phase.full_prompt and (phase.validation is None or phase.validation.scoring != "reason"):
                raise ValueError(
                    f"{at}.full_prompt: needs {at}.validation with scoring: reason, whose dev split gives the format score"
                )
            if phase.compile and phase.batching == "flat":
                raise ValueError(
                    f"{at}.compile: flat batches have another shape at every step, each compiled anew; set batching: padded"
                )
            if phase.train_extra_tokens and not self.base.extra_tokens:
                raise ValueError(
                    f"{at}.train_extra_tokens: base.extra_tokens is empty; name the tokens or remove the key"
                )
            for key, sources in (
                ("sources", phase.sources),
                ("validation.sources", phase.validation.sources if phase.validation else ()),
            ):
                for j, source in enumerate(sources):
                    if source.source in tests:
                        raise ValueError(
                            f"{at}.{key}.{j}.source: {source.source!r} is the test {tests[source.source]}; a phase never reads a test"
                        )
            seen[phase.name] = i
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        for i, phase in enumerate(self.phases):
            workers = (phase.placement or self.placement).workers
            if phase.count_batch(workers) % workers:
                raise ValueError(
                    f"phases.{i}.global_batch: {phase.count_batch(workers)} sequences cannot be shared by {workers} "
                    "workers; take a multiple of the workers"
                )
        return self

    def phase(self, name: str) -> PhaseConfig:
        """The phase of that name; raises KeyError."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)
