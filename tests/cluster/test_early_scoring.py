"""A finished stage is scored on what is free while later phases train, and disturbs nothing: with a stand-in for the model."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medlora.config.placement import ActorPlacement, Placement
from medlora.evaluation.ledger import LEDGER, PREDICTIONS, read_ledger
from medlora.runs.files import read_json
from tests.support.cluster import add_nodes
from tests.support.fake_stages import FakeStages, answer_here, ask, journal, make_task, score


@contextmanager
def training(gpus: int) -> Iterator[None]:
    """What a phase takes of the cluster, once it is there to be had."""
    from ray.util import placement_group, remove_placement_group

    taken = placement_group([{"GPU": 1, "CPU": 1}] * gpus)
    assert taken.wait(60)
    yield
    remove_placement_group(taken)


@contextmanager
def scoring(
    folder: Path, cluster: Any, said: list[str], pause_s: float = 0.0, gpus: int = 1, stages: Sequence[str] = ("a",)
) -> Iterator[Any]:
    """Early scoring of stages with 30 questions each, on one actor with a GPU; its journal is `e.journal`."""
    from medlora.drivers.early_scoring import EarlyScoring
    from medlora.on_ray.answer_questions import Actors

    def build(task: Any, actors: Any) -> Any:
        return partial(FakeStages, str(folder / "e.journal"), pause_s)

    actors = Actors(
        ActorPlacement(gpus_per_worker=gpus),
        cluster,
        lambda event: said.append(f"{event['phase']}  {event['text']}"),
        folder / "log",
    )
    early = EarlyScoring(folder / "scoring", make_task(ask(30), 2), actors, build)
    for stage in stages:
        early.add(stage, ())
    with early.running():
        yield early


def wait_for(what: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def count_answers(folder: Path, stage: str = "a") -> int:
    return len(read_ledger(folder / "scoring" / stage / LEDGER, [stage]))


@pytest.fixture(scope="module")
def two_gpus(cluster: dict[str, str], ray_cluster: Any) -> Iterator[Any]:
    """The cluster with a node of two GPUs, in words alone."""
    from medlora.on_ray.cluster import _look_around

    with add_nodes(cluster, ("gpus", "a", "--num-gpus=2", "--num-cpus=4")) as (node,):
        yield _look_around(False)
        node.process.terminate()  # it says goodbye, so that it is missed at once
        node.process.wait(timeout=30)
    # Whoever connects next would ask for GPUs that are gone.
    wait_for(lambda: not any(node.gpus for node in _look_around(False).there))


def test_stages_are_scored_on_what_a_phase_leaves_free_and_stand_in_nobodys_way(
    two_gpus: Any, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.drivers import early_scoring as module
    from medlora.drivers.early_scoring import take_over

    monkeypatch.setattr(module, "GRACE_S", 0.5)
    monkeypatch.setattr(module, "POLL_S", 0.25)
    said: list[str] = []
    with scoring(tmp_path, two_gpus, said, pause_s=0.4, stages=("a", "b")) as early:
        early.phase_asks(Placement(gpus_per_worker=1), 1)
        time.sleep(1)
        assert not (tmp_path / "scoring" / ".a.lock.json").exists()  # the phase has not taken its own yet
        with training(2):
            early.phase_has()
            time.sleep(1)
            assert not (tmp_path / "scoring" / ".a.lock.json").exists()  # nothing is free
        with training(1):
            wait_for(lambda: count_answers(tmp_path, "a") >= 8)
        # The next phase wants both: it gets them, and what was answered is kept.
        early.phase_asks(Placement(gpus_per_worker=1, workers=2), 1)
        with training(2):
            assert said == [] and 8 <= count_answers(tmp_path, "a") < 30
            early.phase_has()
        wait_for(lambda: said)
        assert re.fullmatch(r"a  scored beside the training in \d+ s: t 33.3%", said[0])
        # What dies is said; the last evaluation takes over what it has answered.
        wait_for(lambda: count_answers(tmp_path, "b") >= 8)
        os.kill(read_json(tmp_path / "scoring" / ".b.lock.json")["pid"], signal.SIGKILL)
        wait_for(lambda: len(said) == 2)
        assert said[1].startswith("b  could not be scored beside the training, it is scored after it: ")
    asked = journal(tmp_path / "e", "ask")
    assert len({line[1] for line in asked}) == 30 and len(asked) < 60 + 2 * 8  # what was under way is asked again
    assert len(take_over(tmp_path / "scoring", {"a": {"seed": "another"}})) == 0
    task = make_task(ask(30), 2)
    known = take_over(tmp_path / "scoring", {name: task.select(name, ()).fingerprint for name in ("a", "b")})
    left = 60 - len(known)
    report = score(tmp_path / "e", ask(30), ray_cluster, actors=1, known=known)
    assert report["questions_asked"] == left == len(journal(tmp_path / "e", "ask")) - len(asked)
    assert 0 < left <= 22 and (tmp_path / "e" / PREDICTIONS).read_bytes() == answer_here(ask(30), tmp_path)
