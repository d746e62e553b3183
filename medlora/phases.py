"""One phase from records to adapter, without Ray."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from medlora import runs
from medlora.callbacks import Report, Segment
from medlora.chains import add_adapter, load_adapter_weights, load_chain, save_adapter
from medlora.config import BaseModelConfig, McqStyle, TrainSource
from medlora.data_card import read_kept
from medlora.encoding import Collator, Lengths, Row, encode
from medlora.errors import InputError
from medlora.lineage import PhaseJob, extend_chain
from medlora.mixture import Part, derive_seed, interleave
from medlora.models import added_token_ids, clear_memory, describe_device, letter_token_ids, load_base, load_tokenizer
from medlora.prompts import render
from medlora.records import FIELDS, McqRecord, Record
from medlora.sources import read
from medlora.stages import load_stage_tokenizer, locate_base
from medlora.training import train
from medlora.validation import Validator

log = logging.getLogger("medlora.phase")


@dataclass(frozen=True)
class PreparedPart:
    """One source of a phase as rows, with its place in the mixture."""

    rows: list[Row]
    part: Part
    lengths: Lengths


def run_phase(job: PhaseJob, folder: runs.PhaseFolder, report: Report, device: str = "cpu") -> dict[str, Any]:
    """Train a phase into its folder and return its manifest; goes on from the last whole checkpoint if there is one.

    Runs the same in a Ray Train worker, one of several, as in a plain process. Raises InputError for what only the user
    can mend.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    main = world == 1 or dist.get_rank() == 0
    # A worker of a driver that was killed may live on for some seconds: wait for it rather than write beside it.
    holding = runs.hold(folder.lock, f"phase {job.phase.name} of {job.run}", wait_s=60) if main else nullcontext()
    sinks = (
        (logging.getLogger("medlora"), folder.log),
        (logging.getLogger("medlora.validation"), folder.validation_log),
    )
    folder.root.mkdir(parents=True, exist_ok=True)
    logging_to = runs.log_to(*sinks) if main else nullcontext()
    transformers.logging.set_verbosity_error()
    with holding, logging_to:
        torch.set_num_threads(job.threads)
        try:
            return _run(job, folder, report if main else lambda event: None, device, world, main)
        except (OSError, RuntimeError) as error:
            # torch.save and safetensors say in words of their own that nothing more could be written.
            if runs.is_disk_full(error, folder.root):
                raise InputError(
                    f"{folder.root}: the disk is full; make room and give the same command again, it goes on from the "
                    "last whole checkpoint"
                ) from error
            raise
        finally:
            clear_memory()


def _run(
    job: PhaseJob, folder: runs.PhaseFolder, report: Report, device: str, world: int, main: bool
) -> dict[str, Any]:
    phase, started = job.phase, time.monotonic()
    seed = derive_seed(job.seed, "phase", phase.name)
    report({"event": "phase", "phase": phase.name, "device": str(describe_device(device))})
    log.info("phase %s (%s) on %s", phase.name, phase.chain, describe_device(device))
    if main:
        runs.write_json(folder.fingerprint, job.fingerprint)
    base = locate_base(
        job.base, job.cache, job.seed, lambda event: report({"event": "build", "phase": phase.name, **event})
    )
    base_s = time.monotonic() - started

    tokenizer = _load_phase_tokenizer(job, base)
    records = {f"{i}:{source.source}": read_kept(source, job.dropped) for i, source in enumerate(phase.sources)}
    _check_letters(tokenizer, [record for part in records.values() for record in part])
    worked = _choose_worked_example(records.values(), seed) if phase.full_prompt else None
    batch = phase.batch_size * phase.accumulation * world
    parts = _prepare(job, tokenizer, records, seed)
    segments = [("normal", "reasoning", parts)]
    if phase.full_prompt:
        segments.insert(0, ("full", "reasoning_full", _prepare(job, tokenizer, records, seed, worked)))
    counts = {name: {key: asdict(part.lengths) for key, part in prepared.items()} for name, _, prepared in segments}
    _report_lengths(counts, phase.name, phase.max_tokens, report)

    model = load_base(base, tokenizer, device)
    model = _attach(job, base, model, tokenizer, seed)
    prepared_s = time.monotonic() - started - base_s
    collator = Collator(tokenizer.pad_token_id, token_type_ids=model.config.model_type == "gemma3")
    validator = _make_validator(job, tokenizer, collator, records, seed)
    done = []
    for name, style, prepared in segments:
        steps, epoch_steps = _count_steps(job, name, sum(part.part.size for part in prepared.values()), batch)
        draws = interleave({key: part.part for key, part in prepared.items()}, steps * batch, seed)
        segment = Segment(
            name=name,
            rows=[prepared[key].rows[i] for key, i in draws],
            steps=steps,
            epoch_steps=epoch_steps,
            validate=_bind(validator, style if name == "full" else None, worked) if validator else None,
            stop_at_format_score=phase.full_prompt.until_format_score if phase.full_prompt and name == "full" else None,
        )
        result = train(model, phase.name, segment, phase, collator, folder, derive_seed(seed, name), report)
        done.append(result)
        if name == "full":
            why = "the format score reached its threshold" if result["stopped_early"] else "the step budget is spent"
            report(
                {
                    "event": "note",
                    "phase": phase.name,
                    "text": f"switches to the normal prompt after {result['steps']} steps: {why}",
                }
            )
            log.info("switches from full to normal prompts after %d steps: %s", result["steps"], why)
    best = None
    if phase.validation and phase.validation.keep_best:
        if world > 1:
            dist.barrier()
        load_adapter_weights(model, phase.name, folder.best)
        scored = [row for row in runs.read_json_lines(folder.validation) if row.get("best")]
        best = scored[-1] if scored else None
    if not main:
        return {}
    extended = len(tokenizer) != len(load_tokenizer(base))
    save_adapter(model, phase.name, folder.adapter, tokenizer if extended else None, job.base.model)
    asked = [key.partition(":")[2] for key, part in records.items() if isinstance(part[0], McqRecord)]
    return _finish(
        job,
        folder,
        device,
        counts,
        asked,
        done,
        best,
        {"base": base_s, "prepare": prepared_s, "all": time.monotonic() - started},
    )


