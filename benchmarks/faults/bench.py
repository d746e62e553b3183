"""What the fault scripts share: a tiny run, a driver without Ray, forks that fail, and the judge of what they leave."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from medlora.errors import InputError  # noqa: E402
from medlora.runs.environment import log_to  # noqa: E402
from medlora.runs.files import is_temporary  # noqa: E402
from medlora.runs.folders import RunFolder, find_finished, open_run  # noqa: E402
from medlora.runs.locks import hold_file_lock  # noqa: E402


@dataclass
class Row:
    """One row of a table: how many trials ended as promised; the others are listed."""

    name: str
    tried: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, right: bool, what: str) -> None:
        """Count one trial."""
        self.tried += 1
        self.right += right
        if not right:
            self.wrong.append(what)
            print(f"  WRONG {self.name}: {what}", flush=True)

    def show(self) -> None:
        """Print the row as Markdown."""
        print(f"| {self.name} | {self.right} of {self.tried} |", flush=True)


def run_in_fork(
    act: Callable[[], Any], log: Path, timeout_s: float = 120, on_start: Callable[[int], None] = lambda pid: None
) -> tuple[int, str]:
    """The exit code of a fork that does `act` (2 for InputError, as in a job; 1 for a traceback), and what it printed.

    `on_start` is given the fork's process id.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            try:
                act()
                code = 0
            except InputError as error:
                print(f"medlora: {error}")
                code = 2
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    on_start(pid)
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -9, "hangs"
        time.sleep(0.01)


def drive(config: Any, folder: Path, on_event: Callable[[dict[str, Any]], None] = lambda event: None) -> None:
    """What the curriculum job does, with the phases in this process instead of on Ray."""
    from medlora.curriculum.chains import extend_chain
    from medlora.curriculum.jobs import make_job
    from medlora.drivers.curriculum import begin
    from medlora.runs.mirror import hold_run
    from medlora.training.phase import run_phase

    run = open_run(folder)
    with (
        hold_file_lock(run.lock, f"run {run.root}"),
        hold_run(run.root),
        log_to((logging.getLogger("medlora.run"), run.log)),
    ):
        begun = begin(config, run, None, on_event)
        chain = begun.chain
        for phase in begun.left:
            run_phase(make_job(config, phase, chain), run.phase(phase.name), on_event)
            chain = extend_chain(chain, phase, run.phase(phase.name).adapter)


def warm_up(config: Any, folder: Path) -> None:
    """A run without faults, in this process: its forks then find everything imported, and nothing to collect."""
    drive(config, folder)
    gc.collect()
    gc.freeze()  # else the first collection in each fork copies this process's memory, half of a trial's time


def make_config(place: Path, steps: int = 8) -> Any:
    """A curriculum of one phase with dev scores and 2 checkpoints, on a tiny random Gemma made in `place`."""
    import torch

    from tests.support.tiny import build_bases
    from tests.support.tiny_run import configure, write_data

    torch.set_num_threads(1)
    place.mkdir(parents=True, exist_ok=True)
    (place / "data").mkdir(exist_ok=True)
    data = write_data(place / "data")
    dev = {"sources": [{"source": str(data / "dev.jsonl")}], "sample": 4, "max_tokens": 8, "scoring": "letter"}
    validation = {**dev, "every_steps": steps // 2, "keep_best": True}
    first = {"max_steps": steps, "checkpoint_every_steps": steps // 2, "validation": validation}
    config = configure(build_bases(place / "bases")["gemma"], data, p00=first)
    return config.model_copy(update={"phases": config.phases[:1]})


def hash_weights(folder: Path) -> str | None:
    """sha256 of the first phase's adapter weights; None when they are not there."""
    path = RunFolder(folder).phase("00").adapter / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def is_whole(folder: Path) -> bool:
    """Whether the first phase is finished, all its hashes right, and no temp file left in the run."""
    try:
        manifest, _ = find_finished(RunFolder(folder).phase("00"))
    except InputError:
        return False
    left = [path for path in folder.rglob("*") if is_temporary(path.name)]
    return manifest is not None and not left


def is_one_message(status: int, text: str) -> bool:
    """Whether a command ended well, or by one message that names a path and is no traceback."""
    plain = "Traceback" not in text and "Logging error" not in text
    return plain and (status == 0 or (status == 2 and text.count("medlora: ") == 1 and "medlora: /" in text))


def start_over(folder: Path) -> None:
    """Remove what an earlier trial left."""
    shutil.rmtree(folder, ignore_errors=True)
