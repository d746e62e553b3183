"""What each phase is made from, the chain of adapters it stands on, and whether a finished one still stands."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlora import miniature, prompts, runs, storage
from medlora.adapter_checks import check_adapter
from medlora.adapter_origin import find_base_doubts, find_missing_parents, read_origin
from medlora.base_checks import check_base, check_layers, check_tokenizer, read_base_tensors, sample_weights
from medlora.config import BaseModelConfig, LoraSettings, PhaseConfig, RunConfig
from medlora.config_file import load
from medlora.config_sources import Section, SourceConfig, TrainSource
from medlora.data_card import find_dropped, stream_kept
from medlora.errors import InputError
from medlora.model_files import CONFIG, WEIGHTS, read_mapping
from medlora.object_store import is_store
from medlora.readers import go_offline_without_hub
from medlora.records import Record
from medlora.sources import Scan, hash_records, pack_scan, read, scan
from medlora.turns import check_template

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_IN_FINGERPRINT = {"placement", "log_every_steps", "checkpoint_every_steps", "batching", "compile"}
"""Keys of a phase that change where and how loudly it runs, not what it learns."""


_CONFIG_BYTES = 4 * 2**20
_PLACES = ("lora_adapter", "final", "adapter", "")


class Link(Section):
    """One adapter of a stage's chain: the name of the phase that trained it and its folder."""

    name: str
    folder: str


class PhaseJob(Section):
    """All that one phase needs, as plain values that cross into a Ray worker: no other part of the config goes along."""

    run: str
    base: BaseModelConfig
    cache: str
    """Where a miniature base is kept."""
    lora: LoraSettings
    phase: PhaseConfig
    replayed: dict[str, tuple[TrainSource, ...]]
    """The sources of the earlier phases that this one replays."""
    parent: tuple[Link, ...]
    seed: int
    threads: int
    dropped: dict[str, tuple[str, ...]] = {}
    """Ids of the training records that are left out, by source."""
    scans: tuple[dict[str, Any], ...] = ()
    """What `sources.scan` found in each source, so that a worker need not look again."""
    fingerprint: dict[str, Any]


def extend_chain(parent: Sequence[Link], phase: PhaseConfig, adapter: Path) -> tuple[Link, ...]:
    """The chain of the stage that a phase ends with."""
    kept = {"new": (), "continue": tuple(parent[:-1]), "stack": tuple(parent)}[phase.chain]
    return (*kept, Link(name=phase.name, folder=str(adapter)))


def find_chain(run: runs.RunFolder, phase: str) -> tuple[Link, ...]:
    """The chain of the stage that a phase of a run ends with, finished or not; the last of the one before it is what the
    phase stands on. Raises InputError when the run has no such phase."""
    config = load(run.config)
    chain = start_chain(config)
    for each in config.phases:
        chain = extend_chain(chain, each, run.phase(each.name).adapter)
        if each.name == phase:
            return chain
    raise InputError(f"{run.root}: has no phase {phase}; phases: {', '.join(each.name for each in config.phases)}")


def start_chain(config: RunConfig) -> tuple[Link, ...]:
    """The adapters from elsewhere that the first phase stands on; raises InputError for a place that holds none."""
    chain = []
    for i, folder in enumerate(config.start):
        try:
            found = fetch_adapter(folder, config.storage.cache)
        except InputError as error:
            raise InputError(f"start.{i}: {error}") from None
        chain.append(Link(name=f"start-{i}", folder=str(found)))
    return tuple(chain)


def fetch_adapter(where: str, cache: str | None) -> Path:
    """The PEFT adapter of a folder, or of a copy of what is at an `s3://` or `gs://` URI; raises what `find_adapter` raises."""
    if not is_store(where):
        return find_adapter(Path(where).expanduser().absolute())
    copy = storage.find_copy(where, cache, "read")
    storage.pull(copy, passing=("checkpoints", "best"))
    return find_adapter(copy)


def find_adapter(folder: str | Path) -> Path:
    """The PEFT adapter in the `lora_adapter/`, `final/` or `adapter/` of a folder, or in the folder itself.

    Raises InputError when there is none, or it is no LoRA adapter with safetensors weights.
    """
    places = [Path(folder) / place for place in _PLACES]
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        looked = ", ".join(storage.name_place(place) for place in places)
        raise InputError(f"{storage.name_place(Path(folder))}: no adapter here; looked for {CONFIG} in {looked}")
    kind = read_adapter_json(found).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{found / CONFIG}: peft_type is {kind!r}; only LORA adapters make a chain")
    if (found / WEIGHTS).is_file():
        return found
    if (found / "adapter_model.bin").is_file():
        raise InputError(f"{found}: adapter_model.bin is a pickle, which can run code on loading; save it as {WEIGHTS}")
    raise InputError(f"{found}: has no {WEIGHTS}; the adapter was not saved completely")


def read_adapter_json(folder: Path) -> dict[str, Any]:
    """The adapter's config as it stands in its file; raises InputError when it is no JSON mapping."""
    return read_mapping(folder / CONFIG, _CONFIG_BYTES)


