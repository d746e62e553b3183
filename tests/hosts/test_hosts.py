"""A cluster of three hosts with addresses of their own, brought up, used and ended from a fourth as README.md says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from medlora.config.run import RunConfig
from medlora.runs.files import read_json, read_json_lines
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import read_manifest
from tests.support import ROOT
from tests.support.cluster import FRUGAL
from tests.support.hosts import Host, Network, find_obstacle, make_hosts
from tests.support.store_server import BUCKET, HostStore
from tests.support.tiny_run import configure, run_all, weights

OBSTACLE = find_obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
CHECKOUT = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "medlora", "jobs", "configs", "deploy")
CONFIG = "configs/medgemma-4b.yaml"
"""What the README trains; here it is two phases on a tiny base."""


def read_commands() -> list[str]:
    """The commands of the README's section on clusters, line by line as they stand there."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## On a cluster\n")[1].split("\n## ")[0]
    return section.split("```sh\n")[1].split("```")[0].splitlines()


MAKE_TOKEN, EXPORT, UP, DASHBOARD, SUBMIT, DOWN = read_commands()


@dataclass
class Lab:
    """The hosts, what all of them see as /shared, a store on the head, and the laptop, whose checkout a user works in."""

    network: Network
    laptop: Host
    shared: Path
    store: HostStore

    def make_script(self, command: str) -> str:
        return f"cd ~/checkout; . ~/environment\n{command}\ncode=$?; wait; exit $code"

    def run(self, command: str, typed: str = "") -> None:
        done = self.network.log_in(self.laptop, self.make_script(command), typed)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def start(self, command: str) -> subprocess.Popen[str]:
        return self.network.start(self.laptop, self.make_script(command))

    def submit(self, *job: str) -> subprocess.Popen[str]:
        return self.start(" ".join(["ray job submit --working-dir . -- python", *job]))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str], data: Path) -> Iterator[Lab]:
    """Hosts that have what setup would install, a laptop with a checkout in which deploy/on-prem.yaml names them, and the
    README's commands up to the first job.

    The workers have one CPU each, so that what asks for two is on two hosts; the head has none, as in cluster.yaml, and
    gives a silent host up after 9 s instead of a minute.
    """
    # The bases lie outside the folder of a worker of pytest-xdist.
    seen = [tmp_path_factory.getbasetemp(), Path(bases["gemma"]).parent, ROOT]
    private = tmp_path_factory.mktemp("lab")
    shared = private / "shared"
    shared.mkdir()
    with make_hosts(["laptop", "head", "worker1", "worker2"], private, seen, shared) as network:
        laptop, head, *workers = network.hosts
        for host in (head, *workers):
            (host.home / "medlora").mkdir()
            (host.home / "medlora" / ".venv").symlink_to(sys.prefix)
            installed = subprocess.check_output(["sha256sum", "pyproject.toml", "constraints.txt"], cwd=ROOT)
            (host.home / "medlora" / ".installed").write_bytes(installed)
        store = HostStore(network, head)
        checkout = laptop.home / "checkout"
        checkout.mkdir()
        for name in CHECKOUT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, checkout / name)
        write_config(make_config(bases, data), checkout / CONFIG)
        config = yaml.safe_load((ROOT / "deploy" / "on-prem.yaml").read_text())
        config["provider"] |= {"head_ip": head.ip, "worker_ips": [host.ip for host in workers]}
        config["auth"]["ssh_user"] = "root"
        health = "RAY_health_check_timeout_ms=2000 RAY_health_check_period_ms=1000 RAY_health_check_failure_threshold=3"
        health += "".join(f" {name}={value}" for name, value in store.env.items())
        for key, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
            config[key] = [
                line.replace("ray start ", f"{health} ray start {FRUGAL} --num-cpus={cpus} ") for line in config[key]
            ]
        (checkout / "deploy" / "on-prem.yaml").write_text(yaml.safe_dump(config))
        (laptop.home / ".ssh").mkdir()
        shutil.copy(network.key, laptop.home / ".ssh" / "id_ed25519")
        (laptop.home / "environment").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")

        lab = Lab(network, laptop, shared, store)
        lab.run(MAKE_TOKEN)
        with (laptop.home / "environment").open("a") as file:
            file.write(EXPORT + "\n")
        lab.run(UP, typed="y\n")
        lab.start(DASHBOARD)
        _wait_for_workers(network, head, 2)
        yield lab


def make_config(bases: dict[str, str], data: Path) -> RunConfig:
    """Two phases, the second on two workers."""
    config = configure(bases["gemma"], data, p01={"placement": {"workers": 2}})
    return config.model_copy(update={"phases": config.phases[:2]})


