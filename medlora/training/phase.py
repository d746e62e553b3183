"""One phase from records to an adapter, without Ray."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from transformers import PreTrainedModel

from medlora import events, pulse
from medlora.artifacts.adapter_origin import write_card
from medlora.artifacts.bases import identify_weights
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import extend_chain
from medlora.curriculum.jobs import PhaseJob
from medlora.curriculum.tracking import Tracking, check_trackers
from medlora.data.sources import remember, scan, stream
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.kernels.memory import clear_memory, describe_device, keep_freed_memory
from medlora.model.base import load_base, locate_base
from medlora.model.chain import Model, add_adapter, load_adapter_weights, load_chain, save_adapter
from medlora.model.tokenizer import added_token_ids, letter_token_ids, load_stage_tokenizer, load_tokenizer
from medlora.records import FIELDS, McqRecord
from medlora.runs import mirror
from medlora.runs.disk_errors import explaining
from medlora.runs.environment import get_versions, log_to
from medlora.runs.files import read_json_lines, remove, sweep_temporary, write_with_checksum
from medlora.runs.folders import PhaseFolder
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import PhaseManifest, commit, hash_adapter
from medlora.seeds import derive_seed
from medlora.tokens.cache import hash_tokenizer
from medlora.tokens.phase_rows import PreparedPart, choose_worked_example, prepare_rows, report_lengths
from medlora.tokens.tokenizer import Tokenizer
from medlora.training.batches import Batching, Collator, FlatCollator, choose_batching, find_flat_obstacle
from medlora.training.callbacks import Leaving
from medlora.training.memory_fit import train_in_memory
from medlora.training.reuse import ReusedParts, describe_base, describe_rows, describe_tokenizer
from medlora.training.segment import FittedFigures, SegmentFigures, SegmentRows, Worker, count_rows, draw, make_segment
from medlora.training.validation import Validator

if TYPE_CHECKING:
    from medlora.model.miniature_base.pretraining import Progress

log = logging.getLogger("medlora.phase")


def run_phase(
    job: PhaseJob,
    folder: PhaseFolder,
    on_event: OnEvent,
    device: str = "cpu",
    is_leaving: Callable[[], bool] | None = None,
    reuse: ReusedParts | None = None,
) -> PhaseManifest:
    """Train a phase into its folder and return its manifest; resume from the last complete checkpoint if there is one.

    Runs the same in a Ray Train worker, one of several, as in a plain process. `reuse` holds the parts that consecutive
    phases of one process share; the adapter has the same bytes without it. Raises InputError for what only the user can
    fix, and callbacks.Leaving, after a checkpoint, when `is_leaving` reports that the node is about to be taken away.
    """
    check_trackers(job.report_to)
    tracking = Tracking(job.report_to, job.run, folder.root.parent.parent / "tracking")
    worker = replace(Worker.here(device, on_event, is_leaving), tracking=tracking)
    sinks = (
        (logging.getLogger("medlora"), folder.log),
        (logging.getLogger("medlora.validation"), folder.validation_log),
    )
    pulse.begin("fetches what the phase builds on", slow=True)
    transformers.logging.set_verbosity_error()
    with ExitStack() as stack:
        if worker.is_first:
            # A worker of a driver that was killed may live on for some seconds. The lock of a lost node lives on for as long
            # as an NFS server's lease, 90 s as a rule. We wait for both rather than write beside them.
            stack.enter_context(hold_file_lock(folder.lock, f"phase {job.phase.name} of {job.run}", wait_s=180))
        stack.enter_context(explaining(folder.root))
        # Before the logs are opened: what is pulled replaces them.
        _pull(job, folder, worker)
        folder.root.mkdir(parents=True, exist_ok=True)
        if worker.is_first:
            sweep_temporary(folder.root)
        stack.enter_context(log_to(*sinks) if worker.is_first else nullcontext())
        stack.enter_context(_log_failure(job.phase.name))
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        try:
            return _PhaseRun(job, folder, worker, reuse).run()
        except FloatingPointError as error:
            raise InputError(
                f"phase {job.phase.name}: {error}, so no adapter was written; lower phases.{job.phase.name}.learning_rate"
            ) from error
        finally:
            clear_memory()


@contextmanager
def _log_failure(phase: str) -> Iterator[None]:
    """Log why a phase ended; with the traceback, unless the message is meant for the user."""
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


def _pull(job: PhaseJob, folder: PhaseFolder, worker: Worker) -> None:
    """Fetch the phase so far and its parents if the run is in a store; the first worker first, as workers may share a machine."""
    for turn in (True, False):
        if worker.is_first == turn:
            for part in (folder.root, *(Path(link.folder) for link in job.parent)):
                mirror.pull(part)
        worker.wait_for_others()


@dataclass(frozen=True)
class _Data:
    """What a phase trains on, and the tokenizer that made it."""

    tokenizer: Tokenizer
    tokenizer_hash: str
    worked: McqRecord | None
    """The solved question that full prompts show."""
    segments: list[SegmentRows]

    @property
    def is_packed(self) -> bool:
        """Whether any row holds several documents."""
        return any(part.rows.is_packed for segment in self.segments for part in segment.parts.values())


def _as_whole(model: Model) -> PreTrainedModel:
    """The model for what knows nothing of adapters: a PeftModel hands on to the model below it what it lacks."""
    return cast(PreTrainedModel, model)


class _PhaseRun:
    """One phase on one worker; `run` lists its steps."""

    def __init__(self, job: PhaseJob, folder: PhaseFolder, worker: Worker, reuse: ReusedParts | None) -> None:
        self.job, self.folder, self.worker, self.phase = job, folder, worker, job.phase
        self.seed = derive_seed(job.seed, "phase", job.phase.name)
        self.reuse = reuse
        self.parts = reuse or ReusedParts()

    def run(self) -> PhaseManifest:
        """Train the phase and return its manifest; empty on every worker but the first."""
        started = time.monotonic()
        hosts = self.announce()
        base = locate_base(self.job.base, self.job.cache, self.job.seed, self.report_building)
        located = time.monotonic()
        data = self.tokenise(base)
        model = self.load_model(base, data)
        pad_id = data.tokenizer.pad_token_id
        assert pad_id is not None  # `load_tokenizer` gives it one
        padded = Collator(pad_id, token_type_ids=model.config.model_type == "gemma3")
        batching = self.choose_batching(model, data, padded)
        data = self.unpack(data, batching)
        model = self.attach_chain(model, base, data.tokenizer)
        prepared = time.monotonic()
        results = self.train_segments(model, data, batching, self.make_validator(data.tokenizer, padded))
        best = self.load_best(model)
        if not self.worker.is_first:
            return cast(PhaseManifest, {})
        self.save_adapter(model, base, data.tokenizer)
        seconds = {"base": located - started, "prepare": prepared - located, "all": time.monotonic() - started}
        about = {"counts": count_rows(data.segments), "segments": results, "best": best, "hosts": hosts}
        return self.finish(about, seconds)

    def note(self, text: str) -> None:
        """Report a line about the phase."""
        self.worker.on_event(events.note(self.phase.name, text))

    def report_building(self, progress: Progress) -> None:
        """Report progress of building the miniature base."""
        self.worker.on_event(events.building(self.phase.name, progress))

    def announce(self) -> list[str]:
        """Report and log that the phase starts; returns the hosts of its workers."""
        phase, device = self.phase, describe_device(self.worker.device)
        self.worker.on_event(events.phase_started(phase.name, str(device)))
        pulse.begin("prepares its data", slow=True)
        log.info("phase %s (%s) on %s of %s", phase.name, phase.chain, device, socket.gethostname())
        hosts = self.worker.gather_hosts()
        if self.worker.is_first:
            write_with_checksum(self.folder.fingerprint, self.job.fingerprint)
        return hosts

    def tokenise(self, base: BaseModelConfig) -> _Data:
        """Load the tokenizer and make the rows of every segment."""
        job, phase = self.job, self.phase
        for packed in job.scans:
            remember(packed)
        tokenizer = self.parts.get("tokenizer", describe_tokenizer(job), lambda: load_phase_tokenizer(job, base))
        letter_token_ids(tokenizer, max((scan(source).letters for source in phase.sources), key=len))
        worked = choose_worked_example(job, self.seed) if phase.full_prompt else None
        digest = hash_tokenizer(tokenizer)
        rows = self.parts.get("rows", describe_rows(job, digest), lambda: self.prepare(job, tokenizer))
        segments = [SegmentRows("normal", "reasoning", rows)]
        if phase.full_prompt:
            segments.insert(0, SegmentRows("full", "reasoning_full", self.prepare(job, tokenizer, worked)))
        report_lengths(count_rows(segments), phase.name, phase.max_tokens, self.worker.on_event)
        return _Data(tokenizer, digest, worked, segments)

    def prepare(self, job: PhaseJob, tokenizer: Tokenizer, worked: McqRecord | None = None) -> dict[str, PreparedPart]:
        """The rows of the phase's sources; with `worked`, questions show it as a solved example."""
        return prepare_rows(job, tokenizer, self.seed, self.worker.on_event, worked)

    def load_model(self, base: BaseModelConfig, data: _Data) -> PreTrainedModel:
        """The base model, frozen; a reused one if it was made from the same."""
        pulse.begin("loads the base model", slow=True)
        device = self.worker.device
        if self.reuse is None:
            return load_base(base, data.tokenizer, device)
        made_from = describe_base(self.job, data.tokenizer_hash, device)
        return self.reuse.borrow_base(made_from, lambda: load_base(base, data.tokenizer, device))

    def choose_batching(self, model: PreTrainedModel, data: _Data, padded: Collator) -> Batching:
        """Flat or padded batches, as configured and as the model computes them correctly."""
        phase, device = self.phase, self.worker.device
        obstacle = None if device == "cpu" else find_flat_obstacle(model)
        flat = phase.batching == "flat" or (phase.batching == "auto" and not obstacle and not phase.compile)
        if obstacle and phase.batching == "auto":
            self.note(f"batches are padded: {obstacle}")
        wanted = FlatCollator(phase.share_prefix, padded.token_type_ids) if flat else None
        made_from = [*describe_base(self.job, data.tokenizer_hash, device), wanted, data.is_packed]
        batching: Batching = self.parts.get(
            "batching", made_from, lambda: choose_batching(model, padded, wanted, data.is_packed)
        )
        for why in batching.why:
            log.warning(why)
            self.note(why)
        return batching

    def unpack(self, data: _Data, batching: Batching) -> _Data:
        """The same data with one document a row, if the model cannot separate packed documents."""
        if batching.packs:
            return data
        apart = self.job.model_copy(update={"phase": self.phase.model_copy(update={"packing": False})})
        worked = {"full": data.worked}
        segments = [
            SegmentRows(each.name, each.style, self.prepare(apart, data.tokenizer, worked.get(each.name)))
            for each in data.segments
        ]
        return _Data(data.tokenizer, data.tokenizer_hash, data.worked, segments)

    def attach_chain(self, model: PreTrainedModel, base: BaseModelConfig, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model with the adapters of the chain: those of the parent frozen, one trained."""
        job, phase = self.job, self.phase
        parent = [(link.name, Path(link.folder)) for link in job.parent]
        if phase.chain == "continue":
            *frozen, (_, last) = parent
            return _as_whole(load_chain(model, [*frozen, (phase.name, last)], trainable=phase.name))
        if phase.chain == "stack":
            model = _as_whole(load_chain(model, parent))
        rows = added_token_ids(tokenizer, job.base.extra_tokens) if phase.train_extra_tokens else []
        return _as_whole(add_adapter(model, phase.name, job.lora, rows, derive_seed(self.seed, "adapter")))

    def make_validator(self, tokenizer: Tokenizer, padded: Collator) -> Validator | None:
        """What scores the dev records; None where the phase has none."""
        config = self.phase.validation
        if config is None:
            return None
        shown = {name for source in self.phase.sources for name in scan(source).rationale}
        dev = [list(stream(source)) for source in config.sources]
        required = [name for name in FIELDS if name in shown]
        return Validator(tokenizer, padded, config, dev, self.seed, required, self.phase.max_tokens)

    def train_segments(
        self, model: PreTrainedModel, data: _Data, batching: Batching, validator: Validator | None
    ) -> list[FittedFigures]:
        """Train the segments in turn; returns the figures of each."""
        world, results = self.worker.world, list[FittedFigures]()
        batch, phase = self.phase.count_batch(world), self.phase.settle(world)
        pulse.begin("draws its rows and tries a step", slow=True)
        for rows in data.segments:
            drawn = draw(rows, phase, batch, self.seed)
            padding = 0.0 if batching.is_flat else drawn.measure_padding(phase.batch_size)
            self.note("flat batches, no padding" if batching.is_flat else f"{padding:.1%} of the batches is padding")
            segment = make_segment(rows, drawn, phase, batch, self.seed, rows.bind(validator, data.worked))
            result, fitted = train_in_memory(model, segment, phase, batching.collator, self.folder, self.worker)
            figures: FittedFigures = {
                **result,
                "batch_size": fitted.batch_size,
                "accumulation": fitted.accumulation,
                "gradient_checkpointing": fitted.gradient_checkpointing,
                "padding": round(padding, 4),
            }
            if not phase.may_grow:
                phase = fitted  # what did not fit once does not fit again
            results.append(figures)
            if rows.name == "full":
                self.report_switch(result)
        if validator:
            spent, trained = sum(part["validation_s"] for part in results), sum(part["train_s"] for part in results)
            self.note(f"validation took {spent:.1f} s, {spent / max(trained, 1e-9):.0%} of the training")
        return results

    def report_switch(self, full: SegmentFigures) -> None:
        """Report that the segment with full prompts is over, and why."""
        why = "the format score reached its threshold" if full["stopped_early"] else "the step budget is spent"
        self.note(f"switches to the normal prompt after {full['steps']} steps: {why}")
        log.info("switches from full to normal prompts after %d steps: %s", full["steps"], why)

    def load_best(self, model: PreTrainedModel) -> Mapping[str, object] | None:
        """Load the adapter with the best dev score, if the phase asks for it; returns its line of scores."""
        if not (self.phase.validation and self.phase.validation.keep_best):
            return None
        if self.worker.is_first:
            mirror.push(self.folder.root)
        self.worker.wait_for_others()
        if not self.worker.is_first:
            mirror.pull(self.folder.best)
        load_adapter_weights(model, self.phase.name, self.folder.best)
        scored = [row for row in read_json_lines(self.folder.validation) if row.get("best")]
        return scored[-1] if scored else None

    def save_adapter(self, model: PreTrainedModel, base: BaseModelConfig, tokenizer: Tokenizer) -> None:
        """Write the adapter, with the tokenizer if the phase has extended it."""
        pulse.begin("writes the adapter")
        extended = len(tokenizer) != len(load_tokenizer(base))
        save_adapter(model, self.phase.name, self.folder.adapter, tokenizer if extended else None, self.job.base.model)

    def finish(self, results: Mapping[str, object], seconds: dict[str, float]) -> PhaseManifest:
        """Write the manifest, then remove what only the unfinished phase needed."""
        folder = self.folder
        log.info("phase %s is finished", self.phase.name)
        about = self.describe(results, seconds)
        write_card(folder.adapter, about)
        manifest = commit(folder.root, about, exclude=(folder.checkpoints, folder.best, *folder.logs))
        remove(folder.checkpoints, folder.best)
        mirror.push(folder.root)
        return cast(PhaseManifest, manifest)

    def describe(self, results: Mapping[str, object], seconds: dict[str, float]) -> dict[str, object]:
        """What the manifest records besides the hashes of the files."""
        job, sources = self.job, self.phase.sources
        chain = extend_chain(job.parent, self.phase, self.folder.adapter)
        return {
            "phase": self.phase.name,
            "run": job.run,
            "seed": job.seed,
            "base_weights": identify_weights(job.base, job.seed).get("weights"),
            "chain": [link.name for link in chain],
            "adapter_hash": hash_adapter(self.folder.adapter),
            "counts": results["counts"],
            "quarantine": {source.source: dict(scan(source).bad) for source in sources if scan(source).bad},
            "question_sources": [source.source for source in sources if scan(source).kind == "mcq"],
            "rationale": sorted({name for source in sources for name in scan(source).rationale}),
            "segments": results["segments"],
            "best": results["best"],
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "device": describe_device(self.worker.device).name,
            "hosts": results["hosts"],
            "versions": get_versions(),
            "fingerprint": job.fingerprint,
        }


def load_phase_tokenizer(job: PhaseJob, base: BaseModelConfig) -> Tokenizer:
    """The tokenizer that a phase renders and trains with; raises InputError when its chain has no added tokens to train."""
    if job.phase.chain == "new":
        return load_tokenizer(base, extra_tokens=job.base.extra_tokens if job.phase.train_extra_tokens else ())
    tokenizer = load_stage_tokenizer(base, job.parent)
    if job.phase.train_extra_tokens and not added_token_ids(tokenizer, job.base.extra_tokens):
        raise InputError(
            f"phases.{job.phase.name}.train_extra_tokens: the chain below has no added tokens; a vocabulary is extended by a `new` phase"
        )
    return tokenizer
