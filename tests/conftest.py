"""Shared fixtures; whatever needs torch or Ray imports it inside."""

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

import hypothesis
import psutil
import pytest

# The same examples every time: a run fails for what was changed. MEDLORA_EXPLORE=1 draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("default" if os.environ.get("MEDLORA_EXPLORE") else "same")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def import_ray() -> Any:
    """Ray in the test process, able to talk to the `cluster` later: whether it sends a token it decides when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        import ray
    return ray


CANARIES = {name: f"canary-{secrets.token_hex(8)}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
"""Secrets that every process of the tests' cluster has in its environment, and that must be found nowhere."""

REAL_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test material; the test skips where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real test material (../shared/data) is not here")
    return REAL_DATA


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random base models, a folder per family of tests/tiny.py."""
    import torch
    from tiny import build_bases

    torch.set_num_threads(1)
    return build_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data of tests/tiny_run.py."""
    from tiny_run import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three phases on the tiny Gemma, without Ray."""
    from tiny_run import configure, run_all

    folder = tmp_path_factory.mktemp("finished")
    run_all(configure(bases["gemma"], data), folder)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that may use a real `ray start --head` cluster of two CPUs, to which nodes may be added."""
    with start_head(tmp_path_factory.mktemp("token") / "auth_token", {}) as env:
        yield env


PORTS = "--port=0 --dashboard-port=0 --dashboard-agent-listen-port=0"
"""For `ray start --head`: whichever are free."""


@contextmanager
def start_head(
    token: Path, more: dict[str, str], start: str = f"ray start --head --block --num-cpus=2 {PORTS}"
) -> Iterator[dict[str, str]]:
    """A head with a token of its own, by a line of bash that ends with `ray start`, and `more` in its environment, which it
    gives."""
    bin_folder = Path(sys.executable).parent
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"HF_HUB_OFFLINE": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    env |= CANARIES | more
    # Sockets have paths of at most 107 bytes; a short folder of its own keeps other clusters of the machine apart.
    folder = Path(tempfile.mkdtemp(prefix="ml"))
    log = (folder / "head.log").open("w")
    # `ray stop` would end every Ray of the machine, the developer's own too: this one ends with its process group.
    process = subprocess.Popen(
        ["bash", "-c", f"{start} --temp-dir={folder}"], env=env, stdout=log, stderr=log, start_new_session=True
    )
    try:
        current = folder / "ray_current_cluster"
        end = time.monotonic() + 60
        while not current.exists() or "Ray runtime started" not in (folder / "head.log").read_text():
            assert not process.poll() and time.monotonic() < end, (folder / "head.log").read_text()
            time.sleep(0.1)
        said = (folder / "head.log").read_text()
        dashboard = re.search(r"RAY_API_SERVER_ADDRESS='http://([^:']+):([0-9]+)|http://([0-9.]+):([0-9]+)", said)
        assert dashboard, said
        env["RAY_ADDRESS"] = current.read_text().strip()
        address = f"http://{dashboard[1] or dashboard[3]}:{dashboard[2] or dashboard[4]}"
        yield {**env, "DASHBOARD": address, "SESSION": str(folder)}
    finally:
        for other in psutil.process_iter(["cmdline"]):
            if any(str(folder) in part for part in other.info["cmdline"] or []):
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
    root = Path(__file__).resolve().parent.parent
    command = ["ray", "job", "submit", "--address", cluster["DASHBOARD"], *options]
    command += ["--runtime-env-json", json.dumps({"env_vars": env or {}}), "--", *job]
    for _ in range(10):
        done = subprocess.run(command, cwd=root, env=cluster, capture_output=True, text=True, timeout=1500)
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)  # on a busy machine Ray's agent comes up after the cluster, and it says to try again
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def ray_cluster(cluster: dict[str, str]) -> Any:
    """This process connected to the session's cluster; workers find what stands beside the tests by PYTHONPATH."""
    keys = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    before = {key: os.environ.get(key) for key in keys}
    os.environ.update({key: cluster[key] for key in keys})
    ray = import_ray()

    from medlora.on_ray.cluster import connect

    ray.init(
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}, log_to_driver=False, logging_level="ERROR"
    )
    with connect() as found:
        yield found
    ray.shutdown()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-gpu", action="store_true", help="also run the tests that need a CUDA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-gpu"):
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: --run-gpu"))