def find_base(base: BaseModelConfig) -> str:
    """The base's folder, or its hub id as it stands; raises InputError when it is neither, without importing torch."""
    if base.model == "miniature":
        return base.model
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"base.model: {base.model} is a folder without config.json; name the folder of a Hugging Face model"
            )
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(base.model):
        raise InputError(
            f"base.model: there is no folder {base.model}; name a model's folder or a hub id such as google/medgemma-4b-it"
        )
    return base.model


def find_hub_commit(base: BaseModelConfig) -> str:
    """The commit of a hub model, from the local cache or the hub; raises InputError when neither has it."""
    return _find_snapshot(base).name


def _find_snapshot(base: BaseModelConfig) -> Path:
    """The folder of a hub model in the local cache, with its config at least; raises InputError."""
    go_offline_without_hub()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        config = hf_hub_download(base.model, "config.json", revision=base.revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"base.model: {base.model} is no folder here, and the Hugging Face hub did not give it ({reason}); "
            "download it where there is a hub (`hf download`) and name its folder: --set base.model=/path/to/it"
        ) from None
    return Path(config).parent


def find_base_folder(base: BaseModelConfig) -> Path | None:
    """The folder that holds a base's files here: its own, or the hub's cache; None for the miniature, which is built."""
    found = find_base(base)
    if found == "miniature":
        return None
    return Path(found) if Path(found).is_dir() else _find_snapshot(base)


def check_base_files(base: BaseModelConfig) -> None:
    """Look at a base's files, as far as they are here; raises InputError for what cannot be loaded."""
    folder = find_base_folder(base)
    if folder is not None:
        # What the hub's cache lacks is downloaded where there is a hub.
        complete = Path(base.model).expanduser().is_dir() or bool(os.environ.get("HF_HUB_OFFLINE"))
        check_base(folder, base.trust_remote_code, complete)


def identify_weights(base: BaseModelConfig, seed: int) -> dict[str, Any]:
    """What tells a base's weights from those of another of the same name, see `adapter_origin.differ`."""
    about: dict[str, Any] = {"model": base.model, "files": identify_base(base)}
    folder = find_base_folder(base)
    if folder is None:
        about["seed"] = seed
    elif weights := sample_weights(folder):
        about["weights"] = weights
    return about


def check_adapters(base: BaseModelConfig, stages: Mapping[str, Sequence[Link]]) -> None:
    """Raise InputError for an adapter that would touch more than itself, or cannot sit on the base, from headers alone."""
    adapters = list(dict.fromkeys(Path(link.folder) for chain in stages.values() for link in chain))
    folder = find_base_folder(base) if adapters else None
    tensors = read_base_tensors(folder) if folder else None
    for adapter in adapters:
        checked = check_adapter(adapter)
        check_tokenizer(adapter, base.trust_remote_code, complete=False)
        if tensors:
            check_layers(adapter, checked.sizes, tensors)


def find_stage_doubts(base: BaseModelConfig, seed: int, stages: Mapping[str, Sequence[Link]]) -> list[str]:
    """What makes stages something else than their adapters were trained for: another base, or not the adapters below."""
    chains = [[Path(link.folder) for link in chain] for chain in stages.values()]
    adapters = list(dict.fromkeys(adapter for chain in chains for adapter in chain))
    ours = any(read_origin(adapter) for adapter in adapters)
    doubts = find_base_doubts(identify_weights(base, seed) if ours else {"model": base.model}, adapters)
    doubts += [doubt for chain in chains for doubt in find_missing_parents(chain)]
    return list(dict.fromkeys(doubts))


