"""medlora: turn a general LLM into a Korean medical one with LoRA, on as many GPUs as you have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from medlora.evaluation.results import Results

__version__ = "0.2.0"


def load_results(folder: str | Path) -> Results:
    """What a run, an evaluation or a sweep has written, as pandas frames; see `medlora.evaluation.results`."""
    from medlora.evaluation.results import load_results as load

    return load(folder)
