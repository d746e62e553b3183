"""Shared fixtures; whatever needs torch or Ray imports it inside."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

from tests.support import ROOT
from tests.support.cluster import import_ray, start_head

# The same examples every time: a run fails for what was changed. MEDLORA_EXPLORE=1 draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("default" if os.environ.get("MEDLORA_EXPLORE") else "same")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores


ON_THE_SECOND_CLUSTER = {
    "test_sweep.py",
    "test_safety.py",
    "test_early_scoring.py",
    "test_failures.py",
    "test_answer_questions.py",
}
"""Files whose tests share another cluster; test_safety.py looks for secrets in the logs that the sweeps left there."""

WAITING = {"test_mirror.py", "test_store_deaths.py", "test_endings.py"}
"""Files whose tests mostly wait: together and early, while those on a cluster have work for both cores."""

UNWATCHED = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Without Ray Train's process that watches, in every phase, for nodes that are taken away: test_nodes.py has it."""

REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test material; the test skips where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real test material (../shared/data) is not here")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_model() -> str:
    """The folder of real pretrained weights (`make real-model`); the test skips where the environment names none."""
    if not (named := os.environ.get("MEDLORA_REAL_MODEL")):
        pytest.skip("MEDLORA_REAL_MODEL names no folder of a real model (make real-model)")
    return named


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """Tiny random base models, a folder per family of tests/support/tiny.py; made once for all workers of pytest-xdist."""
    import torch

    from tests.support.tiny import build_bases

    torch.set_num_threads(1)
    if worker_id == "master":
        return build_bases(tmp_path_factory.mktemp("bases"))
    shared = tmp_path_factory.getbasetemp().parent / "bases"
    listed = shared.with_suffix(".json")
    with FileLock(shared.with_suffix(".lock")):
        if not listed.is_file():
            shared.mkdir()
            listed.write_text(json.dumps(build_bases(shared)))
    found: dict[str, str] = json.loads(listed.read_text())
    return found


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data of tests/support/tiny_run.py."""
    from tests.support.tiny_run import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three phases on the tiny Gemma, without Ray."""
    from tests.support.tiny_run import configure, run_all

    folder = tmp_path_factory.mktemp("finished")
    run_all(configure(bases["gemma"], data), folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two phases of tests/support/curriculum.py without Ray: what every disturbed run must equal."""
    from tests.support.curriculum import two_phases
    from tests.support.tiny_run import run_all

    folder = tmp_path_factory.mktemp("undisturbed")
    run_all(two_phases(bases, data), folder, ("00", "01"))
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that may use a real `ray start --head` cluster of two CPUs, to which nodes may be added."""
    with start_head(tmp_path_factory.mktemp("token") / "auth_token", UNWATCHED) as env:
        yield env


@pytest.fixture(scope="module")
def ray_cluster(cluster: dict[str, str]) -> Any:
    """This process connected to the session's cluster; workers find what stands beside the tests by PYTHONPATH."""
    keys = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", *UNWATCHED)
    before = {key: os.environ.get(key) for key in keys}
    os.environ.update({key: cluster[key] for key in keys})
    ray = import_ray()

    from medlora.on_ray.cluster import connect

    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False, logging_level="ERROR")
    with connect() as found:
        yield found
    ray.shutdown()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture
def local_ray() -> Iterator[dict[str, str]]:
    """Environment of a process that starts a Ray of its own, whose sockets need short paths."""
    sockets = tempfile.mkdtemp(prefix="ml")
    yield {"RAY_ADDRESS": "local", "RAY_TMPDIR": sockets}
    shutil.rmtree(sockets, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Keep the collector from what the tests' modules have imported: a phase calls it three times, for 0.4 s each."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-gpu", action="store_true", help="also run the tests that need a CUDA GPU")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what a test needs by its fixtures and its folder, so that nobody can forget to.

    Tests that share a cluster, or hosts, form a group: they run one after another in one process of pytest-xdist.
    There are two clusters, so that two processes share their time.
    """
    for item in items:
        needs = {item.path.relative_to(ROOT / "tests").parts[0], *getattr(item, "fixturenames", ())}
        group = pytest.mark.xdist_group("sweeps" if item.path.name in ON_THE_SECOND_CLUSTER else "cluster")
        if "canary" in item.keywords:
            item.add_marker(group)
        elif needs & {"hosts", "lab"}:
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.xdist_group("hosts"))
        elif needs & {"cluster", "ray_cluster"}:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(group)
        elif "local_ray" in needs:
            item.add_marker(pytest.mark.cluster)
        if item.path.name in WAITING:
            item.add_marker(pytest.mark.xdist_group("waiting"))
        if "gpu" in needs:
            item.add_marker(pytest.mark.gpu)
        if "gpu" in item.keywords and not config.getoption("--run-gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: --run-gpu"))
