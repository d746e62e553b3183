"""A cluster of three hosts with addresses of their own, brought up, used and broken as the README says."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hosts import Network, find_obstacle, make_hosts
from tiny_run import configure, question, run_all, weights

from medlora import runs
from medlora.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
OBSTACLE = find_obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))


@dataclass
class Lab:
    """The hosts, the folder that all of them see, and the environment of the laptop that jobs are submitted from."""

    network: Network
    shared: Path
    env: dict[str, str]

    def submit(self, *job: str) -> subprocess.Popen[str]:
        command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", *job]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def run_laptop(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """deploy/on-prem.yaml with the addresses and the key of three hosts, each with what setup would install, and `ray up`.

    The workers have one CPU each, so that what asks for two is on two hosts; the head has none, as in cluster.yaml, and
    gives a silent host up after 9 s instead of a minute.
    """
    shared, private = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("lab")
    home = private / "laptop"
    (home / ".ray").mkdir(parents=True)
    token = home / ".ray" / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"RAY_AUTH_MODE": "token", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        env.pop(name, None)
    with make_hosts(["head", "worker1", "worker2"], private, [shared, ROOT]) as network:
        for host in network.hosts:
            (host.home / "medlora").mkdir()
            (host.home / "medlora" / ".venv").symlink_to(sys.prefix)
            installed = subprocess.check_output(["sha256sum", "pyproject.toml", "constraints.txt"], cwd=ROOT)
            (host.home / "medlora" / ".installed").write_bytes(installed)
        config = yaml.safe_load((ROOT / "deploy" / "on-prem.yaml").read_text())
        config["cluster_name"] = f"medlora-{os.getpid()}"
        config["provider"] |= {"head_ip": network.hosts[0].ip, "worker_ips": [host.ip for host in network.hosts[1:]]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(network.key)}
        health = "RAY_health_check_timeout_ms=2000 RAY_health_check_period_ms=1000 RAY_health_check_failure_threshold=3"
        for key, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
            config[key] = [line.replace("ray start ", f"{health} ray start --num-cpus={cpus} ") for line in config[key]]
        (private / "on-prem.yaml").write_text(yaml.safe_dump(config))
        run_laptop(["ray", "up", "-y", str(private / "on-prem.yaml")], env)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        forward = ["ray", "dashboard", "--port", str(port), str(private / "on-prem.yaml")]
        with (private / "dashboard.log").open("wb") as log:
            tunnel = subprocess.Popen(forward, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_workers(network, 2)
            yield Lab(network, shared, env)
        finally:
            os.killpg(tunnel.pid, 9)
            tunnel.wait()


def _wait_for_workers(network: Network, workers: int) -> None:
    """Until the autoscaler has brought up so many workers beside the head."""
    status = f"RAY_AUTH_MODE=token ~/medlora/.venv/bin/ray status | grep -q '{workers}.0 CPU'"
    end = time.monotonic() + 120
    while network.log_in(network.hosts[0], status).returncode:
        logs = network.hosts[0].tmp.glob("ray/session_2*/logs/monitor.*")
        assert time.monotonic() < end, "\n".join(path.read_text()[-3000:] for path in logs)
        time.sleep(1)


def finish(job: subprocess.Popen[str]) -> str:
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    return out


def write_config(config: RunConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def test_jobs_submitted_from_elsewhere_work_on_more_than_one_host(
    lab: Lab, bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    config = configure(bases["gemma"], data, p01={"placement": {"workers": 2}, "batch_size": 2})
    config = config.model_copy(update={"phases": config.phases[:2]})
    run = tmp_path / "run"
    said = finish(
        lab.submit("jobs/curriculum.py", "--config", write_config(config, tmp_path / "c.yaml"), "--run-dir", str(run))
    )
    assert "connected to the running Ray cluster: 3 nodes, 2 CPUs, 0 GPUs" in said
    hosts = {name: (runs.read_manifest(run / "phases" / name) or {})["hosts"] for name in ("00", "01")}
    assert hosts["00"] in (["worker1"], ["worker2"]) and hosts["01"] == ["worker1", "worker2"]
    assert weights(run, "00") == weights(finished, "00")

    # More questions than one actor answers before the other has loaded its model.
    questions = [question(i) for i in range(1000, 1600)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    evaluation = {"tests": [{"name": "mcq", "source": str(tmp_path / "test.jsonl")}], "batch_size": 2}
    stages = [f"{run}:base,01"]
    about = {"name": "e", "base": {"model": bases["gemma"]}, "stages": stages, "evaluation": evaluation}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**about, "placement": {"workers": 2}}), encoding="utf-8")
    said = finish(
        lab.submit("jobs/evaluate_mcq.py", "--config", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "e"))
    )
    assert all(f"an actor is ready on {name}" in said for name in ("worker1", "worker2"))
    assert [row["n"] for row in runs.read_json(tmp_path / "e" / "report.json")["stages"]] == [600, 600]


def test_a_host_that_loses_its_power_costs_at_most_the_steps_since_the_last_checkpoint(
    lab: Lab, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    every = 20
    config = configure(
        bases["gemma"], data, p00={"max_steps": 200, "checkpoint_every_steps": every, "log_every_steps": 1}
    )
    config = config.model_copy(update={"phases": config.phases[:1]})
    run_all(config, tmp_path / "undisturbed", ("00",))
    run = tmp_path / "run"
    job = lab.submit("jobs/curriculum.py", "--config", write_config(config, tmp_path / "c.yaml"), "--run-dir", str(run))
    lost = wait_for_step(run, "00", 40, job)
    name = runs.read_json(run / "phases" / ".00.lock.json")["host"]
    next(host for host in lab.network.hosts if host.name == name).cut_off()
    cut = time.monotonic()
    lost = max(lost, last_step(run, "00"))
    while runs.read_json(run / "phases" / ".00.lock.json")["host"] == name or last_step(run, "00") < lost:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    print(f"power of {name} cut at step {lost}: step {lost} was reached again after {time.monotonic() - cut:.0f} s")
    said = finish(job)
    (resumed,) = re.findall(r"goes on from step (\d+) of 200", said)
    assert "worker 0 died; attempt 1 of 2" in said and 0 <= lost - int(resumed) <= every
    assert weights(run, "00") == weights(tmp_path / "undisturbed", "00")


def last_step(run: Path, phase: str) -> int:
    return max((row["step"] for row in runs.read_json_lines(runs.RunFolder(run).phase(phase).metrics)), default=0)


def wait_for_step(run: Path, phase: str, step: int, job: subprocess.Popen[str]) -> int:
    end = time.monotonic() + 180
    while (reached := last_step(run, phase)) < step:
        assert job.poll() is None and time.monotonic() < end, job.communicate()
        time.sleep(0.02)
    return reached
