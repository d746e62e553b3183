"""One phase from records to adapter, without Ray."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from medlora import events, pulse
from medlora.artifacts.adapter_origin import write_card
from medlora.artifacts.bases import identify_weights
from medlora.config.base import McqStyle
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import extend_chain
from medlora.curriculum.jobs import PhaseJob
from medlora.data.sources import remember, scan, stream
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.kernels.memory import clear_memory, describe_device, keep_freed_memory
from medlora.model.base import load_base, locate_base
from medlora.model.chain import add_adapter, load_adapter_weights, load_chain, save_adapter
from medlora.model.tokenizer import added_token_ids, letter_token_ids, load_stage_tokenizer, load_tokenizer
from medlora.records import FIELDS, McqRecord
from medlora.runs import mirror
from medlora.runs.disk_errors import explaining
from medlora.runs.environment import get_versions, log_to
from medlora.runs.files import read_json_lines, remove, sweep_temporary, write_sealed
from medlora.runs.folders import PhaseFolder
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import commit, hash_adapter
from medlora.seeds import derive_seed
from medlora.tokens.cache import hash_tokenizer
from medlora.tokens.phase_rows import choose_worked_example, draw_rows, prepare_rows, report_lengths
from medlora.training.batches import Collator, FlatCollator, choose_batching
from medlora.training.callbacks import Leaving
from medlora.training.memory_fit import train_in_memory
from medlora.training.reuse import Kept
from medlora.training.segment import Segment
from medlora.training.validation import Validator

log = logging.getLogger("medlora.phase")


def run_phase(
    job: PhaseJob,
    folder: PhaseFolder,
    report: OnEvent,
    device: str = "cpu",
    is_leaving: Callable[[], bool] | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Train a phase into its folder and return its manifest; goes on from the last whole checkpoint if there is one.

    Runs the same in a Ray Train worker, one of several, as in a plain process. `kept` is what a process that trains one phase
    after another keeps between them; the result has the same bytes without it. Raises InputError for what only the user
    can mend, callbacks.Leaving, after a checkpoint, where `is_leaving` says that the node is about to be taken away.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    main = world == 1 or dist.get_rank() == 0
    # A worker of a driver that was killed may live on for some seconds, and the lock of a lost node for as long as an NFS
    # server's lease (90 s as a rule): wait for it rather than write beside it.
    holding = hold_file_lock(folder.lock, f"phase {job.phase.name} of {job.run}", wait_s=180) if main else nullcontext()
    sinks = (
        (logging.getLogger("medlora"), folder.log),
        (logging.getLogger("medlora.validation"), folder.validation_log),
    )
    pulse.begin("fetches what the phase stands on", slow=True)
    transformers.logging.set_verbosity_error()
    with ExitStack() as stack:
        stack.enter_context(holding)
        stack.enter_context(explaining(folder.root))
        # Before the logs are opened: what is pulled replaces them.
        _pull(job, folder, world, main)
        folder.root.mkdir(parents=True, exist_ok=True)
        if main:
            sweep_temporary(folder.root)
        stack.enter_context(log_to(*sinks) if main else nullcontext())
        stack.enter_context(_log_failure(job.phase.name))
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        try:
            return _run(job, folder, report if main else lambda event: None, device, world, main, is_leaving, kept)
        except FloatingPointError as error:
            raise InputError(
                f"phase {job.phase.name}: {error}, so no adapter was written; lower phases.{job.phase.name}.learning_rate"
            ) from error
        finally:
            clear_memory()


@contextmanager
def _log_failure(phase: str) -> Iterator[None]:
    """Write into the phase's log why it ended, with the traceback of what is no message for the user."""
    try:
        yield
    except Leaving:
        raise
    except InputError as error:
        log.error("phase %s ends: %s", phase, error)
        raise
    except Exception:
        log.exception("phase %s ends by an exception", phase)
        raise


def _pull(job: PhaseJob, folder: PhaseFolder, world: int, main: bool) -> None:
    """Fetch the phase so far and its parents where the run is in a store, rank 0 first: workers may share a machine."""
    for turn in (True, False):
        if main == turn:
            for part in (folder.root, *(Path(link.folder) for link in job.parent)):
                mirror.pull(part)
        if world > 1:
            dist.barrier()


