"""A driver dies between two requests to a store, and another machine takes the run up: the smallest part of the campaign."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_deaths import try_moments

from tests.support.store_server import Store
from tests.support.tiny_run import configure


def test_another_machine_takes_up_a_run_whose_driver_died_between_two_requests(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(bases["gemma"], data, p00={"max_steps": 2, "checkpoint_every_steps": 1})
    config = config.model_copy(update={"phases": config.phases[:1]})
    server = Store(tmp_path)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    try:
        row = try_moments(config, server, tmp_path, moments=1)
    finally:
        server.close()
    assert row.wrong == [] and row.tried == 1
