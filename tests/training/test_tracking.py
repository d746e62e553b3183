"""`report_to`: losses in TensorBoard files, the same adapter, no change of fingerprints, trackers that fail or are missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from medlora.config.run import RunConfig
from medlora.curriculum.checks import check_inputs
from medlora.curriculum.jobs import make_job
from medlora.curriculum.tracking import Tracking, check_trackers
from medlora.errors import InputError


def configure(bases: dict[str, str], data: Path, *report_to: str) -> RunConfig:
    from tests.support.tiny_run import configure as make

    return make(bases["gemma"], data).model_copy(update={"report_to": report_to})


def test_losses_are_in_tensorboard_and_the_adapter_is_the_same(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    from tensorboardX.proto.event_pb2 import Event

    from tests.support.tiny_run import run_all, weights

    config = configure(bases, data, "tensorboard")
    run_all(config, tmp_path, ("00",))
    assert weights(tmp_path, "00") == weights(finished, "00")
    (file,) = (tmp_path / "tracking" / "tensorboard" / "tiny-00").glob("events*")
    tags, content = set(), file.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        tags |= {value.tag for value in Event.FromString(content[12 : 12 + size]).summary.value}
        content = content[16 + size :]
    assert "train/loss" in tags and "train/learning_rate" in tags
    assert not any("tensorboard" in path.name for path in (tmp_path / "phases").rglob("*"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_the_key_is_no_part_of_a_fingerprint_and_absent_from_dumps(bases: dict[str, str], data: Path) -> None:
    plain, tracked = configure(bases, data), configure(bases, data, "tensorboard")
    jobs = [make_job(config, config.phases[0], ()) for config in (plain, tracked)]
    assert jobs[0].fingerprint == jobs[1].fingerprint and jobs[1].report_to == ("tensorboard",)
    assert "report_to" not in plain.model_dump(mode="json") and "report_to" not in plain.model_dump_json()
    assert RunConfig.model_validate(tracked.model_dump(mode="json")) == tracked


@pytest.mark.parametrize("tracker", ["mlflow", "wandb", "tensorboard"])
def test_a_package_that_is_missing_is_refused_first(
    tracker: str, bases: dict[str, str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (tracker, "tensorboardX") if tracker == "tensorboard" else (tracker,):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=f"report_to: {tracker} is not installed here; pip install {tracker}, or remove"
    ):
        check_inputs(configure(bases, data, tracker))


def test_wandb_is_offline_without_a_key_and_is_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finished = []
    wandb: Any = ModuleType("wandb")
    wandb.finish = lambda: finished.append(os.environ.get("WANDB_MODE"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    tracking = Tracking(("wandb",), "mine", tmp_path / "tracking")
    with tracking.open(tracking.name_run("00", "normal")):
        assert os.environ["WANDB_DIR"] == str(tmp_path / "tracking") and (tmp_path / "tracking").is_dir()
    assert finished == ["offline"] and "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    with tracking.open("mine-00"):
        assert os.environ["WANDB_PROJECT"] == "theirs" and "WANDB_MODE" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "theirs"


def test_runs_are_named_by_phase_and_segment() -> None:
    tracking = Tracking(("mlflow",), "mine")
    assert [tracking.name_run("02", name) for name in ("full", "normal")] == ["mine-02-full", "mine-02"]
    check_trackers(())


def test_a_tracker_that_fails_is_reported_once_and_training_goes_on() -> None:
    from medlora.training.callbacks import TrackerGuard

    class MLflowCallback:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_log(self, *_: Any, **options: Any) -> None:
            self.heard.append(options["logs"])
            if len(self.heard) > 1:
                raise ConnectionError("the server is gone\nand more")

    events: list[dict[str, Any]] = []
    tracker: Any = MLflowCallback()
    guard = TrackerGuard(tracker, "00", events.append)
    for i in range(4):
        guard.on_log(None, None, None, logs=str(i))
    assert tracker.heard == ["0", "1"]
    (event,) = events
    assert event["text"] == "MLflow fails and is not reported to any more: the server is gone"


def test_an_unknown_tracker_is_refused(bases: dict[str, str], data: Path) -> None:
    plain = configure(bases, data).model_dump(mode="json")
    with pytest.raises(ValueError, match="report_to"):
        RunConfig.model_validate(plain | {"report_to": ["comet"]})