def _run(
    job: PhaseJob,
    folder: PhaseFolder,
    report: OnEvent,
    device: str,
    world: int,
    main: bool,
    is_leaving: Callable[[], bool] | None,
    kept: Kept | None,
) -> dict[str, Any]:
    phase, started = job.phase, time.monotonic()
    seed = derive_seed(job.seed, "phase", phase.name)
    report(events.phase_started(phase.name, str(describe_device(device))))
    pulse.begin("prepares its data", slow=True)
    log.info("phase %s (%s) on %s of %s", phase.name, phase.chain, describe_device(device), socket.gethostname())
    hosts = _gather_hosts(world)
    if main:
        write_sealed(folder.fingerprint, job.fingerprint)
    base = locate_base(job.base, job.cache, job.seed, lambda event: report(events.building(phase.name, event)))
    base_s = time.monotonic() - started

    for packed in job.scans:
        remember(packed)
    held = kept or Kept()
    tokenizer = held.get("tokenizer", _describe_tokenizer(job), lambda: load_phase_tokenizer(job, base))
    found = [scan(source) for source in phase.sources]
    letter_token_ids(tokenizer, max((each.letters for each in found), key=len))
    worked = choose_worked_example(job, seed) if phase.full_prompt else None
    batch = phase.batch_size * phase.accumulation * world
    words = hash_tokenizer(tokenizer)
    rows = held.get("rows", _describe_rows(job, words), lambda: prepare_rows(job, tokenizer, seed, report))
    segments = [("normal", "reasoning", rows)]
    if phase.full_prompt:
        segments.insert(0, ("full", "reasoning_full", prepare_rows(job, tokenizer, seed, report, worked)))
    counts = {
        name: {key: asdict(part.rows.lengths) for key, part in prepared.items()} for name, _, prepared in segments
    }
    report_lengths(counts, phase.name, phase.max_tokens, report)

    pulse.begin("loads the base model", slow=True)
    made_from = [job.fingerprint["base"], job.fingerprint["base_files"], words, device]
    if kept is None:
        model = load_base(base, tokenizer, device)
    else:
        model = kept.borrow_base(made_from, lambda: load_base(base, tokenizer, device))
    padded = Collator(tokenizer.pad_token_id, token_type_ids=model.config.model_type == "gemma3")
    flat = phase.batching == "flat" or (phase.batching == "auto" and device == "cpu" and not phase.compile)
    wanted = FlatCollator(phase.share_prefix, padded.token_type_ids) if flat else None
    packed = any(part.rows.is_packed for _, _, prepared in segments for part in prepared.values())
    batching = held.get(
        "batching", [*made_from, wanted, packed], lambda: choose_batching(model, padded, wanted, packed)
    )
    for why in batching.why:
        log.warning(why)
        report(events.note(phase.name, why))
    if not batching.packs:
        apart = job.model_copy(update={"phase": phase.model_copy(update={"packing": False})})
        segments = [
            (name, style, prepare_rows(apart, tokenizer, seed, report, worked if name == "full" else None))
            for name, style, _ in segments
        ]
        counts = {name: {key: asdict(part.rows.lengths) for key, part in rows.items()} for name, _, rows in segments}
    collator, flat = batching.collator, batching.is_flat
    model = _attach(job, base, model, tokenizer, seed)
    prepared_s = time.monotonic() - started - base_s
    shown = {name for each in found for name in each.rationale}
    validator = _make_validator(job, tokenizer, padded, [name for name in FIELDS if name in shown], seed)
    done = []
    pulse.begin("draws its rows and tries a step", slow=True)
    for name, style, prepared in segments:
        steps, epoch_steps = _count_steps(job, name, sum(part.part.size for part in prepared.values()), batch)
        drawn = draw_rows(prepared, steps * batch, phase.weights == "tokens", seed)
        padding = 0.0 if flat else drawn.measure_padding(phase.batch_size)
        said = "flat batches, no padding" if flat else f"{padding:.1%} of the batches is padding"
        report(events.note(phase.name, said))
        segment = Segment(
            name=name,
            rows=drawn,
            steps=steps,
            epoch_steps=epoch_steps,
            longest=drawn.find_longest(2),
            validate=_bind(validator, style if name == "full" else None, worked) if validator else None,
            name_rows=drawn.name_rows,
            stop_at_format_score=phase.full_prompt.until_format_score if phase.full_prompt and name == "full" else None,
        )
        result, phase = train_in_memory(
            model, segment, phase, collator, folder, derive_seed(seed, name), report, is_leaving
        )
        cut = {key: getattr(phase, key) for key in ("batch_size", "accumulation", "gradient_checkpointing")}
        cut["padding"] = round(padding, 4)
        done.append({**result, **cut})
        if name == "full":
            why = "the format score reached its threshold" if result["stopped_early"] else "the step budget is spent"
            report(events.note(phase.name, f"switches to the normal prompt after {result['steps']} steps: {why}"))
            log.info("switches from full to normal prompts after %d steps: %s", result["steps"], why)
    if validator:
        spent, trained = (sum(part[key] for part in done) for key in ("validation_s", "train_s"))
        text = f"validation took {spent:.1f} s, {spent / max(trained, 1e-9):.0%} of the training"
        report(events.note(phase.name, text))
    best = None
    if phase.validation and phase.validation.keep_best:
        if main:
            mirror.push(folder.root)
        if world > 1:
            dist.barrier()
        if not main:
            mirror.pull(folder.best)
        load_adapter_weights(model, phase.name, folder.best)
        scored = [row for row in read_json_lines(folder.validation) if row.get("best")]
        best = scored[-1] if scored else None
    if not main:
        return {}
    pulse.begin("writes the adapter")
    extended = len(tokenizer) != len(load_tokenizer(base))
    save_adapter(model, phase.name, folder.adapter, tokenizer if extended else None, job.base.model)
    asked = [source.source for source, each in zip(phase.sources, found, strict=True) if each.kind == "mcq"]
    return _finish(
        job,
        folder,
        device,
        hosts,
        counts,
        asked,
        done,
        best,
        {"base": base_s, "prepare": prepared_s, "all": time.monotonic() - started},
    )


