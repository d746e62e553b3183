"""What `pip install medlora` brings: the package with its configs and templates, and a command that works from it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from medlora import __version__
from tests.support import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built from a copy of what git knows: the checkout gets no build folder."""
    home = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        target = home / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(home), str(home / "source")], capture_output=True, text=True, cwd=home
    )
    assert done.returncode == 0, done.stderr
    (found,) = home.glob("*.whl")
    return found


def test_the_wheel_holds_all_that_the_package_reads(wheel: Path) -> None:
    assert wheel.name == f"medlora-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medlora").rglob("*.py")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medlora").rglob("templates/*")}
    configs = {f"medlora/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert templates and configs
    assert code | templates | configs | {"medlora/py.typed"} <= held
    others = {name for name in held if not name.startswith(("medlora/", f"medlora-{__version__}.dist-info/"))}
    assert not others


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["schema"]])
def test_the_command_works_from_the_wheel_alone(wheel: Path, command: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "target")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "target")}
    code = "import sys, medlora; from medlora.cli.main import main; from medlora.cli.common import find_config\n"
    code += "assert str(find_config('quickstart.yaml')).startswith(sys.argv.pop(1)) and find_config('quickstart.yaml').is_file()\n"
    code += "sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "target"), *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    expected = {"--help": "medlora export", "--version": f"medlora {__version__}", "schema": '"$defs"'}[command[0]]
    assert expected in done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of the wheel in an environment of its own, which sees this one's libraries but not its medlora."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # A path that a .pth file names is searched last, and its own .pth files, such as that of a checkout, are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "bin" / "medlora"


def run_installed(
    command: Path, folder: Path, *arguments: str, typed: str | None = None, env: dict[str, str] | None = None
) -> str:
    """What the command prints, in a folder that has nothing to do with the checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *arguments],
        cwd=folder,
        env=inherited | (env or {}),
        input=typed,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_user_installs_and_plans(installed: Path, tmp_path: Path) -> None:
    """From an empty folder: the version, a config, and what a run of it would do."""
    python = installed.parent / "python"
    assert run_installed(python, tmp_path, "-c", "import medlora; print(medlora.__file__)").startswith(
        str(installed.parents[1])
    )
    assert run_installed(installed, tmp_path, "--version") == f"medlora {__version__}\n"
    said = run_installed(installed, tmp_path, "init")
    assert said == "config: quickstart.yaml\nnext: medlora plan --config quickstart.yaml\n"
    planned = run_installed(installed, tmp_path, "plan", "--config", "quickstart.yaml")
    assert all(phase in planned for phase in ("00", "01", "02"))
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]


def test_a_new_user_trains_talks_and_takes_the_model_away(
    installed: Path, bases: dict[str, str], data: Path, tmp_path: Path, local_ray: dict[str, str]
) -> None:
    """init, plan, train, chat, export, and plain transformers: each command is the one that the step before it named.

    With questions alone, `init` leaves one phase.
    """
    (tmp_path / "data").mkdir()
    for name in ("mcq", "dev"):
        shutil.copyfile(data / f"{name}.jsonl", tmp_path / "data" / f"{name}.jsonl")
    rows = [json.loads(line) for line in (data / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.dumps({**row, "id": f"t{row['id']}"}, ensure_ascii=False) for row in rows]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(test) + "\n", encoding="utf-8")
    said = run_installed(installed, tmp_path, "init", "gemma", "mine.yaml", "--data", "data")
    assert "data/test.jsonl: 6 records of" in said and "next: medlora plan --config mine.yaml" in said
    settings = [
        f"base.model={bases['gemma']}",
        "base.quantization=none",
        "data.overlap=allow",
        "evaluation.scoring=letter",
    ]
    settings += ["phase_defaults.max_steps=2", "placement.gpus_per_worker=0", "placement.cpus_per_worker=1"]
    settings += ["phases.02.validation=null"]
    chosen = ["--config", "mine.yaml", *(part for setting in settings for part in ("--set", setting))]
    assert "02" in run_installed(installed, tmp_path, "plan", *chosen)
    trained = run_installed(installed, tmp_path, "train", *chosen, "--run-dir", "runs/mine", env=local_ray)
    assert "phase 1 of 1" in trained and "next: medlora export runs/mine:02 out" in trained
    typed = "/mcq\n인슐린 은 어디 에서 나온다?\nA. 췌장\nB. 해열\n\n"
    talked = run_installed(installed, tmp_path, "chat", "runs/mine:02", typed=typed)
    assert re.findall(r"^[* ] ([A-Z]) +[\d.]+%", talked, flags=re.M) == ["A", "B"]
    out = ["out", "--as", "merged", "--dtype", "f32", "--lm-eval", "tasks"]
    exported = run_installed(installed, tmp_path, "export", "runs/mine:02", *out)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = AutoTokenizer.from_pretrained(tmp_path / "out")("text about aspirin", return_tensors="pt").input_ids
    assert model.generate(asked, max_new_tokens=2, do_sample=False).shape[1] > asked.shape[1]
    if importlib.util.find_spec("lm_eval") is None:
        return  # tests/drivers/test_lm_eval_tasks.py skips and says so
    (line,) = [line.strip() for line in exported.splitlines() if line.strip().startswith("lm_eval run ")]
    ask = [sys.executable, "-m", *shlex.split(line), "--device", "cpu"]
    harness = subprocess.run(
        ask, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert harness.returncode == 0, harness.stderr
    compare = ["compare", "runs/mine:02", "answers", "--out", "comparison", "--json"]
    report = json.loads(run_installed(installed, tmp_path, *compare))
    ours, theirs = (row for row in report["stages"] if row["test"] != "all")
    assert (ours["n"], ours["accuracy"]) == (theirs["n"], theirs["accuracy"])
