"""No shipped config starts a cluster that answers without its token, and one machine alone listens on loopback alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support import ROOT
from tests.support.cluster import PORTS, list_addresses, read_token, start_head


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return config


def find_start(name: str) -> str:
    """The line with which a config of Ray's launcher starts its head."""
    *_, start = read_config(name)["head_start_ray_commands"]
    return str(start)


def make_start(name: str) -> str:
    """The head's start as the config has it, but for its ports."""
    if name != "deploy/kuberay.yaml":
        start, ports = re.subn("--port=6379", PORTS, find_start(name))
        assert ports == 1
        return start
    # KubeRay makes it of the config's parameters and of its own: the dashboard is for the other pods.
    parameters = read_config(name)["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    given = " ".join(f"--{key}={value}" for key, value in {"dashboard-host": "0.0.0.0", **parameters}.items())
    return f"ray start --head --block {given} {PORTS}"


def test_both_configs_of_the_launcher_start_the_same_head() -> None:
    aws, own = (find_start(name) for name in ("cluster.yaml", "deploy/on-prem.yaml"))
    assert own.replace("RAY_enable_autoscaler_v2=0 ", "") == aws


@pytest.fixture(scope="module", params=["cluster.yaml", "deploy/kuberay.yaml"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head as a shipped config starts it, but for its ports and folders; deploy/on-prem.yaml's is that of cluster.yaml."""
    home = tmp_path_factory.mktemp("home")
    (home / "medlora").mkdir()
    (home / "medlora" / ".venv").symlink_to(sys.prefix)
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    # What the config itself does not set is not set for it; KubeRay gives every pod the mode and a secret of its own.
    alone = "unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH; "
    if request.param == "deploy/kuberay.yaml":
        mode = read_config(request.param)["spec"]["rayClusterSpec"]["authOptions"]["mode"]
        alone += f"export RAY_AUTH_MODE={mode} RAY_AUTH_TOKEN=$(cat {token}); "
    with start_head(token, {"HOME": str(home)}, alone + make_start(request.param)) as env:
        yield env


def ask(url: str, token: str | None, body: bytes | None = None) -> int:
    """The HTTP status of a request with that token, or none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_jobs_api_and_dashboard_refuse_who_has_no_token(shipped: dict[str, str], token: str | None) -> None:
    run = json.dumps({"entrypoint": "touch /nowhere"}).encode()
    refusal = 401 if token is None else 403
    for path, body in (
        ("/api/jobs/", None),
        ("/api/jobs/", run),
        ("/api/version", None),
        ("/nodes?view=summary", None),
        ("/api/v0/tasks", None),
        ("/api/v0/logs?node_id=x", None),
        ("/logical/actors", None),
    ):
        assert ask(shipped["DASHBOARD"] + path, token, body) == refusal, path
    assert ask(shipped["DASHBOARD"] + "/api/jobs/", read_token(shipped)) == 200


CLIENT = """
import sys, ray
from ray._raylet import GcsClient
try:
    print("IN", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"fun"))
except Exception as error:
    print("OUT", type(error).__name__, error)
"""


def start_client(address: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """A process that asks the cluster's own server something and prints IN or OUT."""
    env = {**env, "RAY_gcs_rpc_server_reconnect_timeout_s": "1"}
    return subprocess.Popen([sys.executable, "-c", CLIENT, address], env=env, stdout=subprocess.PIPE, text=True)


def test_the_cluster_takes_no_client_without_its_token(shipped: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    absent = {**shipped, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    del absent["RAY_AUTH_TOKEN_PATH"]
    wrong = {**shipped, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    clients = [start_client(shipped["RAY_ADDRESS"], env) for env in (absent, wrong, shipped)]
    said = [client.communicate(timeout=120)[0] for client in clients]
    assert all(out.startswith("OUT") and "InvalidAuthToken" in out for out in said[:2]) and said[2].startswith("IN"), (
        said
    )


LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_cluster_of_one_machine_listens_on_loopback_alone(tmp_path: Path) -> None:
    """As SECURITY.md says to start one; the token is read from its file and stays its owner's."""
    with start_head(tmp_path / "auth_token", {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}) as cluster:
        ours = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(cluster["SESSION"] in part for part in process.info["cmdline"] or [])
        ]
        found = list_addresses(ours)
        assert set(found) <= LOOPBACK, found
        assert {"gcs_server", "raylet"} <= {name for names in found.values() for name in names}
        assert Path(cluster["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0


HERE = """
import json, os, psutil, sys
from medlora.on_ray.cluster import connect; import ray
with connect() as cluster:
    from tests.support.cluster import list_addresses
    print(json.dumps([cluster.started_here, list_addresses([psutil.Process()]), ray.get_runtime_context().gcs_address]), flush=True)
    sys.stdin.readline()
"""


def test_a_ray_that_medlora_starts_listens_on_loopback_with_a_token_that_is_its_owner_s(
    tmp_path: Path, local_ray: dict[str, str]
) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **local_ray}
    code = f"import os; os.umask(0o022)\n{HERE}"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None and driver.stdout is not None
    try:
        started_here, found, address = json.loads(driver.stdout.readline())
        assert started_here and set(found) <= LOOPBACK and any("raylet" in names for names in found.values()), found
        assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
        stranger = {**env, "HOME": str(tmp_path / "stranger")}
        wrong = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_MODE": "token"}
        clients = [start_client(address, {**stranger, **changes}) for changes in ({"RAY_AUTH_MODE": "disabled"}, wrong)]
        for client in clients:
            out = client.communicate(timeout=120)[0]
            assert out.startswith("OUT") and "InvalidAuthToken" in out, out
    finally:
        driver.stdin.close()
        driver.wait(timeout=60)
