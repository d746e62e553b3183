"""`medlora plan --cluster` asks the cluster whether it has room, and starts nothing on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medlora.cli.starting.plan import main
from medlora.errors import InputError
from tests.support.cli import QUESTION, write_run
from tests.support.cluster import import_ray

import_ray()
from medlora.on_ray import cluster as cluster_module  # noqa: E402
from medlora.on_ray.cluster import Cluster, Node  # noqa: E402


def stand_in(monkeypatch: pytest.MonkeyPatch, *nodes: Node) -> None:
    @contextmanager
    def connect() -> Iterator[Cluster]:
        yield Cluster(nodes)

    monkeypatch.setattr(cluster_module, "connect", connect)


def test_a_cluster_with_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, Node(8, 2, ("H100",), {}))
    assert main([str(write_run(tmp_path, [QUESTION])), "--cluster"]) == 0
    assert "1 node, 8 CPUs, 2 GPUs (H100), which has room for every phase" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_a_cluster_without_room_is_refused_with_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Node(1, 0, (), {}))
    config = write_run(tmp_path, [QUESTION], placement={"cpus_per_worker": 4})
    with pytest.raises(InputError, match="placement"):
        main([str(config), "--cluster"])
