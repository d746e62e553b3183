"""What several commands need: the configs that come with medlora, reports as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import medlora


def find_config(name: str) -> Path:
    """A config that comes with medlora: in a wheel inside the package, in a checkout beside it."""
    package = Path(medlora.__file__).resolve().parent
    inside = package / "configs" / name
    return inside if inside.is_file() else package.parent / "configs" / name


@contextmanager
def text_to_stderr(wanted: bool) -> Iterator[None]:
    """Print to stderr while inside, so that stdout is left to a report as JSON."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(report: object) -> None:
    """A report as JSON, for programs."""
    print(json.dumps(report, indent=2, ensure_ascii=False))