def _gather_hosts(world: int) -> list[str]:
    """The names of the hosts that the phase's workers run on."""
    hosts: list[Any] = [socket.gethostname()]
    if world > 1:
        hosts = [None] * world
        dist.all_gather_object(hosts, socket.gethostname())
    return sorted(set(hosts))


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


def _describe_tokenizer(job: PhaseJob) -> list[Any]:
    """What the tokenizer of a phase depends on."""
    extended = job.phase.chain == "new" and job.phase.train_extra_tokens
    return [
        job.fingerprint["base"],
        job.fingerprint["base_files"],
        job.fingerprint["parent"],
        job.phase.chain,
        extended,
    ]


def _describe_rows(job: PhaseJob, words: str) -> dict[str, Any]:
    """What the rows of a phase depend on; `words` tells its tokenizer from others."""
    phase = job.phase.model_dump(mode="json", include={"name", "sources", "replay", "max_tokens", "packing"})
    rest = job.model_dump(mode="json", include={"replayed", "dropped", "seed", "cache"})
    return phase | rest | {name: job.fingerprint[name] for name in ("data", "prompts")} | {"tokenizer": words}


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
    folder: PhaseFolder,
    device: str,
    hosts: list[str],
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
        "run": job.run,
        "seed": job.seed,
        "base_weights": identify_weights(job.base, job.seed).get("weights"),
        "chain": [link.name for link in chain],
        "adapter_hash": hash_adapter(folder.adapter),
        "counts": counts,
        "quarantine": {source.source: dict(scan(source).bad) for source in job.phase.sources if scan(source).bad},
        "question_sources": question_sources,
        "rationale": sorted({name for source in job.phase.sources for name in scan(source).rationale}),
        "segments": segments,
        "best": best,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "device": str(describe_device(device)).partition(",")[0],
        "hosts": hosts,
        "versions": get_versions(),
        "fingerprint": job.fingerprint,
    }
    write_card(folder.adapter, about)
    manifest = commit(folder.root, about, passing=(folder.checkpoints, folder.best))
    remove(folder.checkpoints, folder.best)
    mirror.push(folder.root)
    return manifest
