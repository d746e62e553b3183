"""What a config may say, as frozen pydantic models; `config_file` reads one."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config_sources import DataConfig, FewShot, Name, PlainStyle, Section, SourceConfig, TestConfig, TrainSource

Scoring = Literal["letter", "generate", "reason", "option_text"]
Normalisation = Literal["sum", "token", "character"]
McqStyle = Literal["reasoning", "reasoning_full", "answer", "kormedmcqa"]


class BaseModelConfig(Section):
    """The base model that every adapter stands on."""

    model: str
    """Folder of a Hugging Face model, hub id (`google/medgemma-4b-it`), or `miniature` (built here in two minutes)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); pin a commit to reproduce a run."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """bitsandbytes: `int8` (LLM.int8), `nf4` (QLoRA, double quantization) or none."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU (bf16 products are many times slower there)."""
    extra_tokens: tuple[str, ...] = ()
    """Words added to the vocabulary; their rows start as the mean of their old pieces. A text file, one a line, is
    named as `file:PATH` in a list of one."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off unless you trust its author."""


class LoraSettings(Section):
    """The shape of a LoRA adapter."""

    r: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32, gt=0)
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353); on an int8 base on a GPU alone."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "all-linear"
    """`attention` (q, k, v, o), `all-linear`, or names of linear layers; always in the language model alone."""


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


class Placement(Section):
    """Where on the cluster something runs."""

    workers: int = Field(1, ge=1)
    """Data-parallel training workers; the global batch is split over them."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """Fractions share a GPU; unset = 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: int = Field(1, ge=1)
    """Also the number of torch threads, which the bytes of a result depend on."""
    accelerator_type: str | None = None
    """Ray's name of an accelerator, e.g. `H200`, `A100-80G`, `L4`."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a worker's node must have."""
    retries: int = Field(2, ge=0)
    """How often a phase goes on from its last checkpoint after a worker or node died."""
    stall_s: float = Field(600, gt=0)
    """Report a worker or actor every minute, with what it did last and a stack, once no step has come from it for so long."""
    stall_kill_s: float | None = Field(None, gt=0)
    """End it after so long, as if it had died; unset = never. More than the longest step, model load or compilation."""
    grace_s: float = Field(20.0, ge=0)
    """How long the job waits for a checkpoint when SIGTERM ends it; less than the time until SIGKILL, which is 30 s in
    Kubernetes and Slurm. `ray job stop` leaves 3 s in all, whatever this says."""

    @model_validator(mode="after")
    def _check_stall(self) -> Self:
        if self.stall_kill_s is not None and self.stall_kill_s < self.stall_s:
            raise ValueError(
                f"stall_kill_s: {self.stall_kill_s:g} is less than stall_s: {self.stall_s:g}; a stall is reported before it ends"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As for sources: sweeps that are finished hold a dump of their phases' placements in their fingerprints.
        later = {"stall_s": 600, "stall_kill_s": None, "grace_s": 20.0}
        dumped: dict[str, Any] = serialise(self)
        return {key: value for key, value in dumped.items() if key not in later or value != later[key]}

    @property
    def least_workers(self) -> int:
        """How many the cluster must have room for."""
        return self.workers


class ActorPlacement(Placement):
    """Where on the cluster questions are answered; `workers` are actors that each hold the base once."""

    min_workers: int | None = Field(None, ge=1)
    """Begin with so many actors and grow up to `workers` as the cluster has room; unset = all of them from the start."""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        return self

    @property
    def least_workers(self) -> int:
        return self.min_workers or self.workers


class PhaseConfig(Section):
    """One phase of the curriculum."""

    name: Name
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
    """Shape of this phase's adapter where it differs from the run's; a phase that continues keeps its parent's."""
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
    """Where this phase runs when not where the run says."""


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
    batch_size: int = Field(32, ge=1)
    """Questions handed to an actor at a time."""
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


class Storage(Section):
    """Where things are kept."""

    folder: str = "runs"
    """The folder of all runs; on a cluster, a mount that every node sees, or `s3://bucket/folder` or `gs://bucket/folder`.
    Endpoint and credentials of a store come from the environment."""
    cache: str | None = None
    """Where a miniature base, tokens and working copies of runs in a store are kept; unset = `~/.cache/medlora`."""


class RunConfig(Section):
    """A whole run: base, phases and evaluation."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    base: BaseModelConfig
    lora: LoraSettings = LoraSettings()
    start: tuple[str, ...] = ()
    """Folders or `s3://` / `gs://` URIs of PEFT adapters from elsewhere, oldest first, that the first phase stands on."""
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    evaluation: StageEvaluationConfig | None = None
    data: DataConfig = DataConfig()
    placement: Placement = Placement()
    storage: Storage = Storage()

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

    def phase(self, name: str) -> PhaseConfig:
        """The phase of that name; raises KeyError."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)
