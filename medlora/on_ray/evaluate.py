"""Questions sharded by Ray Data over actors that each hold one base and the adapters of every stage."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medlora.config import BaseModelConfig, EvaluationConfig, Placement
from medlora.lineage import Link
from medlora.on_ray.cluster import Cluster, OnEvent, count_gpus, listen
from medlora.records import McqRecord, Prediction

log = logging.getLogger("medlora.run")

Stages = Mapping[str, Sequence[Link]]
"""Stage name -> its chain of adapters; the plain base has none."""


def evaluate_on_ray(
    base: BaseModelConfig,
    cache: str,
    seed: int,
    stages: Stages,
    tests: Mapping[str, Sequence[McqRecord]],
    config: EvaluationConfig,
    placement: Placement,
    cluster: Cluster,
    on_event: OnEvent,
    log_file: Path,
) -> list[Prediction]:
    """What every stage answers to every question, sorted by stage, test and the test's order, in one pass over the data.

    Raises RuntimeError when an answer is missing or there twice.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"test": test, **asdict(record)} for test, records in tests.items() for record in records]
    for row in rows:
        row["rationale"] = ""  # the answer's reasons are nobody's business here, and Arrow wants one type
    gpus = count_gpus(placement, cluster)
    with listen(on_event) as inbox, _stderr_to(log_file), warnings.catch_warnings():
        # Ray 2.60 deprecates free remote arguments and has no other way to bound restarts, which default to for ever.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        answered = (
            ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // config.batch_size)))
            .map_batches(
                StageAnswerer,
                fn_constructor_kwargs={
                    "base": base.model_dump(mode="json"),
                    "cache": cache,
                    "seed": seed,
                    "stages": {name: [link.model_dump() for link in chain] for name, chain in stages.items()},
                    "config": config.model_dump(mode="json"),
                    "threads": placement.cpus_per_worker,
                    "device": "cuda" if gpus else "cpu",
                    "cwd": os.getcwd(),
                    "inbox": inbox,
                    "total": len(rows),
                },
                batch_size=config.batch_size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=placement.workers),
                num_cpus=placement.cpus_per_worker,
                num_gpus=gpus or None,
                max_restarts=placement.retries,
                max_task_retries=placement.retries,
            )
            .take_all()
        )
    predictions = [Prediction(**{**row, "probabilities": tuple(row["probabilities"])}) for row in answered]
    return sort_predictions(predictions, stages, tests)


@contextmanager
def _stderr_to(log_file: Path) -> Iterator[None]:
    """Send what Ray's C++ core writes to this process's stderr into a file: advice about actors no user can act on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def sort_predictions(
    predictions: Sequence[Prediction], stages: Stages, tests: Mapping[str, Sequence[McqRecord]]
) -> list[Prediction]:
    """Predictions in the order of stages, tests and questions; raises RuntimeError unless each is there exactly once."""
    by_key = {(p.stage, p.test, p.id): p for p in predictions}
    wanted = [(stage, test, record.id) for stage in stages for test, records in tests.items() for record in records]
    if len(by_key) != len(predictions) or set(by_key) != set(wanted):
        raise RuntimeError(f"{len(predictions)} answers, {len(by_key)} of them different, to {len(wanted)} questions")
    return [by_key[key] for key in wanted]


class StageAnswerer:
    """The actor: loads base and adapters once, answers each batch of questions with every stage."""

    def __init__(
        self,
        base: dict[str, Any],
        cache: str,
        seed: int,
        stages: dict[str, list[dict[str, str]]],
        config: dict[str, Any],
        threads: int,
        device: str,
        cwd: str,
        inbox: Any,
        total: int,
    ) -> None:
        if Path(cwd).is_dir():
            os.chdir(cwd)
        import torch

        from medlora.stages import StageModel, locate_base

        torch.set_num_threads(threads)
        self.inbox, self.total = inbox, total
        chains = {name: [Link(**link) for link in chain] for name, chain in stages.items()}
        located = locate_base(BaseModelConfig.model_validate(base), cache, seed)
        self.stages = StageModel(located, chains, EvaluationConfig.model_validate(config), device, seed)

    def __call__(self, batch: Any) -> Any:
        """A pyarrow table of questions -> a table of predictions, one row a question and stage."""
        import pyarrow

        rows = batch.to_pylist()
        names = [row.pop("test") for row in rows]
        records = [McqRecord(**{**row, "options": tuple(row["options"]), "rationale": {}}) for row in rows]
        predictions = self.stages.answer(names, records)
        self.inbox.put({"event": "evaluation", "questions": len(records), "total": self.total})
        return pyarrow.Table.from_pylist([asdict(prediction) for prediction in predictions])
