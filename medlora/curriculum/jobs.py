"""What each phase is made from, as plain values with a fingerprint, and whether a finished phase is still valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlora import prompts
from medlora.artifacts.bases import identify_base, read_extra_tokens
from medlora.config.base import Section
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import PhaseConfig, name_as_before
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig, TrainSource
from medlora.curriculum.chains import Link
from medlora.data.card import find_dropped, stream_kept
from medlora.data.sources import hash_records, pack_scan, scan
from medlora.errors import InputError
from medlora.runs import files
from medlora.runs.files import is_temporary
from medlora.runs.folders import PhaseFolder, RunFolder
from medlora.runs.manifests import as_json, find_differences, hash_files, hash_json, read_manifest

_NOT_IN_FINGERPRINT = {"description", "placement", "log_every_steps", "checkpoint_every_steps", "batching", "compile"}
"""Keys of a phase that change where and how loudly it runs, not what it learns."""


class PhaseJob(Section):
    """All that one phase needs, as plain values that cross into a Ray worker: no other part of the config goes along."""

    run: str
    base: BaseModelConfig
    cache: str
    """Where a miniature base is saved."""
    lora: LoraSettings
    phase: PhaseConfig
    replayed: dict[str, tuple[TrainSource, ...]]
    """The sources of the earlier phases that this one replays."""
    parent: tuple[Link, ...]
    seed: int
    threads: int
    report_to: tuple[str, ...] = ()
    """Trackers that show the losses, too; no part of the fingerprint."""
    dropped: dict[str, tuple[str, ...]] = {}
    """Ids of the training records that are left out, by source."""
    scans: tuple[dict[str, Any], ...] = ()
    """What `sources.scan` found in each source, so that a worker need not look again."""
    fingerprint: dict[str, object]


def make_job(
    config: RunConfig,
    phase: PhaseConfig,
    parent: Sequence[Link],
    dropped: Mapping[str, tuple[str, ...]] | None = None,
) -> PhaseJob:
    """The job of one phase on top of `parent`, whose adapters must be finished unless only `describe_phase` is wanted.

    `dropped` is what `data_card.find_dropped` found before; unset = it looks.
    """
    replayed = {replay.phase: config.phase(replay.phase).sources for replay in phase.replay}
    lora = phase.lora or config.lora
    if phase.chain == "continue":
        # The adapter has the shape of the phase that made it.
        makers = [earlier for earlier in config.phases[: config.phases.index(phase)] if earlier.chain != "continue"]
        lora = (makers[-1].lora if makers else None) or config.lora
    placement = phase.placement or config.placement
    job = PhaseJob(
        run=config.name,
        base=config.base.model_copy(update={"extra_tokens": read_extra_tokens(config.base)}),
        cache=str(config.storage.cache_folder),
        lora=lora,
        phase=phase,
        replayed=replayed,
        parent=tuple(parent),
        seed=config.seed,
        threads=placement.cpus_per_worker,
        report_to=config.report_to,
        dropped=dict(find_dropped(config) if dropped is None else dropped),
        scans=tuple(pack_scan(source) for sources in (phase.sources, *replayed.values()) for source in sources),
        fingerprint={},
    )
    return job.model_copy(update={"fingerprint": _describe(job)})


def _describe(job: PhaseJob) -> dict[str, object]:
    """What the phase's result depends on, as nested plain values, so that a difference can be named."""
    sources = {f"{i}:{source.source}": source for i, source in enumerate(job.phase.sources)}
    for name, replayed in job.replayed.items():
        sources |= {f"{name}.{i}:{source.source}": source for i, source in enumerate(replayed)}
    return {
        f"phases.{job.phase.name}": _dump_phase(job.phase),
        "base": job.base.model_dump(mode="json"),
        "base_files": identify_base(job.base),
        "lora": job.lora.model_dump(mode="json"),
        "data": {key: _hash_kept(source, job.dropped) for key, source in sources.items()},
        "prompts": prompts.version(),
        "seed": job.seed,
        "parent": [
            (manifest.get("adapter_hash") if (manifest := read_manifest(Path(link.folder).parent)) else None)
            or hash_json(hash_files(Path(link.folder)))
            for link in job.parent
        ],
    }


def _dump_phase(phase: PhaseConfig) -> dict[str, object]:
    """The part of a phase's config that its result depends on. Keys that came later are left out at their defaults."""
    dumped = phase.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
    name_as_before(dumped)
    if dumped["weights"] == "records":
        del dumped["weights"]
    if dumped["share_prefix"]:
        del dumped["share_prefix"]
    if dumped["gradient_checkpointing"] == "auto":
        dumped["gradient_checkpointing"] = False
    for source in dumped["sources"]:
        source.pop("licence", None)
    return dumped


def _hash_kept(source: SourceConfig, dropped: Mapping[str, Sequence[str]]) -> str:
    return hash_records(stream_kept(source, dropped)) if dropped.get(source.source) else scan(source).hash


def find_obstacle(job: PhaseJob, folder: PhaseFolder, with_parent: bool = True) -> list[str]:
    """The fields in which the phase's folder, finished or not, differs from the job; [] when it may be used."""
    was = files.read_mapping(folder.fingerprint)
    if was is None:
        return [f"phases/{job.phase.name} holds files without a fingerprint"] if _holds_work(folder) else []
    now = job.fingerprint
    if not with_parent:
        was, now = {**was, "parent": None}, {**now, "parent": None}
    return find_differences(was, as_json(now))


def _holds_work(folder: PhaseFolder) -> bool:
    logs = {path.name for path in folder.logs}  # opened before the fingerprint is written
    return folder.root.is_dir() and any(
        path.name not in logs and not is_temporary(path.name) for path in folder.root.iterdir()
    )


def refuse(run: RunFolder, job: PhaseJob, differences: Sequence[str]) -> InputError:
    """The message for a phase whose folder was made from something else."""
    shown = "\n  ".join(differences[:5])
    return InputError(
        f"{run.root}: phase {job.phase.name} there was made from something else:\n  {shown}\n"
        f"Give this run another name (--set name=...), or say --redo {job.phase.name}; the old phase is then "
        "moved aside, not lost"
    )
