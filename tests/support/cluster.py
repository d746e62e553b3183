"""Real Ray clusters of the tests: heads, nodes, tokens, submitted jobs."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ROOT


def import_ray() -> Any:
    """Ray in the test process, able to talk to the `cluster` later: whether it sends a token it decides when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        import ray
    return ray


CANARIES = {name: f"canary-{secrets.token_hex(8)}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
"""Secrets that every process of the tests' cluster has in its environment, and that must be found nowhere."""


PORTS = "--port=0 --dashboard-port=0 --dashboard-agent-listen-port=0"
"""For `ray start --head`: whichever are free."""

UNMEASURED = {"RAY_enable_metrics_collection": "0", "REPORTER_UPDATE_INTERVAL_MS": "60000"}
"""For a head: without measuring its processes for a dashboard that nobody looks at."""

FRUGAL = "--include-log-monitor=false"
"""For `ray start`: without the process that reads all logs for drivers that want them, as medlora's do not."""


@contextmanager
def start_head(
    token: Path, more: dict[str, str], start: str = f"ray start --head --block --num-cpus=2 {PORTS} {FRUGAL}"
) -> Iterator[dict[str, str]]:
    """A head with a token of its own, by a line of bash that ends with `ray start`, and `more` in its environment, which it
    gives."""
    bin_folder = Path(sys.executable).parent
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"HF_HUB_OFFLINE": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    env |= CANARIES | UNMEASURED | more
    # Sockets have paths of at most 107 bytes; a short folder of its own keeps other clusters of the machine apart.
    folder = Path(tempfile.mkdtemp(prefix="ml"))
    log_path = folder / "head.log"
    log = log_path.open("w")
    # `ray stop` would end every Ray of the machine, the developer's own too: this one ends with its process group.
    process = subprocess.Popen(
        ["bash", "-c", f"{start} --temp-dir={folder}"], env=env, stdout=log, stderr=log, start_new_session=True
    )
    try:
        current = folder / "ray_current_cluster"
        end = time.monotonic() + 60
        # The file is made before the address is written into it.
        while (
            not (current.exists() and current.read_text().strip()) or "Ray runtime started" not in log_path.read_text()
        ):
            assert not process.poll() and time.monotonic() < end, log_path.read_text()
            time.sleep(0.1)
        said = log_path.read_text()
        dashboard = re.search(r"RAY_API_SERVER_ADDRESS='http://([^:']+):([0-9]+)|http://([0-9.]+):([0-9]+)", said)
        assert dashboard, said
        env["RAY_ADDRESS"] = current.read_text().strip()
        address = f"http://{dashboard[1] or dashboard[3]}:{dashboard[2] or dashboard[4]}"
        yield {**env, "DASHBOARD": address, "SESSION": str(folder)}
    finally:
        # Some name themselves, so their command lines do not tell; an agent without its raylet would work on for a while.
        own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for other in psutil.process_iter(["cmdline"]):
            if other in own or any(str(folder) in part for part in other.info["cmdline"] or []):
                other.kill()
        process.kill()
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    cluster: dict[str, str],
    job: list[str],
    options: tuple[str, ...] = ("--working-dir", "."),
    env: dict[str, str] | None = None,
) -> str:
    """What a job prints that was given to the cluster with `ray job submit`, as users do; it must end well.

    `env` is what its processes find in their environment beside what the nodes have.
    """
    root = ROOT
    command = ["ray", "job", "submit", "--address", cluster["DASHBOARD"], *options]
    command += ["--runtime-env-json", json.dumps({"env_vars": env or {}}), "--", *job]
    for _ in range(10):
        done = subprocess.run(command, cwd=root, env=cluster, capture_output=True, text=True, timeout=1500)
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)  # on a busy machine Ray's agent comes up after the cluster, and it says to try again
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


RAY = str(Path(sys.executable).parent / "ray")


class AddedNode:
    """A raylet of its own beside the session's cluster, with one CPU and the label pool=`pool`."""

    def __init__(self, env: dict[str, str], pool: str, name: str, more: tuple[str, ...] = ()) -> None:
        self.env, self.name = env, name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        labels = f"pool={pool},name={name}"
        command = [RAY, "start", f"--address={env['RAY_ADDRESS']}", "--block", FRUGAL]
        command += ["--num-cpus=1", f"--labels={labels}"]
        self.process = subprocess.Popen(
            [*command, *more], env=env, stdout=self.log, stderr=self.log, start_new_session=True
        )

        end = time.monotonic() + 60
        while self.raylet is None or "Ray runtime started" not in self.read_log():
            assert self.process.poll() is None and time.monotonic() < end, self.read_log()
            time.sleep(0.2)

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    @property
    def raylet(self) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        found = [child for child in children if child.name() == "raylet"]
        return found[0] if found else None

    def holds(self, pid: int) -> bool:
        """Whether a process is one of this node's workers."""
        raylet = self.raylet
        return raylet is not None and pid in [child.pid for child in raylet.children(recursive=True)]

    def remove(self) -> None:
        """Kill everything of the node at once, as a machine that is gone."""
        if self.process.poll() is None:
            processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
            for process in processes:
                process.kill()
        self.process.wait(timeout=30)


@contextmanager
def add_nodes(env: dict[str, str], *nodes: tuple[str, ...]) -> Iterator[list[AddedNode]]:
    """Nodes by pool, name and more arguments of `ray start`; gone at the end."""
    added: list[AddedNode] = []
    try:
        for pool, name, *more in nodes:
            added.append(AddedNode(env, pool, name, tuple(more)))  # one by one: two at once may take the same ports
        yield added
    finally:
        for node in added:
            node.remove()


def read_token(cluster: dict[str, str]) -> str:
    return Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()


def list_addresses(processes: list[psutil.Process]) -> dict[str, list[str]]:
    """The addresses that processes and all that they started listen on, and who does."""
    found: dict[str, list[str]] = {}
    for process in {each for root in processes for each in [root, *root.children(recursive=True)]}:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(connection.laddr.ip, []).append(process.name())
        except psutil.NoSuchProcess:
            continue
    return found
