"""The embedded default: a tiny base model and a small Korean medical corpus, both made here in a few minutes."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from medlora import prompts


def fingerprint() -> str:
    """A hash of what a built miniature depends on besides the seed: this package's code and data, prompts, versions.

    Needs no torch, so that a driver can tell whether a finished run still stands.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(f"{prompts.version()} {metadata.version('torch')} {metadata.version('transformers')}".encode())
    return digest.hexdigest()[:12]
