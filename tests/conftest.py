"""Shared fixtures; whatever needs torch or Ray imports it inside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REAL_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test material; the test skips where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real test material (../shared/data) is not here")
    return REAL_DATA


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random base models, a folder per family of tests/tiny.py."""
    import torch
    from tiny import build_bases

    torch.set_num_threads(1)
    return build_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data of tests/tiny_run.py."""
    from tiny_run import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three phases on the tiny Gemma, without Ray."""
    from tiny_run import configure, run_all

    folder = tmp_path_factory.mktemp("finished")
    run_all(configure(bases["gemma"], data), folder)
    return folder
