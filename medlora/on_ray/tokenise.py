"""Large sources tokenised by every CPU of the cluster, with Ray Data, before a phase begins."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TypedDict

from medlora import events
from medlora.config.sources import TrainSource
from medlora.curriculum.jobs import PhaseJob
from medlora.data.sources import cut_pieces, scan
from medlora.events import OnEvent
from medlora.on_ray.cluster import Cluster, quiet_ray_data
from medlora.startup import enter_folder
from medlora.tokens.cache import Preparation, finish, new_folder
from medlora.tokens.tokenizer import Tokenizer

LEAST_RECORDS = 5_000
"""A smaller source is tokenised by the phase's own worker sooner than Ray has started."""


_PIECES_PER_CPU = 4


class _Common(TypedDict):
    """What all pieces of a source share."""

    job: str
    source: str
    cwd: str


class _Piece(_Common):
    """A Ray Data row: which rows of a file become which part."""

    file: str
    start: int
    stop: int
    part: str


def prepare_on_ray(job: PhaseJob, cluster: Cluster, on_event: OnEvent) -> None:
    """Make the tokens of the phase's large sources where they are not there yet.

    They go to `job.cache`; a worker that does not see it makes its own.
    """
    sources = [*job.phase.sources, *(source for replayed in job.replayed.values() for source in replayed)]
    large = [source for source in sources if scan(source).records >= LEAST_RECORDS]
    if not large:
        return
    from medlora.tokens.cache import plan_preparation

    tokenizer = _load_tokenizer(job)
    for source in large:
        plan = plan_preparation(source, source.style, tokenizer, Path(job.cache))
        if not plan.done:
            _prepare(job, plan, source, cluster, on_event)


def _load_tokenizer(job: PhaseJob) -> Tokenizer:
    from medlora.model.base import locate_base
    from medlora.training.phase import load_phase_tokenizer

    tokenizer: Tokenizer = load_phase_tokenizer(job, locate_base(job.base, job.cache, job.seed))
    return tokenizer


def _prepare(job: PhaseJob, plan: Preparation, source: TrainSource, cluster: Cluster, on_event: OnEvent) -> None:
    import ray.data

    found, started = scan(source), time.monotonic()
    phase, label = job.phase.name, f"{job.phase.name} tokens"
    text = f"tokens of {source.source} are made {plan.explain()}"
    on_event(events.note(phase, text))
    quiet_ray_data()
    with new_folder(plan) as folder:
        common: _Common = {"job": job.model_dump_json(), "source": source.model_dump_json(), "cwd": os.getcwd()}
        pieces: list[_Piece] = [
            {**common, "file": file, "start": start, "stop": stop, "part": str(folder / f"part-{n:05}.arrow")}
            for n, (file, start, stop) in enumerate(cut_pieces(found, max(1, int(cluster.cpus)) * _PIECES_PER_CPU))
        ]
        rows = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map(_write_piece)
        done = 0
        for row in rows.iter_rows():
            done += row["records"]
            on_event(events.preparing(label, done, found.records))
        if absent := [piece["part"] for piece in pieces if not Path(piece["part"]).is_file()]:
            text = (
                f"{len(absent)} of {len(pieces)} parts were written on nodes whose {job.cache} is not this one's: the phase's "
                "worker makes the tokens itself; set storage.cache to a mount that every node sees"
            )
            on_event(events.note(phase, text))
            return
        finish(plan, folder)
    seconds = time.monotonic() - started
    rate = f"{found.records:,} records in {seconds:.1f} s, {found.records / seconds:,.0f} records/s"
    on_event(events.note(phase, f"tokens of {source.source}: {rate}"))


_TOKENIZERS: dict[str, Tokenizer] = {}


def _write_piece(row: _Piece) -> dict[str, int]:
    """What one Ray task does: its rows of one file, as tokens, into a part of its own."""
    from medlora.data.sources import remember, stream_piece
    from medlora.tokens.cache import write_part

    enter_folder(row["cwd"])
    if row["job"] not in _TOKENIZERS:
        job = PhaseJob.model_validate_json(row["job"])
        for packed in job.scans:
            remember(packed)
        _TOKENIZERS[row["job"]] = _load_tokenizer(job)
    source = TrainSource.model_validate_json(row["source"])
    records = stream_piece(source, scan(source), row["file"], row["start"], row["stop"])
    return {"records": write_part(Path(row["part"]), records, source.style, _TOKENIZERS[row["job"]])}
