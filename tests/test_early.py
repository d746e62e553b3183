"""A finished stage is scored on what is free while later phases train, and disturbs nothing: with a stand-in for the model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_stages import FakeStages
from test_evaluate_on_ray import STAGES, ask, journal, score
from test_nodes import add_nodes

from medlora import runs
from medlora.config import ActorPlacement, EvaluationConfig, Placement
from medlora.evaluation import LEDGER, PREDICTIONS, Asked, read_ledger

GPU = Placement(gpus_per_worker=1)


class Training:
    """What a phase takes of the cluster: so many actors of one GPU each."""

    def __init__(self, ray: Any, gpus: int) -> None:
        self.ray = ray
        self.actors = [ray.remote(num_cpus=0, num_gpus=1)(Holder).remote() for _ in range(gpus)]
        ray.get([actor.hold.remote() for actor in self.actors])

    def end(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


class Holder:
    def hold(self) -> None:
        return None


@contextmanager
def scoring(
    folder: Path, cluster: Any, said: list[str], pause_s: float = 0.0, gpus: int = 1, stages: Sequence[str] = ("a",)
) -> Iterator[Any]:
    """Early scoring of stages with 30 questions each, on one actor with a GPU; its journal is `e.journal`."""
    from medlora.on_ray.early import EarlyScoring

    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "unused"}], "batch_size": 4})

    def build(stage: str, chain: Any, placement: ActorPlacement) -> Any:
        return partial(FakeStages, str(folder / "e.journal"), pause_s)

    early = EarlyScoring(
        folder / "scoring",
        config,
        Asked({"t": ask(30)}),
        lambda stage, chain: {"stage": stage},
        build,
        ActorPlacement(gpus_per_worker=gpus, workers=2),
        cluster,
        lambda event: said.append(f"{event['phase']}  {event['text']}"),
        folder / "log",
    )
    for stage in stages:
        early.add(stage, ())
    with early.going_on():
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

    with add_nodes(cluster, ("gpus", "a", "--num-gpus=2")):
        yield _look_around(False)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The predictions of both stages, asked together after the training."""
    folder = tmp_path_factory.mktemp("undisturbed") / "e"
    score(folder, ask(30), ray_cluster, actors=1)
    return (folder / PREDICTIONS).read_bytes()


def test_a_stage_is_scored_on_the_gpu_that_a_phase_leaves_free_and_not_before_it_has_its_own(
    two_gpus: Any, ray_cluster: Any, tmp_path: Path, undisturbed: bytes
) -> None:
    from medlora.on_ray.cluster import ray
    from medlora.on_ray.early import take_over

    said: list[str] = []
    with scoring(tmp_path, two_gpus, said, stages=("a", "b")) as early:
        early.phase_asks(GPU, 1)
        time.sleep(2.5)
        assert not (tmp_path / "e.journal").exists()  # two are free, but the phase has not taken its own yet
        training = Training(ray, 1)
        early.phase_has()
        wait_for(lambda: len(said) == 2)
        training.end()
    assert [line.partition(" in ")[0] for line in said] == [f"{name}  scored beside the training" for name in "ab"]
    assert said[1].endswith(": t 100.0%") and said[0].endswith(": t 33.3%")
    # The evaluation at the end asks nothing of what is known, everything of a stage that has become another.
    known = take_over(tmp_path / "scoring", {"a": {"stage": "a"}, "b": {"stage": "b"}})
    asked = len(journal(tmp_path / "e", "ask"))
    assert asked == 60
    report = score(tmp_path / "e", ask(30), ray_cluster, actors=1, known=known)
    assert report["questions_asked"] == 0 and len(journal(tmp_path / "e", "ask")) == asked
    assert (tmp_path / "e" / PREDICTIONS).read_bytes() == undisturbed
    assert len(take_over(tmp_path / "scoring", {"a": {"stage": "another"}, "b": {"stage": "b"}})) == 30


def test_where_no_gpu_is_free_nothing_is_begun_or_waited_for(two_gpus: Any, ray_cluster: Any, tmp_path: Path) -> None:
    from medlora.on_ray.cluster import ray

    said: list[str] = []
    training = Training(ray, 2)
    with scoring(tmp_path, two_gpus, said) as early:
        early.phase_asks(GPU, 1)
        early.phase_has()
        time.sleep(2.5)
        began = time.monotonic()
    training.end()
    assert time.monotonic() - began < 5 and said == [] and not (tmp_path / "e.journal").exists()


def test_a_phase_that_lacks_room_gets_it_and_the_answers_so_far_are_kept(
    two_gpus: Any, ray_cluster: Any, tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.on_ray import early as module
    from medlora.on_ray.cluster import ray

    monkeypatch.setattr(module, "GRACE_S", 1.0)
    said: list[str] = []
    with scoring(tmp_path, two_gpus, said, pause_s=0.5) as early:
        training = Training(ray, 1)
        early.phase_has()
        wait_for(lambda: count_answers(tmp_path) >= 8)
        training.end()
        early.phase_asks(GPU.model_copy(update={"workers": 2}), 1)
        training = Training(ray, 2)  # waits for room
        early.phase_has()
        known = count_answers(tmp_path)
        assert 8 <= known < 30
        training.end()
        wait_for(lambda: said)  # takes up the rest when there is room again
    assert "a  scored beside the training" in said[0] and count_answers(tmp_path) == 30
    asked = [line[1] for line in journal(tmp_path / "e", "ask")]
    assert len(set(asked)) == 30 and len(asked) <= 30 + 2 * 4 * 2  # what was under way is asked again


def test_a_killed_scoring_is_said_and_what_it_answered_is_taken_over(
    two_gpus: Any, ray_cluster: Any, tmp_path: Path, undisturbed: bytes
) -> None:
    from medlora.on_ray.early import take_over

    said: list[str] = []
    with scoring(tmp_path, two_gpus, said, pause_s=0.3) as early:
        early.phase_has()
        wait_for(lambda: count_answers(tmp_path) >= 8)
        os.kill(runs.read_json(tmp_path / "scoring" / ".a.lock.json")["pid"], signal.SIGKILL)
        wait_for(lambda: said)
    assert said[0].startswith("a  could not be scored beside the training, it is scored after it: ")
    known = take_over(tmp_path / "scoring", {"a": {"stage": "a"}})
    assert 8 <= len(known) < 30
    before = len(journal(tmp_path / "e", "load"))
    report = score(tmp_path / "e", ask(30), ray_cluster, actors=1, known=known)
    assert report["questions_asked"] == 30  # of stage b all, of stage a the rest
    assert (tmp_path / "e" / PREDICTIONS).read_bytes() == undisturbed
    assert len(journal(tmp_path / "e", "load")) == before + 1 and set(STAGES) == {"a", "b"}