def _load_phase_tokenizer(job: PhaseJob, base: BaseModelConfig) -> Any:
    if job.phase.chain == "new":
        return load_tokenizer(base, extra_tokens=job.base.extra_tokens if job.phase.train_extra_tokens else ())
    tokenizer = load_stage_tokenizer(base, job.parent)
    if job.phase.train_extra_tokens and not added_token_ids(tokenizer, job.base.extra_tokens):
        raise InputError(
            f"phases.{job.phase.name}.train_extra_tokens: the chain below has no added tokens; a vocabulary is extended by a `new` phase"
        )
    return tokenizer


def _check_letters(tokenizer: Any, records: Sequence[Record]) -> None:
    longest = max((record.letters for record in records if isinstance(record, McqRecord)), key=len, default="")
    letter_token_ids(tokenizer, longest)


def _attach(job: PhaseJob, base: BaseModelConfig, model: Any, tokenizer: Any, seed: int) -> Any:
    """The chain action: what of the parent stays and is frozen, and which adapter is trained."""
    phase, parent = job.phase, [(link.name, Path(link.folder)) for link in job.parent]
    if phase.chain == "continue":
        *frozen, (_, last) = parent
        return load_chain(model, [*frozen, (phase.name, last)], trainable=phase.name)
    if phase.chain == "stack":
        model = load_chain(model, parent)
    rows = added_token_ids(tokenizer, job.base.extra_tokens) if phase.train_extra_tokens else []
    return add_adapter(model, phase.name, job.lora, rows, derive_seed(seed, "adapter"))


def _choose_worked_example(parts: Any, seed: int) -> McqRecord:
    """The solved question that full prompts show: with a rationale where the data has any, never an invented one."""
    questions = [record for part in parts for record in part if isinstance(record, McqRecord)]
    if not questions:
        raise InputError(
            "full_prompt: the phase has no multiple-choice source to take a worked example from; remove the key"
        )
    reasoned = [record for record in questions if record.rationale] or questions
    return random.Random(derive_seed(seed, "worked")).choice(reasoned)


