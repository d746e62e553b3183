"""Ends a tiny run by Ctrl-C and SIGTERM at random moments, as often as asked, and resumes it: does it end as it should?

python benchmarks/faults/signals.py --signal SIGTERM --rounds 20 --out signals.md

Each round starts the job with a Ray of its own, on the run that the round before left, and sends the signal at a random
moment between the process's first breath and the run's end. After every fifth signal, and at the end, the run is finished
and its adapter's bytes are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

STEPS, CHAIN, MOST_S = 400, 5, {"SIGINT": 5.0, "SIGTERM": 25.0}
FIRST_S = 0.3
"""Before it Python itself starts, and no code of the job can handle a signal."""


@dataclass(frozen=True)
class Round:
    """What became of one signal."""

    at_s: float
    code: int
    took_s: float
    lines: list[str]
    left: list[str]

    def is_right(self, name: str) -> bool:
        """Whether it ended in time, with its code, one line and no process left."""
        one = len(self.lines) == 1 and self.lines[0].startswith("medlora: ended by ")
        return self.code == 128 + getattr(signal, name) and self.took_s < MOST_S[name] and one and not self.left


def prepare(folder: Path) -> Path:
    """A tiny base, its data and the config of one phase; the run that nobody disturbs is made beside them."""
    import torch

    from tests.support.tiny import build_bases
    from tests.support.tiny_run import configure, run_all, write_data

    torch.set_num_threads(1)
    for name in ("bases", "data"):
        (folder / name).mkdir()
    base = build_bases(folder / "bases")["gemma"]
    phase = {"max_steps": STEPS, "checkpoint_every_steps": 100, "log_every_steps": 1}
    config = configure(base, write_data(folder / "data"), p00=phase)
    config = config.model_copy(update={"phases": config.phases[:1]})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    run_all(config, folder / "undisturbed", ("00",))
    return path


def start(config: Path, run: Path) -> subprocess.Popen[str]:
    """The job, as a user starts it, in a process group of its own."""
    command = [sys.executable, "jobs/curriculum.py", "--config", str(config), "--run-dir", str(run)]
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def disturb(config: Path, run: Path, name: str, at_s: float, group: bool) -> Round:
    """One round: start, wait, signal the process or, as `timeout` and Slurm do, its whole group, and see how it ends."""
    job = start(config, run)
    try:
        job.wait(at_s)
    except subprocess.TimeoutExpired:
        family = psutil.Process(job.pid).children(recursive=True)
        began = time.monotonic()
        signum = getattr(signal, name)
        os.killpg(job.pid, signum) if group else job.send_signal(signum)
        _, err = job.communicate(timeout=120)
        took_s = time.monotonic() - began
        # All that the job started must be gone in the time that it has to end, and a second for the kernel.
        _, alive = psutil.wait_procs(family, timeout=max(0.0, MOST_S[name] - took_s) + 1)
        left = [process.name() for process in alive if process.status() != "zombie"]
        return Round(at_s, job.returncode, took_s, err.splitlines(), left)
    return Round(at_s, job.returncode, 0.0, (job.stderr.read() if job.stderr else "").splitlines(), [])


def finish(config: Path, run: Path) -> tuple[bool, float]:
    """Whether the run, resumed to its end, has the bytes of the one that nobody disturbed, and how long that took."""
    from tests.support.tiny_run import weights

    began = time.monotonic()
    _, err = (job := start(config, run)).communicate()
    same = job.returncode == 0 and weights(run, "00") == weights(config.parent / "undisturbed", "00")
    if not same:
        print(f"NOT THE SAME: code {job.returncode}, {err}", flush=True)
    return same, time.monotonic() - began


def main() -> None:
    """Print a line a round and the count at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signal", choices=sorted(MOST_S), default="SIGTERM")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also append the rows to this Markdown file")
    arguments = parser.parse_args()
    folder, chance = Path(tempfile.mkdtemp(prefix="medlora-signals-")), random.Random(arguments.seed)

    def say(text: str) -> None:
        print(text, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    config = prepare(folder)
    same, whole_s = finish(config, folder / "whole")
    say(f"\n{arguments.signal}; the undisturbed job takes {whole_s:.0f} s, same bytes: {same}\n")
    say("| round | sent after | to | code | ended in | left | stderr |\n|---|---|---|---|---|---|---|")
    right = chain = finished = equal = 0
    done, run = 0, folder / "run-0"
    while done < arguments.rounds:
        group = arguments.signal == "SIGTERM" and chance.random() < 0.5
        got = disturb(config, run, arguments.signal, chance.uniform(FIRST_S, whole_s), group)
        over = got.code == 0 and not got.lines  # it was done before the signal: another moment
        if not over:
            done, chain, right = done + 1, chain + 1, right + got.is_right(arguments.signal)
            cells = (done, f"{got.at_s:.1f} s", "group" if group else "process", got.code, f"{got.took_s:.2f} s")
            say(
                "| " + " | ".join(map(str, (*cells, ", ".join(got.left) or "none", " / ".join(got.lines)[:200]))) + " |"
            )
        if over or chain == CHAIN or done == arguments.rounds:
            finished, equal = finished + 1, equal + finish(config, run)[0]
            chain, run = 0, folder / f"run-{finished}"
    say(
        f"\n{right} of {done} ended as they should; {equal} of {finished} runs, resumed to their end, have the same bytes"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
