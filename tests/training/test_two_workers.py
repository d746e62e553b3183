"""Two processes that share a step, with torch's gloo and without Ray, learn what one learns."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from medlora.config.phase import PhaseConfig
from medlora.config.placement import Placement
from medlora.config.run import RunConfig
from medlora.curriculum.jobs import make_job
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from medlora.training.phase import run_phase
from tests.support.tiny_run import configure, run_all


def make(base: str, data: Path, workers: int, batch_size: Any) -> RunConfig:
    config = configure(base, data, lora={"r": 4, "alpha": 8})
    phase = {**config.phases[2].model_dump(mode="json"), "name": "mcq", "chain": "new", "validation": None}
    phase |= {"global_batch": 12, "batch_size": batch_size, "max_steps": 4, "log_every_steps": 1, "learning_rate": 1e-3}
    del phase["accumulation"]
    placement = Placement(workers=workers)
    return config.model_copy(update={"phases": (PhaseConfig.model_validate(phase),), "placement": placement})


def train(rank: int, config: RunConfig, folder: Path, store: Path) -> None:
    """One of two workers; forked, so that nothing is imported again."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    run_phase(make_job(config, config.phases[0], ()), RunFolder(folder).phase("mcq"), lambda event: None)
    dist.barrier()
    os._exit(0)  # without what pytest would do at its end


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for a GPU do not survive a fork")
def test_two_workers_have_the_curve_of_one(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    """The same global batch, however it is shared and cut."""
    run_all(make(bases["gemma"], data, 1, 12), tmp_path / "one", ("mcq",))
    config = make(bases["gemma"], data, 2, "auto")
    forked = multiprocessing.get_context("fork")
    workers = [
        forked.Process(target=train, args=(rank, config, tmp_path / "two", tmp_path / "store")) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    one, two = (
        [row["loss"] for row in read_json_lines(RunFolder(tmp_path / name).phase("mcq").metrics)]
        for name in ("one", "two")
    )
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-6)
