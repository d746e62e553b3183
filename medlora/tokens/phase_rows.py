"""What a phase trains on: the rows of every source, their share of the mixture, and the training order."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from medlora import events, pulse
from medlora.config.sources import TrainSource
from medlora.curriculum.jobs import PhaseJob
from medlora.data.card import stream_kept
from medlora.data.sources import scan
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.prompts import render
from medlora.records import McqRecord
from medlora.seeds import derive_seed
from medlora.tokens.cache import FIRST, plan_preparation, prepare
from medlora.tokens.encode import tokenise
from medlora.tokens.mixture import Part, interleave, share_tokens
from medlora.tokens.rows import Row, Rows, arrange
from medlora.tokens.tokenizer import Tokenizer

log = logging.getLogger("medlora.phase")


@dataclass(frozen=True)
class PreparedPart:
    """One source of a phase as rows, with its place in the mixture."""

    rows: Rows
    part: Part
    records: int
    name_example: Callable[[int], str]
    """The id of the record that the example at this place comes from."""

    @property
    def mean_tokens(self) -> float:
        """Of a row."""
        return self.rows.lengths.tokens / max(1, len(self.rows))


class Drawn(Sequence[Row]):
    """The rows of a segment in training order; each is made when it is read."""

    def __init__(self, prepared: dict[str, PreparedPart], draws: Sequence[tuple[str, int]]) -> None:
        self.prepared, self.draws = prepared, draws

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.prepared[key].rows[i] for key, i in self.draws[index]]
        key, i = self.draws[index]
        return self.prepared[key].rows[i]

    def name_rows(self, places: Sequence[int]) -> list[str]:
        """For each of these rows its source and the ids of the records that it is made from."""
        named = []
        for place in places:
            key, i = self.draws[place]
            prepared = self.prepared[key]
            ids = list(dict.fromkeys(map(prepared.name_example, prepared.rows.find_examples(i))))
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            named.append(f"{key.partition(':')[2]}: {', '.join(ids[:3])}{more}")
        return named

    def find_longest(self, count: int) -> list[Row]:
        """The longest rows, the longest first."""
        sizes = numpy.array([self.prepared[key].rows.sizes[i] for key, i in self.draws])
        return [self[int(i)] for i in numpy.argsort(-sizes, kind="stable")[:count]]

    def measure_padding(self, batch_size: int) -> float:
        """Share of the positions of all batches that hold nothing; a batch is as long as its longest row."""
        sizes = numpy.array([self.prepared[key].rows.sizes[i] for key, i in self.draws])
        batches = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
        return 1 - int(sizes.sum()) / max(1, sum(int(batch.max()) * len(batch) for batch in batches))


def choose_worked_example(job: PhaseJob, seed: int) -> McqRecord:
    """The solved question that full prompts show; with a rationale if the data has one, never an invented one."""
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


def prepare_rows(
    job: PhaseJob, tokenizer: Tokenizer, seed: int, on_event: OnEvent, worked: McqRecord | None = None
) -> dict[str, PreparedPart]:
    """The rows of every source of the phase, and of what it replays; with `worked`, questions as full prompts."""
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
            prepared[key] = _prepare_part(job, tokenizer, key, source, share, seed, on_event)
    for replay in phase.replay:
        sources = job.replayed[replay.phase]
        parts = [
            _prepare_part(job, tokenizer, f"{replay.phase}.{i}:{source.source}", source, None, seed, on_event)
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
    job: PhaseJob,
    tokenizer: Tokenizer,
    key: str,
    source: TrainSource,
    share: float | None,
    seed: int,
    on_event: OnEvent,
) -> PreparedPart:
    phase, began = job.phase, time.monotonic()

    def report_progress(done: int, total: int) -> None:
        pulse.beat()
        if time.monotonic() - began > 1:
            on_event(events.preparing(f"{phase.name} tokens", done, total))

    def note(text: str) -> None:
        if not text.endswith(FIRST):
            on_event(events.note(phase.name, text))

    plan = plan_preparation(source, source.style, tokenizer, Path(job.cache))
    store = prepare(plan, tokenizer, report_progress, note)
    records = store.find_included(job.dropped.get(source.source, ()))
    if not records:
        raise InputError(
            f"{source.source}: every record was dropped by data.overlap or data.dedupe; name another source"
        )
    random.Random(derive_seed(seed, key)).shuffle(records)
    records = records[: source.sample]
    order = store.order_examples(records)
    rows = Rows(store, store.lengths, store.prompts, store.texts, order, phase.max_tokens, phase.packing)
    return PreparedPart(rows, Part(len(rows), share), len(records), store.name_record)


def _prepare_full(
    job: PhaseJob,
    tokenizer: Tokenizer,
    key: str,
    source: TrainSource,
    share: float | None,
    seed: int,
    worked: McqRecord,
) -> PreparedPart:
    """A few questions as full prompts; they depend on the seed, so they are not cached."""
    assert job.phase.full_prompt is not None
    records = list(stream_kept(source, job.dropped))
    random.Random(derive_seed(seed, key)).shuffle(records)
    chosen = [record for record in records if record.id != worked.id][: job.phase.full_prompt.records]
    made = [(record.id, example) for record in chosen for example in render(record, "reasoning_full", worked)]
    names, examples = [name for name, _ in made], [example for _, example in made]
    rows = arrange(tokenise(tokenizer, examples), job.phase.max_tokens, job.phase.packing)
    return PreparedPart(rows, Part(len(rows), share), len(chosen), names.__getitem__)


def report_lengths(
    counts: dict[str, dict[str, dict[str, int]]], phase: str, max_tokens: int, on_event: OnEvent
) -> None:
    """Report for every source how long its examples are, and how many are left out or split."""
    for segment, parts in counts.items():
        for key, lengths in parts.items():
            log.info("%s %s: %s", segment, key, "  ".join(f"{name} {value}" for name, value in lengths.items()))
            left = f", {lengths['dropped']} longer than {max_tokens} and left out" if lengths["dropped"] else ""
            left += f", {lengths['split']} documents continue in a further row" if lengths["split"] else ""
            text = (
                f"{key.partition(':')[2]}: {lengths['examples']:,} examples in {lengths['rows']:,} rows; tokens of an example: "
                f"median {lengths['p50']}, 90 % {lengths['p90']}, 99 % {lengths['p99']}, longest {lengths['longest']}{left}"
            )
            on_event(events.note(phase, text))


def draw_rows(prepared: dict[str, PreparedPart], total: int, by_tokens: bool, seed: int) -> Drawn:
    """`total` rows of the mixture in training order, a function of the arguments alone."""
    sized = {key: part.part for key, part in prepared.items()}
    if by_tokens:
        sized = share_tokens(sized, {key: part.mean_tokens for key, part in prepared.items()})
    return Drawn(prepared, interleave(sized, total, seed))
