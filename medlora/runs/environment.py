"""Log files, installed versions and the git commit of a run."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

_VERSIONED = ("medlora", "ray", "torch", "transformers", "peft", "bitsandbytes", "datasets", "pyarrow", "accelerate")


class _LogFile(logging.FileHandler):
    """Raises what it cannot write; logging's own handler prints a traceback and continues with a gap in the log."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        error.filename = error.filename or self.baseFilename
        raise error


@contextmanager
def log_to(*sinks: tuple[logging.Logger, Path]) -> Iterator[None]:
    """Within this context, append what each logger logs to its file."""
    with ExitStack() as opened:
        for logger, path in sinks:
            handler = _LogFile(path, encoding="utf-8")
            opened.callback(handler.close)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
            opened.callback(logger.removeHandler, handler)
        yield


def get_versions() -> dict[str, str]:
    """Versions of Python and of medlora's dependencies, without importing them."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def get_git_commit() -> str | None:
    """The commit of the working folder with `+changes` when dirty; None outside a checkout or without git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