def identify_base(base: BaseModelConfig) -> str:
    """What tells this base from another of the same name: its files, its hub commit, or how the miniature is built."""
    found = find_base(base)
    if found == "miniature":
        return miniature.fingerprint()
    folder = Path(found)
    if not folder.is_dir():
        return f"hub:{find_hub_commit(base)}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    # The weights of a 27B model take minutes to hash; their names and sizes tell a different model well enough.
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for path in sorted(folder.glob("tokenizer*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_extra_tokens(base: BaseModelConfig) -> tuple[str, ...]:
    """The words of `base.extra_tokens`; `file:PATH` reads one a line, `miniature:extra_tokens` the miniature's own."""
    words: list[str] = []
    for entry in base.extra_tokens:
        if entry == "miniature:extra_tokens":
            from medlora.miniature import corpus

            words += corpus.EXTRA_TOKENS
        elif entry.startswith("file:"):
            path = Path(entry.removeprefix("file:")).expanduser()
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"base.extra_tokens: {path} cannot be read: {error}") from None
            words += [line.strip() for line in lines if line.strip()]
        else:
            words.append(entry)
    return tuple(dict.fromkeys(words))


def check_inputs(config: RunConfig, force: bool = False) -> list[str]:
    """Look at the base and read everything the run will read, so that what is wrong with it is said now.

    Returns what is doubtful about adapters in `start` where `force` overrules it. Raises InputError with the dotted key.
    """
    check_base_files(config.base)
    start = {"start": start_chain(config)}
    check_adapters(config.base, start)
    doubts = find_stage_doubts(config.base, config.seed, start)
    if doubts and not force:
        shown = "\n  ".join(doubts)
        raise InputError(
            f"start: the first phase would not stand on what is meant:\n  {shown}\nmend it, or say --force"
        )
    read_extra_tokens(config.base)
    for i, phase in enumerate(config.phases):
        for j, source in enumerate(phase.sources):
            scan_source(f"phases.{i}.sources.{j}", source)
        for j, dev in enumerate(phase.validation.sources if phase.validation else ()):
            scan_source(f"phases.{i}.validation.sources.{j}", dev)
    check_chat(config)
    for i, test in enumerate(config.evaluation.tests if config.evaluation else ()):
        if scan_source(f"evaluation.tests.{i}", test).kind not in ("mcq", ""):
            raise InputError(
                f"evaluation.tests.{i}.source: {test.source} holds no questions; a test is multiple choice"
            )
    return doubts


def check_chat(config: RunConfig) -> None:
    """Try the base's chat template where a phase or the evaluation puts anything into it; raises InputError."""
    trained = [source for phase in config.phases for source in phase.sources]
    chat = any(
        kind == "translation" or (kind == "mcq" and source.style != "kormedmcqa")
        for source in trained
        for kind in [scan(source).kind]
    )
    asked = config.evaluation is not None and config.evaluation.style != "kormedmcqa"
    checked = any(phase.validation and phase.validation.style != "kormedmcqa" for phase in config.phases)
    if chat or asked or checked:
        check_base_template(config.base)


def check_base_template(base: BaseModelConfig) -> None:
    """Try the chat template of a base in a folder; raises InputError where it cannot write a question."""
    if base.model != "miniature" and Path(folder := find_base(base)).is_dir():
        check_template(Path(folder))


def scan_source(key: str, source: SourceConfig) -> Scan:
    """What a source is, its errors led by the key in the config; raises InputError."""
    try:
        return scan(source)
    except InputError as error:
        raise InputError(f"{key}.source: {error}") from None


def read_source(key: str, source: SourceConfig, max_bad_fraction: float = 0.0) -> list[Record]:
    """The records of a source, its errors led by the key in the config; raises InputError."""
    try:
        return read(source, max_bad_fraction)
    except InputError as error:
        raise InputError(f"{key}.source: {error}") from None


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
        # The adapter keeps the shape it was given by the phase that made it.
        makers = [earlier for earlier in config.phases[: config.phases.index(phase)] if earlier.chain != "continue"]
        lora = (makers[-1].lora if makers else None) or config.lora
    placement = phase.placement or config.placement
    job = PhaseJob(
        run=config.name,
        base=config.base.model_copy(update={"extra_tokens": read_extra_tokens(config.base)}),
        cache=str(Path(config.storage.cache or "~/.cache/medlora").expanduser()),
        lora=lora,
        phase=phase,
        replayed=replayed,
        parent=tuple(parent),
        seed=config.seed,
        threads=placement.cpus_per_worker,
        dropped=dict(find_dropped(config) if dropped is None else dropped),
        scans=tuple(pack_scan(source) for sources in (phase.sources, *replayed.values()) for source in sources),
        fingerprint={},
    )
    return job.model_copy(update={"fingerprint": _describe(job)})


def _describe(job: PhaseJob) -> dict[str, Any]:
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
            (runs.read_manifest(Path(link.folder).parent) or {}).get("adapter_hash")
            or runs.hash_json(runs.hash_files(Path(link.folder)))
            for link in job.parent
        ],
    }


def _dump_phase(phase: PhaseConfig) -> dict[str, Any]:
    """What of a phase's config its result depends on; keys that came later are left out while they say nothing."""
    dumped = phase.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
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


def find_obstacle(job: PhaseJob, folder: runs.PhaseFolder, with_parent: bool = True) -> list[str]:
    """In which fields what stands in the phase's folder, finished or not, differs from the job; [] when it may be used."""
    was = runs.read_mapping(folder.fingerprint)
    if was is None:
        return [f"phases/{job.phase.name} holds files without a fingerprint"] if _holds_work(folder) else []
    now = job.fingerprint
    if not with_parent:
        was, now = {**was, "parent": None}, {**now, "parent": None}
    return runs.find_differences(was, runs.as_json(now))


def _holds_work(folder: runs.PhaseFolder) -> bool:
    logs = {folder.log.name, folder.validation_log.name}  # opened before the fingerprint is written
    return folder.root.is_dir() and any(
        path.name not in logs and not runs.is_temporary(path.name) for path in folder.root.iterdir()
    )


def refuse(run: runs.RunFolder, job: PhaseJob, differences: Sequence[str]) -> InputError:
    """The message for a phase whose folder was made from something else."""
    shown = "\n  ".join(differences[:5])
    return InputError(
        f"{run.root}: phase {job.phase.name} there was made from something else:\n  {shown}\n"
        f"Give this run another name (--set name=...), or say --redo {job.phase.name}; the old phase is then set aside, not lost"
    )
