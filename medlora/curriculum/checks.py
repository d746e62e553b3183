"""Everything that can be wrong with a run's inputs, found before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medlora.artifacts.adapter_checks import check_adapter
from medlora.artifacts.adapter_origin import find_base_doubts, find_missing_parents, read_origin
from medlora.artifacts.base_checks import check_layers, check_tokenizer, read_base_tensors
from medlora.artifacts.bases import (
    check_base_files,
    check_base_template,
    find_base_folder,
    identify_weights,
    read_extra_tokens,
)
from medlora.config.model import BaseModelConfig
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.chains import Link, start_chain
from medlora.curriculum.tracking import check_trackers
from medlora.data.sources import Scan, read, scan
from medlora.errors import InputError
from medlora.records import Record


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


def check_inputs(config: RunConfig, force: bool = False) -> list[str]:
    """Look at the base and read everything the run will read, so that every fault is reported now.

    Returns what is doubtful about adapters in `start` where `force` overrules it. Raises InputError with the dotted key.
    """
    check_trackers(config.report_to)
    if config.base.quantization == "auto":
        raise InputError(
            "base.quantization: auto is for `medlora train` and `medlora plan`; say none, int8 or nf4 here"
        )
    check_base_files(config.base)
    start = {"start": start_chain(config)}
    check_adapters(config.base, start)
    doubts = find_stage_doubts(config.base, config.seed, start)
    if doubts and not force:
        shown = "\n  ".join(doubts)
        raise InputError(
            f"start: the first phase would not be trained on what is meant:\n  {shown}\nfix it, or give --force"
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
