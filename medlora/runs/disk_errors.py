"""Errors of the disk and of the operating system, recognised in one place and explained in one message.

Python, torch, safetensors, pyarrow and Ray each report a full disk in words of their own. `explain` knows them all. It is
called where an exception leaves a process: at the end of a job, of a phase, of a trial, of an actor's start.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medlora.errors import InputError

_DENIED = ("access is denied", "give this user the right to read and write there, or use another folder")


_LOST = ("the network mount does not answer", "mount it again")


_KNOWN: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room or ask for a larger quota"),
    errno.EFBIG: ("the file has reached the largest size that is allowed", "raise the limit (ulimit -f)"),
    errno.EIO: ("the disk reported an input/output error", "check the disk or the mount"),
    errno.EROFS: ("the file system is read-only", "mount it for writing or use another folder"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("this machine has too many files open", "end other programs or raise the limit (fs.file-max)"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ESTALE: _LOST,
    errno.ENOTCONN: _LOST,
    errno.ENOLCK: ("the file system has no locks left", "mount it with locks or use another folder"),
    errno.ENOSYS: ("the file system has no locks", "mount it with locks or use another folder"),
}


_TORN_WRITE = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error|basic_ios::clear|file write failed"
    r"|failed finding central directory|short write"
)
"""How torch reports that a file could not be written; it does not report why."""


LEAST_OPEN_FILES = 512
"""Ray's own libraries end the process where they cannot open files."""


SAFE = "What was finished is whole, and the same command resumes from it"


def explain(error: BaseException, folder: Path | None = None) -> InputError | None:
    """The message for an error of the disk, of access, or of too many open files; None for every other error.

    It also looks at what caused the error, in Ray's wrappers too. `folder` is named where the error names no path.
    """
    for cause in sorted(_list_causes(error), key=_rank):
        code = _find_code(cause)
        if code is not None:
            what, advice = _KNOWN[code]
        elif _TORN_WRITE.search(str(cause)):
            what, advice = _KNOWN[errno.ENOSPC] if _is_full(folder) else ("a file could not be written", "make room")
        else:
            continue
        path = _find_path(cause)
        if path is None or (folder is not None and not os.path.isabs(path)):
            path = folder  # shutil.rmtree names files relative to their folder
        place = f"{os.fspath(path)}: " if path is not None else ""
        return InputError(f"{place}{what}; {advice} and give the same command again. {SAFE}")
    return None


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Raise the errors that `explain` knows as InputError; all others pass as they are."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = explain(error, folder)
        if found is None:
            raise
        raise found from error


def check_open_files() -> None:
    """Raise the soft limit of open files to the hard one where it is low; InputError where that is not enough for Ray."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
            raise InputError(
                f"a process may open {hard} files here, and {LEAST_OPEN_FILES} are needed; raise the limit "
                f"(ulimit -n {LEAST_OPEN_FILES}) and give the same command again"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (LEAST_OPEN_FILES, hard))


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it: Python's own chain, and what Ray's exceptions hold."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen or isinstance(each, InputError):
            continue
        seen.add(id(each))
        yield each
        failures = getattr(each, "worker_failures", None)
        found = [
            each.__cause__,
            getattr(each, "cause", None),
            *(failures.values() if isinstance(failures, dict) else ()),
        ]
        if not each.__suppress_context__:
            found.append(each.__context__)
        waiting += [cause for cause in found if isinstance(cause, BaseException)]


def _rank(error: BaseException) -> int:
    """Errors that name their path first, then those with a number, then those that have words alone."""
    numbered = isinstance(error, OSError) and error.errno in _KNOWN
    return 0 if numbered and _find_path(error) else 1 if numbered else 2


def _find_path(error: BaseException) -> str | os.PathLike[str] | None:
    named = getattr(error, "filename", None)
    return named if isinstance(named, str | os.PathLike) else None


def _find_code(error: BaseException) -> int | None:
    """The error's number, from itself or from its text (Rust writes `os error 28`, pyarrow `[errno 28]`)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _KNOWN else None
    text = str(error)
    if isinstance(error, NotImplementedError) and "flock" in text:
        return errno.ENOSYS
    if type(error).__module__ == "builtins" and not isinstance(error, OSError | RuntimeError):
        return None  # a ValueError or KeyError may quote anything
    for code in _KNOWN:
        if code not in (errno.ENOSYS, errno.EPERM) and re.search(
            rf"{re.escape(os.strerror(code))}|(os error|errno:?|code:) {code}\b", text, re.I
        ):
            return code
    return None


def _is_full(folder: Path | None) -> bool:
    try:
        return folder is not None and shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False
