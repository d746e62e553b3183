"""Death of a driver between any two requests to a store, then the same command on another machine.

    python benchmarks/faults/store_deaths.py                20 moments, evenly over all requests of a run
    python benchmarks/faults/store_deaths.py --moments 50

The run's folder is on moto's server of S3, behind a proxy. It counts the requests, and kills the driver (SIGKILL) before it
passes one of them on. The other machine begins with an empty cache, when the lock of the first has expired. It must end with
the adapter bytes of a run that nothing disturbed, in its working copy and in the store. Needs moto (the extra `dev`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from bench import Row, drive, hash_weights, is_whole, make_config, run_in_fork, start_over, warm_up

from medlora.runs import locks
from medlora.runs.mirror import find_copy
from tests.support.store_server import BUCKET, Store

WEIGHTS = "phases/00/adapter/adapter_model.safetensors"


class Killer:
    """The server's rule that kills a process before request number `at` is passed on; 0 = never."""

    def __init__(self, server: Store) -> None:
        self.server, self.at, self.pid = server, 0, 0
        self.before = ""
        server.rule = self.rule
        server.proxy.handle_error = lambda request, address: None  # type: ignore[method-assign]  # who asked is dead

    def arm(self, pid: int, at: int) -> None:
        """Aim at a process that has asked for nothing yet."""
        self.pid, self.at = pid, at

    def rule(self, method: str, path: str, count: int) -> str | None:
        """What `Store` asks about each request."""
        if count != self.at:
            return None
        self.before = f"{method} {path.partition('?')[0].rpartition('/')[2]}"
        os.kill(self.pid, signal.SIGKILL)
        return "drop"


def drive_in_store(config: Any, uri: str, cache: Path, elsewhere: bool = False) -> None:
    """What the curriculum job does with a run in a store; `elsewhere`: on another machine, much later."""
    locks.SETTLE_S = 0.05  # of the second for which a driver waits to see whether another one began with it
    if elsewhere:
        locks._name_machine = lambda: "another"
        locks.EXPIRY_S = 0.0
    drive(config, find_copy(uri, str(cache)))


def count_requests(config: Any, server: Store, scratch: Path) -> tuple[int, str]:
    """The requests of a run without fault, and the hash of its adapter's weights."""
    uri, cache = f"s3://{BUCKET}/runs/whole", scratch / "whole"
    server.seen.clear()
    status, text = run_in_fork(lambda: drive_in_store(config, uri, cache), scratch / "log")
    found = hash_weights(find_copy(uri, str(cache)))
    assert status == 0 and found, text
    return len(server.seen), found


def try_moments(config: Any, server: Store, scratch: Path, moments: int) -> Row:
    """Kill a driver at each of so many moments, each in a run of its own that is then taken up by another machine."""
    killer, row = Killer(server), Row("driver killed between two requests to a store")
    requests, wanted = count_requests(config, server, scratch)
    print(f"a run makes {requests} requests", flush=True)
    for n in range(moments):
        at = 1 + (2 * n + 1) * requests // (2 * moments)
        uri, name = f"s3://{BUCKET}/runs/{at}", f"runs/{at}/{WEIGHTS}"
        server.seen.clear()
        first, text = run_in_fork(
            lambda: drive_in_store(config, uri, scratch / "one"),  # noqa: B023
            scratch / "log",
            on_start=lambda pid: killer.arm(pid, at),  # noqa: B023
        )
        killer.at = 0
        start_over(scratch / "one")
        second, more = run_in_fork(lambda: drive_in_store(config, uri, scratch / "two", True), scratch / "log")  # noqa: B023
        folder = find_copy(uri, str(scratch / "two"))
        stored = hashlib.sha256(server.read(name)).hexdigest() if second == 0 else None
        right = (
            first == -signal.SIGKILL and second == 0 and is_whole(folder) and hash_weights(folder) == stored == wanted
        )
        row.add(right, f"before request {at} ({killer.before}): {first}, then {second}: {(text + more).strip()[-400:]}")
        start_over(scratch / "two")
    return row


def main() -> None:
    """Print the table row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = make_config(scratch)
        warm_up(config, scratch / "warm")
        server = Store(scratch)
        os.environ.update(server.env)
        try:
            try_moments(config, server, scratch, arguments.moments).show()
        finally:
            server.close()


if __name__ == "__main__":
    main()
