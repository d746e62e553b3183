"""A base model's folder: found or downloaded; load errors as one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from medlora.artifacts.bases import find_base
from medlora.config.model import BaseModelConfig
from medlora.errors import InputError


def find_local_folder(base: BaseModelConfig, weights: bool = False) -> str:
    """The base as a folder here, downloaded (or found in the hub's cache) when it is a hub id."""
    where = find_base(base)
    if Path(where).is_dir():
        return where
    files = ["*.json", "*.jinja", "*.model", "*.txt"]
    files += ["*.safetensors"] if weights else []
    files += ["*.py"] if base.trust_remote_code else []
    try:
        # One request without retries shows whether there is a hub; transformers alone would try for most of a minute.
        return str(snapshot_download(base.model, revision=base.revision, allow_patterns=files, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise InputError(
            f"base.model: {base.model} is no folder here, and the hub does not give it (no connection, unknown or "
            f"gated): download it elsewhere with `hf download` and set base.model to its folder [{_reason(error)}]"
        ) from error


def _reason(error: Exception) -> str:
    if "custom code" in str(error):
        return (
            "it brings code of its own, which base.trust_remote_code: true runs; set it only where you trust its author"
        )
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def explain_load_errors(what: str) -> Iterator[None]:
    """Turn what the libraries raise about unusable files into one InputError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{what}: cannot be loaded: {_reason(error)}") from error


@contextmanager
def load_quietly() -> Iterator[None]:
    """Loading without progress bars and advice; what goes wrong is raised, not logged."""
    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
