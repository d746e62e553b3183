"""One phase from records to adapter, without Ray."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import transformers

from medlora import runs
from medlora.callbacks import Report, Segment
from medlora.chains import add_adapter, load_adapter_weights, load_chain, save_adapter
from medlora.config import BaseModelConfig, McqStyle
from medlora.config_sources import TrainSource
from medlora.data_card import stream_kept
from medlora.encoding import Collator, Row, Rows, arrange, tokenise
from medlora.errors import InputError
from medlora.lineage import PhaseJob, extend_chain
from medlora.mixture import Part, derive_seed, interleave, share_tokens
from medlora.models import added_token_ids, clear_memory, describe_device, letter_token_ids, load_base, load_tokenizer
from medlora.preparation import FIRST, plan_preparation, prepare
from medlora.prompts import render
from medlora.records import FIELDS, McqRecord
from medlora.sources import remember, scan, stream
from medlora.stages import load_stage_tokenizer, locate_base
from medlora.training import train
from medlora.validation import Validator

log = logging.getLogger("medlora.phase")


@dataclass(frozen=True)
class PreparedPart:
    """One source of a phase as rows, with its place in the mixture."""

    rows: Rows
    part: Part
    records: int

    @property
    def mean_tokens(self) -> float:
        """Of a row."""
        return self.rows.lengths.tokens / max(1, len(self.rows))


class Drawn(Sequence[Row]):
    """The rows of a segment in training order, each put together when it is asked for."""

    def __init__(self, prepared: dict[str, PreparedPart], draws: Sequence[tuple[str, int]]) -> None:
        self.prepared, self.draws = prepared, draws

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.prepared[key].rows[i] for key, i in self.draws[index]]
        key, i = self.draws[index]
        return self.prepared[key].rows[i]

    def measure_padding(self, batch_size: int) -> float:
        """Share of the positions of all batches that hold nothing; a batch is as long as its longest row."""
        sizes = numpy.array([self.prepared[key].rows.sizes[i] for key, i in self.draws])
        batches = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
        return 1 - sizes.sum() / max(1, sum(int(batch.max()) * len(batch) for batch in batches))


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

    for packed in job.scans:
        remember(packed)
    tokenizer = load_phase_tokenizer(job, base)
    found = [scan(source) for source in phase.sources]
    letter_token_ids(tokenizer, max((each.letters for each in found), key=len))
    worked = _choose_worked_example(job, seed) if phase.full_prompt else None
    batch = phase.batch_size * phase.accumulation * world
    segments = [("normal", "reasoning", _prepare(job, tokenizer, seed, report))]
    if phase.full_prompt:
        segments.insert(0, ("full", "reasoning_full", _prepare(job, tokenizer, seed, report, worked)))
    counts = {
        name: {key: asdict(part.rows.lengths) for key, part in prepared.items()} for name, _, prepared in segments
    }
    _report_lengths(counts, phase.name, phase.max_tokens, report)

    model = load_base(base, tokenizer, device)
    model = _attach(job, base, model, tokenizer, seed)
    prepared_s = time.monotonic() - started - base_s
    collator = Collator(tokenizer.pad_token_id, token_type_ids=model.config.model_type == "gemma3")
    shown = {name for each in found for name in each.rationale}
    validator = _make_validator(job, tokenizer, collator, [name for name in FIELDS if name in shown], seed)
    done = []
    for name, style, prepared in segments:
        steps, epoch_steps = _count_steps(job, name, sum(part.part.size for part in prepared.values()), batch)
        sized = {key: part.part for key, part in prepared.items()}
        if phase.weights == "tokens":
            sized = share_tokens(sized, {key: part.mean_tokens for key, part in prepared.items()})
        rows = Drawn(prepared, interleave(sized, steps * batch, seed))
        padding = rows.measure_padding(phase.batch_size)
        report({"event": "note", "phase": phase.name, "text": f"{name}: {padding:.1%} of the batches is padding"})
        segment = Segment(
            name=name,
            rows=rows,
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
    asked = [source.source for source, each in zip(phase.sources, found, strict=True) if each.kind == "mcq"]
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


def load_phase_tokenizer(job: PhaseJob, base: BaseModelConfig) -> Any:
    """The tokenizer that a phase renders and trains with; raises InputError where its chain has no added tokens to train."""
    if job.phase.chain == "new":
        return load_tokenizer(base, extra_tokens=job.base.extra_tokens if job.phase.train_extra_tokens else ())
    tokenizer = load_stage_tokenizer(base, job.parent)
    if job.phase.train_extra_tokens and not added_token_ids(tokenizer, job.base.extra_tokens):
        raise InputError(
            f"phases.{job.phase.name}.train_extra_tokens: the chain below has no added tokens; a vocabulary is extended by a `new` phase"
        )
    return tokenizer


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


def _choose_worked_example(job: PhaseJob, seed: int) -> McqRecord:
    """The solved question that full prompts show: with a rationale where the data has any, never an invented one."""
    questions = [
        record
        for source in job.phase.sources
        if scan(source).kind == "mcq"
        for record in stream_kept(source, job.dropped)
        if isinstance(record, McqRecord)
    ]
    if not questions:
        raise InputError(
            "full_prompt: the phase has no multiple-choice source to take a worked example from; remove the key"
        )
    reasoned = [record for record in questions if record.rationale] or questions
    return random.Random(derive_seed(seed, "worked")).choice(reasoned)


def _prepare(
    job: PhaseJob, tokenizer: Any, seed: int, report: Report, worked: McqRecord | None = None
) -> dict[str, PreparedPart]:
    """Every source of the phase and of what it replays as rows; with `worked`, questions in the full prompt mode."""
    phase = job.phase
    prepared = {}
    replay_share = sum(replay.share for replay in phase.replay)
    weights = sum(source.weight or 0 for source in phase.sources)
    for i, source in enumerate(phase.sources):
        key = f"{i}:{source.source}"
        share = (1 - replay_share) * source.weight / weights if source.weight else None
        if worked is not None and scan(source).kind == "mcq":
            prepared[key] = _prepare_full(job, tokenizer, key, source, share, seed, worked)
        else:
            prepared[key] = _prepare_part(job, tokenizer, key, source, share, seed, report)
    for replay in phase.replay:
        sources = job.replayed[replay.phase]
        parts = [
            _prepare_part(job, tokenizer, f"{replay.phase}.{i}:{source.source}", source, None, seed, report)
            for i, source in enumerate(sources)
        ]
        sizes = [source.weight or part.records for source, part in zip(sources, parts, strict=True)]
        for i, (source, part) in enumerate(zip(sources, parts, strict=True)):
            share = replay.share * sizes[i] / sum(sizes)
            prepared[f"{replay.phase}.{i}:{source.source}"] = replace(part, part=Part(len(part.rows), share))
    if not any(len(part.rows) for part in prepared.values()):
        longest = max(part.rows.lengths.longest for part in prepared.values())
        raise InputError(
            f"phases.{phase.name}.max_tokens: every example is longer than {phase.max_tokens} tokens (the longest has {longest}); raise it"
        )
    return prepared


def _prepare_part(
    job: PhaseJob, tokenizer: Any, key: str, source: TrainSource, share: float | None, seed: int, report: Report
) -> PreparedPart:
    phase, began = job.phase, time.monotonic()

    def tell(done: int, total: int) -> None:
        if time.monotonic() - began > 1:
            report({"event": "preparing", "phase": f"{phase.name} tokens", "done": done, "total": total})

    plan = plan_preparation(source, source.style, tokenizer, Path(job.cache))
    if not plan.done and (why := plan.explain()) != FIRST:
        report({"event": "note", "phase": phase.name, "text": f"tokens of {source.source} are made {why}"})
    store = prepare(plan, tokenizer, tell)
    kept = store.find_kept(job.dropped.get(source.source, ()))
    if not kept:
        raise InputError(
            f"{source.source}: every record was dropped by data.overlap or data.dedupe; name another source"
        )
    random.Random(derive_seed(seed, key)).shuffle(kept)
    kept = kept[: source.sample]
    order = store.order_examples(kept)
    rows = Rows(store, store.lengths, store.prompts, store.texts, order, phase.max_tokens, phase.packing)
    return PreparedPart(rows, Part(len(rows), share), len(kept))


def _prepare_full(
    job: PhaseJob, tokenizer: Any, key: str, source: TrainSource, share: float | None, seed: int, worked: McqRecord
) -> PreparedPart:
    """A few questions in the full prompt mode: they depend on the seed, so they are tokenised where they are used."""
    assert job.phase.full_prompt is not None
    records = list(stream_kept(source, job.dropped))
    random.Random(derive_seed(seed, key)).shuffle(records)
    chosen = [record for record in records if record.id != worked.id][: job.phase.full_prompt.records]
    examples = [example for record in chosen for example in render(record, "reasoning_full", worked)]
    rows = arrange(tokenise(tokenizer, examples), job.phase.max_tokens, job.phase.packing)
    return PreparedPart(rows, Part(len(rows), share), len(chosen))


def _report_lengths(counts: dict[str, dict[str, dict[str, int]]], phase: str, max_tokens: int, report: Report) -> None:
    for segment, parts in counts.items():
        for key, lengths in parts.items():
            log.info("%s %s: %s", segment, key, "  ".join(f"{name} {value}" for name, value in lengths.items()))
            left = f", {lengths['dropped']} longer than {max_tokens} and left out" if lengths["dropped"] else ""
            left += f", {lengths['split']} documents go on in a further row" if lengths["split"] else ""
            text = (
                f"{key.partition(':')[2]}: {lengths['examples']:,} examples in {lengths['rows']:,} rows; tokens of an example: "
                f"median {lengths['p50']}, 90 % {lengths['p90']}, 99 % {lengths['p99']}, longest {lengths['longest']}{left}"
            )
            report({"event": "note", "phase": phase, "text": text})


def _count_steps(job: PhaseJob, segment: str, rows: int, batch: int) -> tuple[int, int]:
    """Optimiser steps of a segment and of one epoch of its rows."""
    epoch_steps = max(1, -(-rows // batch))
    if segment == "full" and job.phase.full_prompt:
        return job.phase.full_prompt.max_steps, epoch_steps
    return job.phase.max_steps or max(1, round(job.phase.epochs * rows / batch + 0.499)), epoch_steps


def _make_validator(
    job: PhaseJob, tokenizer: Any, collator: Collator, required: Sequence[str], seed: int
) -> Validator | None:
    config = job.phase.validation
    if config is None:
        return None
    dev = [list(stream(source)) for source in config.sources]
    return Validator(tokenizer, collator, config, dev, seed, required, job.phase.max_tokens)


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