def _wait_for_workers(network: Network, head: Host, workers: int) -> None:
    """Until the autoscaler has brought up so many workers beside the head."""
    status = f"RAY_AUTH_MODE=token ~/medlora/.venv/bin/ray status | grep -q '{workers}.0 CPU'"
    end = time.monotonic() + 120
    while network.log_in(head, status).returncode:
        logs = head.tmp.glob("ray/session_2*/logs/monitor.*")
        assert time.monotonic() < end, "\n".join(path.read_text()[-3000:] for path in logs)
        time.sleep(1)


def finish(job: subprocess.Popen[str]) -> str:
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    return out


def write_config(config: RunConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")


def test_the_readme_s_job_and_an_evaluation_work_on_more_than_one_host(
    lab: Lab, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    assert CONFIG in SUBMIT
    said = finish(lab.start(SUBMIT))
    assert "connected to the running Ray cluster: 3 nodes, 2 CPUs, 0 GPUs" in said
    run = lab.shared / "runs" / "first"
    hosts = {name: (read_manifest(run / "phases" / name) or {})["hosts"] for name in ("00", "01")}
    assert hosts["00"] in (["worker1"], ["worker2"]) and hosts["01"] == ["worker1", "worker2"]
    run_all(make_config(bases, data), tmp_path / "alone", ("00",))
    assert weights(run, "00") == weights(tmp_path / "alone", "00")

    # In more batches than one actor answers before the other has loaded its model.
    tests = [{"name": "mcq", "source": str(data / "mcq.jsonl")}]
    evaluation = {"tests": tests, "scoring": "generate", "max_tokens": 60, "batch_size": 1}
    stages = ["/shared/runs/first:base,01"]
    about = {"name": "e", "base": {"model": bases["gemma"]}, "stages": stages, "evaluation": evaluation}
    about |= {"placement": {"workers": 2}}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
    said = finish(lab.submit("jobs/evaluate_mcq.py", "--config", str(tmp_path / "e.yaml"), "--out", "/shared/e"))
    assert all(f"an actor is ready on {name}" in said for name in ("worker1", "worker2"))
    rows = read_json(lab.shared / "e" / "report.json")["stages"]
    assert {(row["stage"], row["test"], row["n"]) for row in rows} == {(stage, "mcq", 24) for stage in ("base", "01")}


def test_a_host_that_loses_its_power_costs_at_most_the_steps_since_the_last_checkpoint(
    lab: Lab, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """The run is in a store, of which every host has a working copy of its own."""
    every = 20
    config = configure(
        bases["gemma"], data, p00={"max_steps": 200, "checkpoint_every_steps": every, "log_every_steps": 1}
    )
    config = config.model_copy(update={"phases": config.phases[:1]})
    run_all(config, tmp_path / "undisturbed", ("00",))
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"cache": None})})
    write_config(config, tmp_path / "c.yaml")
    where = f"s3://{BUCKET}/runs/power"
    job = lab.submit("jobs/curriculum.py", "--config", str(tmp_path / "c.yaml"), "--run-dir", where)
    workers, end = lab.network.hosts[2:], time.monotonic() + 180
    while max(map(last_step, workers)) < 40:
        assert job.poll() is None and time.monotonic() < end, job.communicate()
        time.sleep(0.02)
    first, second = sorted(workers, key=last_step, reverse=True)
    first.cut_off()
    cut, lost = time.monotonic(), last_step(first)
    while last_step(second) <= lost:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    print(f"power of {first.name} cut at step {lost}: it was passed again after {time.monotonic() - cut:.0f} s")
    said = finish(job)
    (resumed,) = re.findall(r"resumes from step (\d+) of 200", said)
    assert "worker 0 died; attempt 1 of 2" in said and 0 <= lost - int(resumed) <= every
    assert f"run: {where}" in said
    kept = lab.store.read("runs/power/phases/00/adapter/adapter_model.safetensors")
    assert kept == weights(tmp_path / "undisturbed", "00")


def last_step(host: Host) -> int:
    """The last step of the phase in a host's working copy of the run."""
    copy = host.home / ".cache" / "medlora" / "working-copies" / "runs" / "s3" / f"{BUCKET},runs" / "power"
    return max((row["step"] for row in read_json_lines(RunFolder(copy).phase("00").metrics)), default=0)


def test_the_cluster_ends_when_it_is_told_to(lab: Lab) -> None:
    head = lab.network.hosts[1]
    assert lab.network.log_in(head, "pgrep gcs_server").returncode == 0
    lab.run(DOWN, typed="y\n")
    assert lab.network.log_in(head, "pgrep 'gcs_server|raylet'").returncode == 1
