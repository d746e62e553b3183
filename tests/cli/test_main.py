"""The command `medlora`: its map, its doors, its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medlora import __version__
from medlora.cli.main import COMMANDS, main
from tests.support import ROOT


def run(*argv: str, module: str = "medlora") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *argv], cwd=ROOT, capture_output=True, text=True)


def test_help_is_a_map_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"medlora {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"medlora {__version__}\n"


def test_help_imports_nothing_slow() -> None:
    code = "import sys; from medlora.cli.main import main; main(['--help'])\n"
    code += "print(sorted({'torch', 'ray', 'pydantic', 'yaml', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_command_that_does_not_exist_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "medlora: trian: no such command; did you mean train?\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"usage: medlora {command}" in done.stdout, done.stderr
    ours, cluster = done.stdout.find(f"\nmedlora {command}"), done.stdout.find("\nray job submit")
    assert command not in ("train", "evaluate", "sweep") or 0 < ours < cluster


def test_a_wrong_input_is_one_message_with_code_2(tmp_path: Path) -> None:
    done = run("train", "--config", str(tmp_path / "absent.yaml"))
    assert done.returncode == 2 and done.stderr.startswith("medlora: ") and "Traceback" not in done.stderr
    done = run("export", "runs/x", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (2, "medlora: runs/x: write RUN:STAGE, e.g. runs/quickstart:02\n")
    done = run(str(tmp_path / "absent.csv"), "--out", str(tmp_path / "out"), module="medlora.compare")
    assert done.returncode == 2 and "absent.csv" in done.stderr
