"""What fits a cluster is decided node by node, with what its autoscaler may add; a wait is spoken of."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from medlora.config.placement import Placement
from medlora.errors import InputError
from tests.support import ROOT
from tests.support.cluster import import_ray

import_ray()
from medlora.on_ray import placement as placement_module  # noqa: E402
from medlora.on_ray.cluster import (  # noqa: E402
    Cluster,
    Node,
    _look_around,  # noqa: E402
    find_addable,
)
from medlora.on_ray.placement import check_placement, count_gpus, count_room, report_while_waiting  # noqa: E402


def node(cpus: float = 4, gpus: float = 0, kind: str = "", **labels: str) -> Node:
    return Node(cpus, gpus, (kind,) if kind else (), labels)


@pytest.mark.parametrize(
    ("asked", "nodes"),
    [
        ({"cpus_per_worker": 4}, [node()]),
        ({"cpus_per_worker": 2, "workers": 4}, [node(), node()]),
        ({"cpus_per_worker": 3, "workers": 3}, [node(6), node(5)]),
        ({"gpus_per_worker": 1, "workers": 3}, [node(8, 2), node(8, 1)]),
        ({"gpus_per_worker": 0.25, "workers": 4}, [node(8, 1)]),
        ({"gpus_per_worker": 0.4, "workers": 4}, [node(8, 2)]),
        ({"accelerator_type": "L4"}, [node(8, 1, "H200"), node(8, 1, "L4")]),
        ({"label_selector": {"pool": "big"}}, [node(), node(pool="big")]),
        ({"label_selector": {"pool": "in(big, huge)"}}, [node(pool="huge")]),
        ({"label_selector": {"market": "!spot"}}, [node(market="spot"), node(market="on-demand")]),
    ],
)
def test_what_fits_is_accepted(asked: dict[str, Any], nodes: list[Node]) -> None:
    check_placement(Placement.model_validate(asked), Cluster(tuple(nodes)), "placement")


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        # The sums would do; no node would.
        ({"cpus_per_worker": 8}, [node(), node()], "room for 0: 1 x 4 CPUs, 0 GPUs; 1 x 4 CPUs, 0 GPUs"),
        ({"cpus_per_worker": 3, "workers": 3}, [node(5), node(5)], "node by node there is room for 2"),
        ({"gpus_per_worker": 2}, [node(8, 1), node(8, 1)], "each with 1 CPU and 2 GPU, asked"),
        ({"gpus_per_worker": 0.6, "workers": 3}, [node(8, 2)], "room for 2"),
        ({"gpus_per_worker": 1, "cpus_per_worker": 4}, [node(2, 1), node(16)], "room for 0"),
        ({"accelerator_type": "L4", "workers": 2, "gpus_per_worker": 1}, [node(8, 1, "L4"), node(8, 1, "H200")], "of type L4"),
        ({"label_selector": {"pool": "big"}, "workers": 5}, [node(pool="big"), node()], "on a node with pool=big"),
        ({"gpus_per_worker": 1}, [node()], "placement: 1 workers x 1 GPUs = 1 GPUs asked; the cluster has 1 node, 4 CPUs"),
        ({"workers": 6}, [node()], "the cluster has 1 node, 4 CPUs, 0 GPUs; lower placement.workers to 4, or add nodes"),
        ({"workers": 3, "cpus_per_worker": 2}, [node()], "4 CPUs, 0 GPUs; lower placement.cpus_per_worker to 1, or add nodes"),
        ({"workers": 6, "cpus_per_worker": 2}, [node()], "4 CPUs, 0 GPUs; lower placement.workers to 2, or add nodes"),
        ({}, [node(0)], "1 node, 0 CPUs, 0 GPUs; add nodes"),
        ({"workers": 6}, [node()], "the cluster has 1 node, 4 CPUs, 0 GPUs; lower placement.workers to 4, or add nodes"),
        ({"workers": 3, "cpus_per_worker": 2}, [node()], "4 CPUs, 0 GPUs; lower placement.cpus_per_worker to 1, or add nodes"),
        ({"workers": 6, "cpus_per_worker": 2}, [node()], "4 CPUs, 0 GPUs; lower placement.workers to 2, or add nodes"),
        ({}, [node(0)], "1 node, 0 CPUs, 0 GPUs; add nodes"),
        ({"accelerator_type": "L4"}, [node(8, 1, "H200")], "'L4' is not there; the cluster has 1 node, 8 CPUs, 1 GPUs (H200)"),
        ({"label_selector": {"zone": "moon"}}, [node(zone="earth")], "no node has {'zone': 'moon'}; the nodes have"),
    ],
)  # fmt: skip
def test_what_never_fits_is_refused_with_what_the_cluster_has(
    asked: dict[str, Any], nodes: list[Node], said: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_placement(Placement.model_validate(asked), Cluster(tuple(nodes)), "placement")
    assert said in str(refused.value)


def prepared() -> dict[str, Any]:
    """cluster.yaml as its head gets it."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")))
    return config


