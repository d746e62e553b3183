"""The start of a process."""

from __future__ import annotations

import gc
import sys

import pytest

from medlora.startup import importing


def test_the_collector_waits_for_the_imports_and_leaves_what_they_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > before


def test_what_a_process_has_made_since_its_imports_is_still_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("what a trial has left would stay"))
    with importing():
        assert gc.isenabled()
