"""What actors computed with, from their reports to the predictions' metadata; no Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet
import pytest

from medlora import events
from medlora.config.placement import ActorPlacement
from medlora.drivers import evaluation
from medlora.evaluation.ledger import PREDICTIONS
from medlora.evaluation.predictions import Prediction, read_predictions
from medlora.on_ray.answer_questions import Actors
from tests.support.fake_stages import FakeStages, ask, make_task

WEIGHTS = "nf4 weights, dequantized once to bfloat16"


def score(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str, most: int = 100) -> None:
    """An evaluation of 9 questions by a fake that answers in this process, at most so many batches."""
    folder.mkdir(exist_ok=True)
    model = FakeStages(str(folder.parent / "journal"))

    def answer(batches: Any, build: Any, actors: Any) -> Iterator[list[Prediction]]:
        if weights:
            actors.on_event(events.note("evaluation", weights, kind="weights"))
        for batch in batches[:most]:
            questions = batch.questions
            actors.on_event(events.answered(len(questions), 2.0))
            yield model.answer([test for test, _ in questions], [record for _, record in questions], batch.stages)
        if most < len(batches):
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "answer_on_ray", answer)
    placement = ActorPlacement(gpus_per_worker=0)
    actors = Actors(placement, cast(Any, None), lambda event: None, folder / "run.log")
    report = evaluation.score_stages(make_task(ask(9), 2), folder, cast(Any, None), actors, {})
    # The first batch took an actor 2 s, and the others were handed over at once.
    assert report["questions_per_s"] == pytest.approx(report["questions_asked"] / 2, rel=0.1)


def read_metadata(folder: Path) -> dict[bytes, bytes]:
    found = pyarrow.parquet.read_schema(folder / PREDICTIONS).metadata or {}
    return {key: value for key, value in found.items() if key == b"weights"}


def test_what_was_computed_with_stands_in_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        score(tmp_path / "a", monkeypatch, WEIGHTS)
    assert read_metadata(tmp_path / "a") == {b"weights": WEIGHTS.encode()}
    assert "the first answers came after" in caplog.text
    score(tmp_path / "b", monkeypatch, "")
    assert read_metadata(tmp_path / "b") == {}
    assert read_predictions(tmp_path / "a" / PREDICTIONS) == read_predictions(tmp_path / "b" / PREDICTIONS)


def test_a_driver_that_goes_on_remembers_what_the_first_one_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "a", monkeypatch, WEIGHTS, most=2)
    score(tmp_path / "a", monkeypatch, "")
    assert read_metadata(tmp_path / "a") == {b"weights": WEIGHTS.encode()}
