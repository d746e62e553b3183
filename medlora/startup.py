"""The first things that a process does: a worker goes where its driver is, and the imports are made without the collector."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def enter_folder(cwd: str) -> None:
    """Make a worker's process work where the driver does, since sources are named relative to there; nothing where that is not seen."""
    if Path(cwd).is_dir():
        os.chdir(cwd)


@contextmanager
def importing() -> Iterator[None]:
    """Import torch, transformers and PEFT without the garbage collector, and keep it from what is there afterwards.

    Imports make many objects that stay, and the collector goes through them again and again: 1.0 of the 5.6 CPU seconds of
    `import medlora.training.phase` were its own. Each later collection would take another third of a second.
    """
    # A process that trains one trial after another has imported all: what a trial has left must still be collected.
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
