"""A Ray that cannot be connected to is named within seconds, before Ray's own client waits for it in silence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.cluster import import_ray

ray = import_ray()

from medlora.errors import InputError  # noqa: E402
from medlora.on_ray import address  # noqa: E402


def refuse(said: str, *more: str) -> str:
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        address.find_ray()
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert said in text and "RAY_ADDRESS=local" in text and all(each in text for each in more), text
    return text


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_local_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address.find_ray() is None


def test_a_dead_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"127.0.0.1:{find_free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", place)
    refuse(f"RAY_ADDRESS names a Ray at {place}, where nothing answers")


def test_what_accepts_and_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "PROBE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        refuse(f"a Ray at {place}, which did not answer")


def test_another_kind_of_server_is_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        refuse(place)


@pytest.mark.parametrize(
    ("value", "said"),
    [("http://127.0.0.1:8265", "where jobs are submitted"), ("somewhere", "is no host:port")],
)
def test_what_is_no_address_is_said(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    refuse(said, value)


def test_ray_s_own_file_that_names_a_dead_ray_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    assert address.find_ray() is None  # nothing runs, nothing is written: a local one is started
    (tmp_path / "ray").mkdir()
    place = f"127.0.0.1:{find_free_port()}"
    (tmp_path / "ray" / "ray_current_cluster").write_text(place)
    text = refuse(place)
    assert text.startswith(str(tmp_path / "ray" / "ray_current_cluster"))


def test_another_token_is_refused_in_one_message_by_a_job(cluster: dict[str, str], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    code = "import sys; from medlora.endings import run_job; from medlora.on_ray.cluster import connect\n"
    code += "def work():\n    with connect(): return 0\nsys.exit(run_job(work))"

    def connect(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**cluster, **env}, capture_output=True, text=True
        )

    refused = connect(RAY_AUTH_TOKEN_PATH=str(token))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"names a Ray at {cluster['RAY_ADDRESS']}, which refuses this job's token" in refused.stderr
    assert "RAY_ADDRESS=local" in refused.stderr
    taken = connect()
    assert (taken.returncode, taken.stderr) == (0, "")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raise Exception('The current node timed out during startup.\\nmore')", "did not start within 60 s (The current node timed out during startup.)"),
        ("ctypes.CDLL(None).sleep(60)", "did not start within 60 s; "),
    ],
)  # fmt: skip
def test_a_ray_that_does_not_start_is_said_with_the_machine_s_load(does: str, said: str) -> None:
    """In a process of its own: it ends whatever Ray its process has started."""
    code = "import sys, ctypes; from medlora.endings import run_job; from medlora.on_ray import cluster\n"
    code += f"def start(**options):\n    {does}\n"
    code += "cluster.START_S = 1.0; cluster.ray.init = start\n"
    code += "def work():\n    with cluster.connect(): return 0\nsys.exit(run_job(work))"
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("medlora: Ray "), done.stderr
    assert said in done.stderr and "load is" in done.stderr and done.stderr.count("\n") == 1, done.stderr
