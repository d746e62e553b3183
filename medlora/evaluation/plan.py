"""An evaluation's plan and fingerprint, made before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medlora import prompts
from medlora.artifacts.bases import check_base_files, check_base_template, identify_base
from medlora.config.evaluation import EvaluateConfig, EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.curriculum.checks import check_adapters
from medlora.data.quarantine import describe_quarantine
from medlora.data.sources import hash_records
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, LEDGER, read_ledger
from medlora.evaluation.questions import Asked, read_asked
from medlora.evaluation.stages import Stages, _find_trained_styles, find_doubts, find_notes, find_stages
from medlora.runs.files import read_mapping
from medlora.runs.manifests import as_json, find_differences, hash_files, hash_json, read_manifest


def describe_other_task(stages: Stages, evaluation: EvaluationConfig) -> list[str]:
    """A sentence where stages that were trained to reason first are scored without their reasoning."""
    if evaluation.scoring not in ("letter", "option_text"):
        return []
    reasoning = [name for name, chain in stages.items() if chain and _was_trained_to_reason(Path(chain[-1].folder))]
    if not reasoning:
        return []
    asks = "the letter at once" if evaluation.scoring == "letter" else "the options' texts without reasoning"
    return [
        f"{', '.join(reasoning)}: trained to reason before the answer, and scored by `{evaluation.scoring}`, which asks for "
        f"{asks}; that is another task than the trained one (`scoring: reason` scores the trained one)"
    ]


def _was_trained_to_reason(adapter: Path) -> bool:
    """Whether one of our phases made the adapter from questions with rationales, in a style that shows them."""
    manifest = read_manifest(adapter.parent)
    return bool(manifest and manifest.get("rationale")) and bool(
        _find_trained_styles(adapter) & {"reasoning", "reasoning_full"}
    )


_BATCH_ON_CPU = 32
_BATCH_ON_GPU: dict[str, int] = {"letter": 1024}
_BATCH_OF_WRITING = 256


def choose_batch_size(config: EvaluationConfig, gpus: float) -> int:
    """Questions handed to an actor at a time: as configured, else as many as keep a CPU or a GPU busy."""
    if config.batch_size is not None:
        return config.batch_size
    return _BATCH_ON_GPU.get(config.scoring, _BATCH_OF_WRITING) if gpus else _BATCH_ON_CPU


def _dump_evaluation(config: EvaluationConfig) -> dict[str, Any]:
    """The part of the config that answers depend on. Keys that came later leave it as it was at their defaults."""
    dumped = config.model_dump(mode="json", exclude={"placement", "tests", "beside_training"})
    if dumped["batch_size"] is None:
        dumped["batch_size"] = _BATCH_ON_CPU
    if dumped["dequantize"] == "auto":
        del dumped["dequantize"]
    return dumped


def describe_evaluation(
    base: BaseModelConfig,
    seed: int,
    evaluation: EvaluationConfig,
    stages: Stages,
    asked: Asked,
) -> dict[str, Any]:
    """What the answers depend on, as nested plain values: the evaluation's fingerprint."""
    folders = {link.folder for chain in stages.values() for link in chain}
    hashes = {folder: hash_json(hash_files(Path(folder))) for folder in folders}
    described = {
        "evaluation": _dump_evaluation(evaluation),
        "tests": {name: hash_records(records) for name, records in asked.tests.items()},
        "base": base.model_dump(mode="json", exclude={"extra_tokens"}),
        "base_files": identify_base(base),
        "stages": {name: [hashes[link.folder] for link in chain] for name, chain in stages.items()},
        "prompts": prompts.version(),
        "seed": seed,
    }
    if shown := [*asked.shots, *([asked.worked] if asked.worked else [])]:
        described["shown"] = hash_records(shown)
    plain: dict[str, Any] = as_json(described)
    return plain


def describe_progress(folder: Path, stages: Sequence[str]) -> str:
    """How many answers are saved, for whoever ended the evaluation."""
    return f"{len(read_ledger(folder / LEDGER, stages)):,} answers are saved; the same command asks the rest"


@dataclass(frozen=True)
class EvaluationTask:
    """What is scored: stages of one base on the questions of one config."""

    base: BaseModelConfig
    seed: int
    cache: str
    """Where a miniature base is saved."""
    stages: Stages
    config: EvaluationConfig
    asked: Asked

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the answers depend on; see `describe_evaluation`."""
        return describe_evaluation(self.base, self.seed, self.config, self.stages, self.asked)

    def select(self, stage: str, chain: Sequence[Link]) -> EvaluationTask:
        """The same questions for one stage alone."""
        return replace(self, stages={stage: chain})


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation whose every part was found: what `medlora evaluate` hands on."""

    task: EvaluationTask
    notes: list[str]
    """Doubts that the user overruled with --force, and notes of the runs' data cards; the report repeats them."""


def check_evaluation(config: EvaluateConfig, force: bool) -> EvaluationPlan:
    """Find stages and tests and look for doubts; raises InputError for all that can be wrong before a model is loaded."""
    check_base_files(config.base)
    stages = find_stages(config)
    check_adapters(config.base, stages)
    asked = read_asked(config.evaluation, config.seed, config.data.max_bad_fraction)
    if config.evaluation.style != "kormedmcqa":
        check_base_template(config.base)
    doubts = find_doubts(config.base, stages, config.evaluation, config.seed)
    if doubts and not force:
        shown = "\n  ".join(doubts)
        raise InputError(
            f"these numbers would mislead:\n  {shown}\nfix the config, or give --force; the report will note it too"
        )
    task = EvaluationTask(config.base, config.seed, str(config.storage.cache_folder), stages, config.evaluation, asked)
    notes = [*doubts, *describe_other_task(stages, config.evaluation), *find_notes(config)]
    return EvaluationPlan(task, [*notes, *describe_quarantine(config.evaluation)])


def refuse_other(folder: Path, fingerprint: Mapping[str, object]) -> None:
    """Raise InputError when the folder holds another evaluation, finished or not."""
    was = read_mapping(folder / FINGERPRINT)
    if was is not None and (differences := find_differences(was, fingerprint)):
        shown = "\n  ".join(differences[:5])
        raise InputError(f"{folder}: holds another evaluation:\n  {shown}\nchoose another folder with --out")
