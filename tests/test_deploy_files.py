"""The files for containers and Slurm: what they name exists, and the script does what docs/slurm.md says, with stand-ins."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from medlora import __version__
from tests.support import ROOT

DOCKERFILE, SBATCH = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "slurm.sbatch"

# What Slurm and Ray would do, as far as the script sees it. Each call is a line of $CALLS.
STANDINS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"\n[ "$1" = show ] && printf "a\\nb\\n"\nexit 0',
    "srun": 'echo "srun $*" >> "$CALLS"\ncase "$*" in\n*hostname*) echo "127.0.0.1 10.0.0.7" ;;\n*) exec sleep 60 ;;\nesac',
    "ray": 'n=$(grep -c "ray start" "$CALLS")\nfor i in $(seq "$n"); do echo " 1 node_$i"; done',
    "medlora": 'trap \'echo "medlora saved" >> "$CALLS"; exit 143\' TERM\n'
    'echo "medlora $* at $RAY_ADDRESS with $RAY_AUTH_MODE" >> "$CALLS"\n'
    'stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"\n'
    'if [ -n "${DRIVER_CODE:-}" ]; then exit "$DRIVER_CODE"; fi\nwhile true; do sleep 0.05; done',
}


def start(tmp_path: Path, **environ: str) -> subprocess.Popen[str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "MEDLORA_BIN": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RAY_POLL_S": "0.05",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "[a-b]",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "1",
        **environ,
    }
    command = ["bash", str(SBATCH), "c.yaml", "/shared/runs/first"]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(job: subprocess.Popen[str], tmp_path: Path) -> list[str]:
    try:
        assert job.stderr is not None
        job.wait(timeout=20)
        return (tmp_path / "calls").read_text().splitlines()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # the stand-ins of Ray, as Slurm ends the steps of a job


def wait_for(text: str, tmp_path: Path) -> None:
    end = time.monotonic() + 20
    while text not in (tmp_path / "calls").read_text():
        assert time.monotonic() < end, (tmp_path / "calls").read_text()
        time.sleep(0.05)


def test_ray_starts_on_every_node_and_the_run_is_requeued_at_sigterm(tmp_path: Path) -> None:
    job = start(tmp_path)
    wait_for("token 600", tmp_path)
    job.send_signal(signal.SIGTERM)
    calls = finish(job, tmp_path)
    assert job.returncode == 0
    head, worker = [call for call in calls if "ray start" in call]
    assert "--nodelist=a" in head and "--head --node-ip-address=10.0.0.7 --port=24242" in head
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=8 --num-gpus=1" in head
    assert "--nodelist=b" in worker and "--address=10.0.0.7:24242" in worker
    assert "medlora train --config c.yaml --run-dir /shared/runs/first at 10.0.0.7:24242 with token" in calls
    assert calls[-2:] == ["medlora saved", "scontrol requeue 4242"]
    assert not list((tmp_path / ".ray").iterdir()), "the token goes with the job"


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_run_that_ends_by_itself_gives_its_exit_code_and_no_requeue(code: str, tmp_path: Path) -> None:
    job = start(tmp_path, DRIVER_CODE=code)
    calls = finish(job, tmp_path)
    assert job.returncode == int(code)
    assert not any("requeue" in call for call in calls)


def test_the_image_is_pinned_and_copies_what_is_here() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    (image,) = re.findall(r"^FROM (\S+)$", text, flags=re.M)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu24\.04", image)
    admitted = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert admitted[0] == "*"
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, flags=re.M) for name in line.split()]
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in admitted, name
    assert {"constraints.txt", "pyproject.toml", "setup.py", "medlora", "configs"} <= set(copied)
    for install in re.findall(r"pip install .*", text):
        assert "-c /src/constraints.txt" in install
    assert f"medlora:{__version__}" in text and re.search(r"^USER medlora$", text, flags=re.M)
