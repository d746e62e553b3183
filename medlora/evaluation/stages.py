"""Stage names -> chains of adapters, and what a reader of the scores must know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlora.artifacts.adapters import fetch_adapter
from medlora.config.base import McqStyle, Scoring
from medlora.config.evaluation import EvaluateConfig, EvaluationConfig, StageConfig
from medlora.config.model import BaseModelConfig
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain, find_chain, start_chain
from medlora.curriculum.checks import find_stage_doubts
from medlora.data.card import describe_overlap, read_card
from medlora.errors import InputError
from medlora.runs import mirror
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import read_manifest
from medlora.runs.object_store import is_store

Stages = Mapping[str, Sequence[Link]]
"""Stage name -> its chain of adapters; the plain base has none."""


def find_stages(config: EvaluateConfig) -> dict[str, tuple[Link, ...]]:
    """The stages by name, each adapter found; raises InputError naming the key of what is not there or there twice."""
    stages: dict[str, tuple[Link, ...]] = {}
    for i, stage in enumerate(config.stages):
        for name, chain in _expand(stage, f"stages.{i}", config.storage.cache):
            if name in stages:
                raise InputError(f"stages.{i}: there is a stage {name!r} already; give it another name")
            stages[name] = chain
    return stages


def _expand(stage: str | StageConfig, key: str, cache: str | None) -> list[tuple[str, tuple[Link, ...]]]:
    if isinstance(stage, StageConfig):
        links = [
            _find_link(f"{stage.name}-{j}", folder, f"{key}.adapters.{j}", cache)
            for j, folder in enumerate(stage.adapters)
        ]
        return [(stage.name, tuple(links))]
    folder, colon, names = stage.rpartition(":")
    run = RunFolder(find_run(folder, cache))
    mirror.pull(run.root, exclude=("checkpoints", "best", "scoring", "evaluation", ".replaced"))
    if not colon or not run.config.is_file():
        raise InputError(f"{key}: {stage!r} names no run; write FOLDER:STAGE,STAGE, e.g. runs/quickstart:base,02")
    found = []
    for name in names.split(","):
        chain = () if name == "base" else find_chain(run, name)
        found.append((name, tuple(_find_link(link.name, link.folder, key, cache) for link in chain)))
    return found


def find_run(folder: str, cache: str | None) -> Path:
    """Where a finished run is read: its folder, or a copy of what is in a store, apart from the one it is trained in."""
    if is_store(folder):
        return mirror.find_copy(folder, cache, "read")
    return Path(folder).expanduser().absolute()


def _find_link(name: str, where: str, key: str, cache: str | None) -> Link:
    try:
        return Link(name=name, folder=str(fetch_adapter(where, cache)))
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def find_notes(config: EvaluateConfig) -> list[str]:
    """Notes from the data cards of the runs that the stages were taken from."""
    folders = {stage.rpartition(":")[0] for stage in config.stages if isinstance(stage, str)}
    found = {name: RunFolder(find_run(name, config.storage.cache)) for name in sorted(folders)}
    cards = [(name, read_card(run.data)) for name, run in found.items()]
    return [f"{name}: {note}" for name, card in cards for note in describe_overlap(card)]


def find_doubts(base: BaseModelConfig, stages: Stages, evaluation: EvaluationConfig, seed: int = 0) -> list[str]:
    """What makes the numbers doubtful: an adapter for another base or other adapters, or another prompt style."""
    doubts = find_stage_doubts(base, seed, stages)
    for link in {link.folder: link for chain in stages.values() for link in chain}.values():
        styles = _find_trained_styles(Path(link.folder))
        if styles and evaluation.style not in styles:
            doubts.append(
                f"{link.folder} was trained with prompt style {', '.join(sorted(styles))}, not {evaluation.style}"
            )
    return doubts


def _find_trained_styles(adapter: Path) -> set[str]:
    """The styles of the questions that one of our phases trained on; empty for others' adapters and for plain text."""
    manifest = read_manifest(adapter.parent)
    if manifest is None:
        return set()
    fingerprint: dict[str, Any] = manifest.get("fingerprint", {})
    described: dict[str, Any] = next((v for k, v in fingerprint.items() if k.startswith("phases.")), {})
    questions = set(manifest.get("question_sources", []))
    return {source["style"] for source in described.get("sources", []) if source["source"] in questions}


def find_trained(run: RunFolder, config: RunConfig) -> dict[str, tuple[Link, ...]]:
    """The stages of a run that exist: the base, and the chain of every phase that is finished, in their order."""
    stages: dict[str, tuple[Link, ...]] = {"base": ()}
    chain = start_chain(config)
    if chain:
        stages["start"] = chain
    for phase in config.phases:
        chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
        if all(Path(link.folder).is_dir() for link in chain):
            stages[phase.name] = chain
    return stages


def find_asking(chain: Sequence[Link]) -> tuple[Scoring, McqStyle]:
    """How a stage is asked as it was trained: with its reasoning, or for the letter at once."""
    if not chain:
        return "letter", "reasoning"
    adapter = Path(chain[-1].folder)
    styles = _find_trained_styles(adapter)
    manifest = read_manifest(adapter.parent)
    if "reasoning" in styles:
        return ("reason" if manifest and manifest.get("rationale") else "letter"), "reasoning"
    return "letter", ("kormedmcqa" if styles == {"kormedmcqa"} else "answer" if styles else "reasoning")
