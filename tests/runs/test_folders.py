from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medlora.errors import InputError
from medlora.runs.files import append_json, read_json_lines, set_aside, truncate_json_lines, write_json
from medlora.runs.folders import RunFolder, find_home, open_run
from medlora.runs.locks import hold_file_lock
from medlora.runs.manifests import MANIFEST, check_files, commit, find_differences, read_manifest


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "a;b", "$x", "`x`", "a\nb", "-rf", "x" * 65])
def test_a_name_that_could_leave_its_folder_or_reach_a_shell_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        RunFolder(tmp_path).phase(name)


@pytest.mark.parametrize("path", ["runs/../../etc", "runs/$(rm)", "runs/a;b", "runs/`x`", "runs/a|b", "runs/a\nb"])
def test_a_run_folder_stays_where_it_is_named(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give a plain path"):
        open_run(Path(path))
    assert not any(tmp_path.iterdir())


def test_a_folder_of_others_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(InputError, match=r"holds other files \(thesis.doc\)"):
        open_run(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "thesis.doc")


def test_a_full_disk_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10 * 2**20})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="the disk is full"):
        open_run(tmp_path / "run")


def test_a_manifest_tells_every_change_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.bin").write_bytes(b"1")
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "x").write_bytes(b"2")
    assert read_manifest(tmp_path) is None
    manifest = commit(tmp_path, {"n": 1}, exclude=(tmp_path / "going",))
    assert list(manifest["files"]) == ["a/w.bin"] and read_manifest(tmp_path) == manifest
    assert check_files(tmp_path, manifest) is None
    (tmp_path / "a" / "w.bin").write_bytes(b"2")
    assert check_files(tmp_path, manifest) == "a/w.bin has changed"
    (tmp_path / "a" / "w.bin").unlink()
    assert check_files(tmp_path, manifest) == "a/w.bin is missing"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"n": 1}'])
def test_a_torn_manifest_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert read_manifest(tmp_path) is None


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"n": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


HOLDER = "import sys, time; from pathlib import Path; from medlora.runs.locks import hold_file_lock\nwith hold_file_lock(Path(sys.argv[1]), 'run x'): print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_naming_the_holder_until_that_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"run x is in use by process {holder.pid} on "),
            hold_file_lock(lock, "run x"),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    with hold_file_lock(lock, "run x", wait_s=5):
        assert time.monotonic() - started < 5


def test_differences_are_named_by_their_dotted_key() -> None:
    was = {"phases.01": {"learning_rate": 1e-4, "sources": [{"source": "a"}]}, "seed": 0, "same": [1, 2]}
    now = {"phases.01": {"learning_rate": 2e-4, "sources": [{"source": "b"}]}, "seed": 0, "same": [1, 2], "new": True}
    assert find_differences(was, now) == [
        "phases.01.learning_rate: was 0.0001, now 0.0002",
        'phases.01.sources.0.source: was "a", now "b"',
        "new: was null, now true",
    ]
    assert find_differences(was, json.loads(json.dumps(was))) == []


def test_what_is_set_aside_is_kept_each_time(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / "01").mkdir()
        (tmp_path / "01" / "f").write_text(str(n))
        set_aside(tmp_path / "01")
    kept = sorted((tmp_path / ".replaced").rglob("f"))
    assert [p.read_text() for p in kept] == ["1", "2"] and not (tmp_path / "01").exists()
    assert set_aside(tmp_path / "01") is None


def test_lines_after_a_resumed_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for step in (1, 2, 3):
        append_json(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4')
    truncate_json_lines(path, lambda row: row["step"] <= 2)
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}] and path.read_text().count("\n") == 2


def test_a_submitted_job_keeps_its_runs_out_of_ray_s_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_home(Path("runs")) == tmp_path / "home" / "medlora" / "runs"
    assert find_home(Path("/shared/runs")) == Path("/shared/runs")
    monkeypatch.chdir(tmp_path)
    assert find_home(Path("runs")) == Path("runs")
