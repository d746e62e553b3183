"""Errors of the disk in the words of every library: one message with the path and what is safe."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medlora.errors import InputError
from medlora.runs.disk_errors import SAFE, explain, explaining
from medlora.runs.environment import log_to
from medlora.runs.folders import open_run
from medlora.runs.locks import hold_file_lock
from tests.support import ROOT


class SafetensorError(Exception):
    """As safetensors raises it; the class itself is not a builtin either."""


class WorkerGroupError(Exception):
    """As Ray Train raises it."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        self.worker_failures = failures


def _chained(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device", "/run/x")
KNOWN = [
    (FULL, "/run/x: the disk is full; make room"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/run/x"), "/run/x: the disk quota is used up"),
    (OSError(errno.EIO, os.strerror(errno.EIO)), "/folder: the disk reported an input/output error"),
    (OSError(errno.EROFS, os.strerror(errno.EROFS), "/run/x"), "/run/x: the file system is read-only"),
    (PermissionError(errno.EACCES, "Permission denied", "/run/x"), "/run/x: access is denied"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/run/x"), "/run/x: this process has too many files open"),
    (OSError(errno.ENFILE, os.strerror(errno.ENFILE), "/run/x"), "/run/x: this machine has too many files open"),
    (
        SafetensorError(
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'
        ),
        "/folder: the disk is full",
    ),
    (SafetensorError("I/O error: Input/output error (os error 5)"), "/folder: the disk reported"),
    (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "/folder: the disk is full"),
    (
        RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"),
        "/folder: a file",
    ),
    (RuntimeError("unexpected pos 64 vs 0"), "/folder: a file could not be written"),
    (NotImplementedError("FileSystem does not appear to support flock"), "/folder: the file system has no locks"),
    (_chained(RuntimeError("in a task"), FULL), "/run/x: the disk is full"),
    (WorkerGroupError({0: FULL}), "/run/x: the disk is full"),
]


@pytest.mark.parametrize("number", range(len(KNOWN)))
def test_every_library_s_words_are_known(number: int) -> None:
    error, said = KNOWN[number]
    found = explain(error, Path("/folder"))
    assert found is not None and str(found).startswith(said) and SAFE in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the text 'No space left on device' stands in a record"),
        KeyError("Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (28x5)"),
        InputError("Input/output error"),
    ],
)
def test_what_is_no_error_of_the_disk_passes_as_it_is(error: Exception) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)) as raised, explaining(Path("/folder")):
        raise error
    assert raised.value is error


def test_whoever_holds_a_lock_gets_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the disk is full"), hold_file_lock(tmp_path / "lock", "run x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with hold_file_lock(tmp_path / "lock", "run x"):  # and the lock is free again
        pass


def test_a_log_that_cannot_be_written_raises_instead_of_a_traceback_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("medlora.test-full")
    with pytest.raises(OSError) as raised, log_to((logger, Path("/dev/full"))):
        logger.info("a line")
    assert raised.value.errno == errno.ENOSPC and "/dev/full" in str(explain(raised.value))
    assert capfd.readouterr().err == "" and logger.handlers == []


LIMITED = """
import resource, signal, sys
sys.argv = ["curriculum.py", "--config", sys.argv[1], "--run-dir", sys.argv[2]]
from medlora.cli.train import main
from medlora.endings import run_job
kind, limit = {kind}, {limit}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(kind, (limit, limit))
sys.exit(run_job(main))
"""


def _run_limited(tmp_path: Path, kind: str, limit: int) -> subprocess.CompletedProcess[str]:
    code = LIMITED.format(kind=f"resource.{kind}", limit=limit)
    command = [sys.executable, "-B", "-c", code, str(ROOT / "configs" / "quickstart.yaml"), str(tmp_path / "run")]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("kind", "limit", "said"), [("RLIMIT_FSIZE", 16, "largest size"), ("RLIMIT_NOFILE", 40, "may open 40 files here")]
)
def test_a_driver_that_reaches_a_real_limit_says_so_in_one_line(
    tmp_path: Path, kind: str, limit: int, said: str
) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64 and signal.SIGXFSZ
    ended = _run_limited(tmp_path, kind, limit)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert said in ended.stderr and ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr


def test_a_run_folder_on_a_read_only_mount_is_one_message(tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    try:
        open_run(place / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(InputError, match="cannot be written .a read-only mount"):
            open_run(place / "run")
        with pytest.raises(InputError, match="Read-only file system"):
            open_run(place / "other")
        with (
            pytest.raises(InputError, match="the file system is read-only"),
            hold_file_lock(place / "run" / "lock", "run x"),
        ):
            pass
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