def _prepare(
    job: PhaseJob, tokenizer: Any, records: dict[str, list[Record]], seed: int, worked: McqRecord | None = None
) -> dict[str, PreparedPart]:
    """Every source of the phase and of what it replays as rows; with `worked`, questions in the full prompt mode."""
    phase = job.phase
    prepared = {}
    replay_share = sum(replay.share for replay in phase.replay)
    weights = sum(source.weight or 0 for source in phase.sources)
    for (key, part), source in zip(records.items(), phase.sources, strict=True):
        share = (1 - replay_share) * source.weight / weights if source.weight else None
        prepared[key] = _prepare_part(job, tokenizer, key, part, source, share, seed, worked)
    for replay in phase.replay:
        sources = job.replayed[replay.phase]
        read_again = [read_kept(source, job.dropped) for source in sources]
        total = sum(source.weight or len(part) for source, part in zip(sources, read_again, strict=True))
        for i, (source, part) in enumerate(zip(sources, read_again, strict=True)):
            key = f"{replay.phase}.{i}:{source.source}"
            share = replay.share * (source.weight or len(part)) / total
            prepared[key] = _prepare_part(job, tokenizer, key, part, source, share, seed)
    if not any(part.rows for part in prepared.values()):
        longest = max(part.lengths.longest for part in prepared.values())
        raise InputError(
            f"phases.{phase.name}.max_tokens: every example is longer than {phase.max_tokens} tokens (the longest has {longest}); raise it"
        )
    return prepared


def _prepare_part(
    job: PhaseJob,
    tokenizer: Any,
    key: str,
    records: Sequence[Record],
    source: TrainSource,
    share: float | None,
    seed: int,
    worked: McqRecord | None = None,
) -> PreparedPart:
    shuffled = list(records)
    random.Random(derive_seed(seed, key)).shuffle(shuffled)
    style: McqStyle = source.style
    if worked is not None and isinstance(shuffled[0], McqRecord) and job.phase.full_prompt:
        style = "reasoning_full"
        shuffled = [record for record in shuffled if record.id != worked.id][: job.phase.full_prompt.records]
    examples = [example for record in shuffled for example in render(record, style, worked)]
    rows, lengths = encode(tokenizer, examples, job.phase.max_tokens, job.phase.packing)
    return PreparedPart(rows, Part(len(rows), share), lengths)


def _report_lengths(counts: dict[str, dict[str, dict[str, int]]], phase: str, max_tokens: int, report: Report) -> None:
    for segment, parts in counts.items():
        for key, lengths in parts.items():
            log.info("%s %s: %s", segment, key, "  ".join(f"{name} {value}" for name, value in lengths.items()))
            if lengths["dropped"] or lengths["split"]:
                text = (
                    f"{key.partition(':')[2]}: of {lengths['examples']} examples {lengths['dropped']} are longer than {max_tokens} tokens "
                    f"and left out, {lengths['split']} documents go on in a further row"
                )
                report({"event": "note", "phase": phase, "text": text})


def _count_steps(job: PhaseJob, segment: str, rows: int, batch: int) -> tuple[int, int]:
    """Optimiser steps of a segment and of one epoch of its rows."""
    epoch_steps = max(1, -(-rows // batch))
    if segment == "full" and job.phase.full_prompt:
        return job.phase.full_prompt.max_steps, epoch_steps
    return job.phase.max_steps or max(1, round(job.phase.epochs * rows / batch + 0.499)), epoch_steps


def _make_validator(
    job: PhaseJob, tokenizer: Any, collator: Collator, records: dict[str, list[Record]], seed: int
) -> Validator | None:
    config = job.phase.validation
    if config is None:
        return None
    shown = {
        name
        for part in records.values()
        for record in part
        if isinstance(record, McqRecord)
        for name in record.rationale
    }
    required = [name for name in FIELDS if name in shown]
    return Validator(
        tokenizer, collator, config, [read(source) for source in config.sources], seed, required, job.phase.max_tokens
    )


def _bind(validator: Validator, style: McqStyle | None, worked: McqRecord | None) -> Any:
    return lambda model: validator.score(model, style, worked)


def _finish(
    job: PhaseJob,
    folder: runs.PhaseFolder,
    device: str,
    counts: dict[str, Any],
    question_sources: list[str],
    segments: list[dict[str, Any]],
    best: dict[str, Any] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write the manifest, then remove what only the unfinished phase needed."""
    chain = extend_chain(job.parent, job.phase, folder.adapter)
    log.info("phase %s is finished", job.phase.name)
    about = {
        "phase": job.phase.name,
        "seed": job.seed,
        "chain": [link.name for link in chain],
        "adapter_hash": runs.hash_json(runs.hash_files(folder.adapter)),
        "counts": counts,
        "question_sources": question_sources,
        "segments": segments,
        "best": best,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "device": str(describe_device(device)).partition(",")[0],
        "versions": runs.get_versions(),
        "fingerprint": job.fingerprint,
    }
    manifest = runs.commit(folder.root, about, passing=(folder.checkpoints, folder.best))
    runs.remove(folder.checkpoints, folder.best)
    return manifest
