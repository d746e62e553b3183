"""Evaluation under faults, on a real cluster with a stand-in for the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medlora.config.placement import ActorPlacement
from medlora.errors import RunError
from medlora.evaluation.ledger import LEDGER, PREDICTIONS, Batch
from medlora.runs.files import read_json_lines
from tests.support import ROOT
from tests.support.fake_stages import answer_here, ask, die_while_loading, journal, raise_while_loading, score


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The predictions of 30 questions that nothing disturbed."""
    return answer_here(ask(30), tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(("n", "size"), [(1, 4), (50, 1)])
def test_two_actors_ask_every_question_once_and_give_the_bytes_of_one_process(
    ray_cluster: Any, tmp_path: Path, n: int, size: int
) -> None:
    report = score(tmp_path / "e", ask(n), ray_cluster, actors=2, size=size)
    assert Counter(line[1] for line in journal(tmp_path / "e", "ask")) == {f"q{i}": 1 for i in range(n)}
    assert [(row["stage"], row["n"], row["correct"]) for row in report["stages"]] == [("a", n, -(-n // 3)), ("b", n, n)]
    assert not (tmp_path / "e" / LEDGER).exists()
    assert (tmp_path / "e" / PREDICTIONS).read_bytes() == answer_here(ask(n), tmp_path)


def test_a_pool_that_grows_loads_a_model_for_each_actor_and_gives_the_same_bytes(
    ray_cluster: Any, tmp_path: Path, undisturbed: bytes
) -> None:
    score(tmp_path / "e", ask(30), ray_cluster, actors=2, pause_s=0.3, size=2, min_actors=1)
    assert 1 <= len(journal(tmp_path / "e", "load")) <= 2
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "e" / PREDICTIONS)
    assert rows.equals(pyarrow.parquet.read_table(pyarrow.BufferReader(undisturbed)))


def test_an_actor_killed_in_the_middle_changes_nothing(ray_cluster: Any, tmp_path: Path, undisturbed: bytes) -> None:
    killed: list[float] = []

    def kill_one() -> None:
        while not (tmp_path / "e.journal").exists() or len(journal(tmp_path / "e", "ask")) < 6:
            time.sleep(0.02)
        os.kill(int(journal(tmp_path / "e", "ask")[-1][2]), signal.SIGKILL)
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill_one)
    killer.start()
    score(tmp_path / "e", ask(30), ray_cluster, actors=2, pause_s=0.2)
    killer.join()
    print(f"actor killed in an evaluation of 30 questions: it ended {time.monotonic() - killed[0]:.0f} s later")
    assert len(journal(tmp_path / "e", "load")) == 3
    assert (tmp_path / "e" / PREDICTIONS).read_bytes() == undisturbed


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_question_that_breaks_the_model_fails_alone(ray_cluster: Any, tmp_path: Path, fault: str) -> None:
    report = score(tmp_path / "e", ask(12, {5: fault}), ray_cluster, actors=1)
    assert [(row["n"], row["failed"]) for row in report["stages"]] == [(12, 1), (12, 1)]
    asked = Counter(line[1] for line in journal(tmp_path / "e", "ask"))
    assert asked["q5"] <= {"raise": 2, "kill": 5}[fault] and all(asked[f"q{i}"] >= 1 for i in range(12))
    import pyarrow.parquet

    errors = {row["id"]: row["error"] for row in pyarrow.parquet.read_table(tmp_path / "e" / PREDICTIONS).to_pylist()}
    assert errors.pop("q5") and not any(errors.values())


DRIVER = """
import sys
from pathlib import Path
import ray
from tests.support import ROOT, fake_stages as t
ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False, logging_level="ERROR")
from medlora.on_ray.cluster import connect
with connect() as cluster:
    t.score(Path(sys.argv[1]), t.ask(30), cluster, int(sys.argv[2]), float(sys.argv[3]))
"""


def test_a_killed_driver_asks_only_what_is_not_answered_and_writes_the_same_bytes(
    cluster: dict[str, str], ray_cluster: Any, tmp_path: Path, undisturbed: bytes
) -> None:
    folder = tmp_path / "e"
    env = {**cluster, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), "2", "0.3"], env=env)
    while len(read_json_lines(folder / LEDGER)) < 3:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    known = {p["id"] for line in read_json_lines(folder / LEDGER) for p in line["predictions"]}
    time.sleep(1.5)  # what the dead driver's actors still do is over
    before, began = len(journal(folder, "ask")), time.monotonic()
    report = score(folder, ask(30), ray_cluster, actors=1)
    print(
        f"driver killed with {len(known)} of 30 answered: another answered the rest in {time.monotonic() - began:.0f} s"
    )
    again = {line[1] for line in journal(folder, "ask")[before:]}
    assert 12 <= len(known) < 30 and again == {f"q{i}" for i in range(30)} - known
    assert report["questions_asked"] == 30 - len(known)
    assert (folder / PREDICTIONS).read_bytes() == undisturbed


def test_actors_that_cannot_load_the_model_end_the_evaluation(ray_cluster: Any, tmp_path: Path) -> None:
    from medlora.on_ray.answer_questions import Actors, answer_on_ray

    batches = [Batch((("t", record),), ("a",)) for record in ask(2)]
    actors = Actors(ActorPlacement(), ray_cluster, lambda event: None, tmp_path / "log")
    with pytest.raises(RunError, match="evaluation: RuntimeError: the processes that load the model keep dying"):
        list(answer_on_ray(batches, die_while_loading, actors))


def test_an_exception_of_the_load_is_raised_once_and_named(ray_cluster: Any, tmp_path: Path) -> None:
    from medlora.on_ray.answer_questions import Actors, answer_on_ray

    batches = [Batch((("t", record),), ("a",)) for record in ask(2)]
    build = partial(raise_while_loading, str(tmp_path / "e.journal"))
    actors = Actors(ActorPlacement(), ray_cluster, lambda event: None, tmp_path / "log")
    with pytest.raises(RunError) as raised:
        list(answer_on_ray(batches, build, actors))
    said = str(raised.value)
    assert said.startswith("evaluation: ValueError: no such layer (on ") and "\n" not in said
    assert len(journal(tmp_path / "e", "load")) == 1