def test_what_the_autoscaler_may_add_counts() -> None:
    head = node(0, pool="head")
    grown = Cluster((head,), find_addable(prepared(), [head]))
    assert str(grown).startswith(
        "1 node, 0 CPUs, 0 GPUs; its autoscaler may add 4 x [16 CPUs, 1 GPUs (L4), market=on-demand pool=l4]"
    )
    assert count_gpus(Placement(), grown) == 1
    check_placement(Placement(workers=4, gpus_per_worker=1, accelerator_type="L40S"), grown, "placement")
    with pytest.raises(InputError, match="room for 4"):
        check_placement(Placement(workers=5, gpus_per_worker=1, accelerator_type="L40S"), grown, "placement")
    with pytest.raises(InputError, match="'H200' is not there"):
        check_placement(Placement(accelerator_type="H200"), grown, "placement")


def test_nodes_that_are_there_are_not_counted_twice() -> None:
    there = [node(0, pool="head"), *[node(16, 1, "L4", pool="l4", market="on-demand")] * 3]
    addable = dict((kind.labels["pool"], count) for kind, count in find_addable(prepared(), there))
    assert addable == {"l4": 1, "l40s": 4}
    full = [*there, *[node(16, 1, "L40S", pool="l40s", market="on-demand")] * 4]
    assert [count for _, count in find_addable(prepared(), full)] == [1]  # max_workers: 8


def test_where_an_autoscaler_hides_its_limits_nothing_is_refused() -> None:
    check_placement(Placement(gpus_per_worker=8), Cluster((node(),), grows_unseen=True), "placement")


def test_the_drivers_view_of_a_launched_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    alive = [{"Alive": True, "Resources": {"CPU": 0.0}, "Labels": {"pool": "head"}}, {"Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    assert _look_around(False) == Cluster((node(0, pool="head"),))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(prepared()))
    assert [count for _, count in _look_around(False).may_add] == [4, 4]


@pytest.mark.parametrize(("free", "speaks"), [(2.0, True), (4.0, False)])
def test_a_wait_is_spoken_of_until_there_is_room(monkeypatch: pytest.MonkeyPatch, free: float, speaks: bool) -> None:
    monkeypatch.setattr(placement_module, "NOTE_EVERY_S", 0.02)
    monkeypatch.setattr(placement_module, "find_free", lambda: [node(free), node(0)])
    said: list[str] = []
    with report_while_waiting(
        Placement(cpus_per_worker=4), 0, 1, "00", lambda: False, lambda event: said.append(event["text"])
    ):
        time.sleep(0.2)
    assert bool(said) == speaks
    if speaks:
        assert len(said) > 1
        assert said[0] == "waiting for 1 worker with 4 CPU each (0 s); free now: 1 x 2 CPUs, 0 GPUs; 1 x 0 CPUs, 0 GPUs"


def test_a_fraction_of_a_gpu_is_of_one_gpu() -> None:
    assert count_room(Placement(), 0.5, node(8, 2)) == 4
    assert count_room(Placement(), 0.1, node(64, 1)) == 10


def test_a_phase_starts_no_helper_that_it_has_no_use_for() -> None:
    """Each of Ray Train's helpers is a process that imports Ray for 1.4 s; what makes a phase safe stays."""
    from ray.train import ScalingConfig

    from medlora.on_ray.workers.trainer import PhaseTrainer

    trainer = PhaseTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    started = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert not started & {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert {"AcceleratorSetupCallback", "BackendSetupCallback"} <= started
