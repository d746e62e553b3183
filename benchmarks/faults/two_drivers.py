"""Two drivers at the same moment on a fresh folder: one runs, the other names it.

    python benchmarks/faults/two_drivers.py            20 rounds

Both are forks that wait for one moment, and then some random milliseconds up to --apart-ms, and do what a job does before Ray.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import tempfile
import time
from pathlib import Path

from bench import Row, run_in_fork, start_over

from medlora.runs.environment import log_to
from medlora.runs.files import write_with_checksum, write_yaml
from medlora.runs.folders import open_run
from medlora.runs.locks import hold_file_lock

HOLDS_S = 2.0


def drive_briefly(folder: Path, start: float, holds_s: float) -> None:
    """Open, lock, mark and describe a run at the moment `start`, and hold it for a while."""
    time.sleep(max(0.0, start - time.time()))
    run = open_run(folder)
    with hold_file_lock(run.lock, f"run {run.root}"), log_to((logging.getLogger("medlora.run"), run.log)):
        write_with_checksum(run.about, {"name": "x"})
        write_yaml(run.config, {"name": "x"})
        print(f"runs as {os.getpid()}", flush=True)
        time.sleep(holds_s)


def race(scratch: Path, rounds: int, apart_ms: float, seed: int = 0, holds_s: float = HOLDS_S) -> Row:
    """Rounds of two drivers, each on a folder that is not there yet."""
    row, drawn = Row("two drivers at once"), random.Random(seed)
    for n in range(rounds):
        folder, moment = scratch / f"run-{n}", time.time() + 0.3
        start_over(folder)
        logs = [scratch / f"{n}.{i}.log" for i in range(2)]
        late = [drawn.uniform(0, apart_ms) / 1000 for _ in range(2)]
        helpers = []
        for log, wait_s in zip(logs, late, strict=True):
            pid = os.fork()
            if pid == 0:
                status, _ = run_in_fork(lambda: drive_briefly(folder, moment + wait_s, holds_s), log)  # noqa: B023
                os._exit(status if status >= 0 else 1)
            helpers.append(pid)
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in helpers)
        said = "\n".join(log.read_text() for log in logs)
        winner = re.search(r"runs as (\d+)", said)
        named = re.search(r"is in use by process (\d+) on \S+ since \d{4}-", said)
        right = ends == [0, 2] and winner and named and winner[1] == named[1] and (folder / "run.json").is_file()
        row.add(bool(right), f"round {n}: {ends}: {said[-300:]}")
    return row


def main() -> None:
    """Print the table row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--apart-ms", type=float, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        race(Path(name), arguments.rounds, arguments.apart_ms).show()


if __name__ == "__main__":
    main()
