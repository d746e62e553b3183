"""Two data-parallel workers of one phase (gloo, on a local Ray); each of them is killed, at one moment after another.

    RAY_ADDRESS=local python benchmarks/faults/two_workers.py                each of the two at 10 moments
    RAY_ADDRESS=local python benchmarks/faults/two_workers.py --moments 5    at 5

A run is killed --kills times as it goes on, and resumes each time from its newest checkpoint. Its adapter and its lines of
metrics must then equal those of two workers that nothing disturbed. Only processes that this script started are killed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench import ROOT, Row, hash_weights, is_whole, make_config

from medlora.curriculum.jobs import make_job
from medlora.drivers.curriculum import begin
from medlora.runs.environment import log_to
from medlora.runs.files import read_json, read_json_lines
from medlora.runs.folders import RunFolder, open_run
from medlora.runs.locks import hold_file_lock

STEPS, EVERY = 60, 4


def configure(place: Path) -> Any:
    """One phase of two workers, a checkpoint every few steps and a line of metrics every step."""
    config = make_config(place)
    changes = {"max_steps": STEPS, "checkpoint_every_steps": EVERY, "log_every_steps": 1, "validation": None}
    phase = config.phases[0].model_copy(update=changes)
    placement = config.placement.model_copy(update={"workers": 2, "retries": 20})
    return config.model_copy(update={"phases": (phase,), "placement": placement})


def find_workers(run: RunFolder) -> list[int]:
    """The process ids of the two workers by their ranks; fewer where they are not there yet."""
    ours = [each.pid for each in psutil.Process().children(recursive=True) if _is_worker(each)]
    held = read_json(run.root / "phases" / ".00.lock.json")  # which rank 0 holds
    first = held.get("pid") if isinstance(held, dict) else None
    return [first, *(pid for pid in ours if pid != first)] if first in ours else []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass
class Killer:
    """Kills the worker of one rank as the run comes to each of some steps; 0 = as its training begins."""

    run: RunFolder
    rank: int
    steps: list[int]
    chance: random.Random
    done: list[str] = field(default_factory=list)

    def on_event(self, event: Any) -> None:
        """What the driver hears of its workers."""
        at = 0 if event["event"] == "training" else event["step"] if event["event"] == "step" else -1
        if not self.steps or at < self.steps[0]:
            return
        time.sleep(self.chance.uniform(0, 0.1))  # in a step, or in the checkpoint behind it
        workers = find_workers(self.run)
        if len(workers) == 2:
            os.kill(workers[self.rank], signal.SIGKILL)
            self.done.append(f"rank {self.rank} at step {at}")
            self.steps.pop(0)


def train(config: Any, folder: Path, cluster: Any, killer: Killer | None = None) -> None:
    """What the curriculum job does with one phase on a cluster."""
    from medlora.on_ray.train_phase import train_on_ray

    run = open_run(folder)
    on_event = killer.on_event if killer else lambda event: None
    with hold_file_lock(run.lock, f"run {run.root}"), log_to((logging.getLogger("medlora.run"), run.log)):
        begun = begin(config, run, None, on_event)
        for phase in begun.left:
            train_on_ray(make_job(config, phase, begun.chain), run, config.placement, cluster, on_event)


def list_curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step."""
    rows = read_json_lines(RunFolder(folder).phase("00").metrics)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def main() -> None:
    """Print a table row for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5, help="so many of them in one run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # workers import this tree
    from medlora.on_ray.cluster import connect

    chance = random.Random(arguments.seed)
    last = STEPS - 2 * EVERY
    steps = [n * last // max(arguments.moments - 1, 1) for n in range(arguments.moments)]
    with tempfile.TemporaryDirectory() as name, connect() as cluster:
        scratch = Path(name)
        config = configure(scratch)
        began = time.monotonic()
        train(config, scratch / "whole", cluster)
        print(f"undisturbed: {len(list_curve(scratch / 'whole'))} steps, {time.monotonic() - began:.0f} s", flush=True)
        runs = -(-arguments.moments // arguments.kills)
        for rank in (0, 1):
            row = Row(f"worker {rank} of two killed")
            for n in range(runs):
                folder = scratch / f"{rank}-{n}"
                killer = Killer(RunFolder(folder), rank, steps[n::runs], chance)
                train(config, folder, cluster, killer)
                same = hash_weights(folder) == hash_weights(scratch / "whole") and is_whole(folder)
                same = same and list_curve(folder) == list_curve(scratch / "whole")
                for moment in killer.done:
                    row.add(same, f"{moment}: {same}")
                print(
                    f"{', '.join(killer.done)}: {'equal' if same else 'DIFFERS'}, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                if killer.steps:
                    row.add(False, f"not killed at steps {killer.steps}")
            row.show()


if __name__ == "__main__":
    main()
