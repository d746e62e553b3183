"""What a training worker does in place of a phase, in tests of how the driver takes its end: each appends to `tries`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast


class Awkward(Exception):
    """Cannot be unpickled, since it is made from two values and keeps one."""

    def __init__(self, text: str, more: object) -> None:
        super().__init__(text)
        self.more = more


def _run(config: dict[str, Any], work: Any) -> None:
    from medlora.on_ray.train_phase import _train_loop

    def run_phase(job: Any, folder: Any, report: Any, *_: Any, **__: Any) -> None:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        tries = Path(config["folder"]).parent / f"tries-{rank}"
        tries.parent.mkdir(parents=True, exist_ok=True)
        with tries.open("a") as file:
            file.write(f"{os.getpid()}\n")
        work(rank, len(tries.read_text().splitlines()))

    # In place of what would import torch, transformers and PEFT: 5 s of a CPU in each of many workers.
    sys.modules["medlora.training.phase"] = cast(Any, SimpleNamespace(run_phase=run_phase))
    sys.modules["medlora.training.callbacks"] = cast(Any, SimpleNamespace(Leaving=type("Leaving", (Exception,), {})))
    _train_loop(config)


def raise_awkward(config: dict[str, Any]) -> None:
    """A bug whose exception cannot come back as it is."""

    def work(rank: int, attempt: int) -> None:
        raise Awkward("an awkward bug", threading.Lock())

    _run(config, work)


def raise_on_one_of_two(config: dict[str, Any]) -> None:
    """Rank 1 has a bug while rank 0 waits for it."""

    def work(rank: int, attempt: int) -> None:
        import torch.distributed as dist

        dist.barrier()  # both have begun
        if rank == 1:
            raise ValueError("a bug of rank 1")
        dist.barrier()

    _run(config, work)


def die_always(config: dict[str, Any]) -> None:
    """The memory runs out, each time."""

    def work(rank: int, attempt: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _run(config, work)


def _lock_up() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def stall_twice(config: dict[str, Any]) -> None:
    """Stops itself at once at the first attempt, waits for itself at the second, raises at the third."""

    def work(rank: int, attempt: int) -> None:
        from medlora import pulse

        pulse.begin(f"is in step {attempt} of 3")
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if attempt == 2:
            _lock_up()
        raise ValueError("came this far")

    _run(config, work)
