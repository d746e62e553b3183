"""Where work lands on a cluster of several nodes, and what is left of it when one of them goes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from medlora.evaluation.ledger import PREDICTIONS
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from tests.support import ROOT
from tests.support.cluster import RAY, AddedNode, add_nodes
from tests.support.curriculum import finish, one_phase, recover, start, wait_for_step, worker_pid, write_config
from tests.support.fake_stages import answer_here, ask, journal, score
from tests.support.tiny_run import run_all, weights


def test_a_phase_lands_where_its_config_says_and_outlives_a_notice_and_the_loss_of_its_node(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    config = one_phase(bases, data, 300, every=150)
    run_all(config, tmp_path / "undisturbed", ("00",))
    run = tmp_path / "run"
    selected = "placement={label_selector: {pool: spot}, retries: 1}"
    with add_nodes(cluster, ("spot", "a"), ("spot", "b"), ("spot", "c")) as nodes:

        def find_node() -> AddedNode:
            (node,) = [node for node in nodes if node.holds(worker_pid(run, "00"))]
            return node

        def drain() -> None:
            raylet = find_node().raylet
            assert raylet is not None
            node_id = re.search(r"--node[_-]id=(\w+)", " ".join(raylet.cmdline()))
            assert node_id, raylet.cmdline()
            notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            command = [RAY, "drain-node", "--address", cluster["RAY_ADDRESS"], "--node-id", node_id[1], *notice]
            subprocess.run([*command, "--deadline-remaining-seconds", "120"], env=cluster, check=True)

        watched = {**cluster, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        driver = start(write_config(config, tmp_path / "c.yaml"), run, watched, "--set", selected)
        wait_for_step(run, "00", 1, driver)
        first = find_node()
        recover(run, driver, "00", 40, drain, "node drained")
        second = find_node()
        assert second is not first
        first.remove()
        lost = recover(run, driver, "00", 160, lambda: find_node().remove(), "node removed")
        assert find_node() not in (first, second)
        out, _ = finish(driver)
    assert "its node is about to be taken away: resumes from the checkpoint just made, on another" in out
    assert "worker 0 died; attempt 1 of 1" in out  # the notice before it cost no retry
    noticed, resumed = map(int, re.findall(r"resumes from step (\d+) of 300", out))
    assert 40 <= noticed < 150, "only a checkpoint made on notice lies there: the config's own is made at 150"
    assert resumed == 150 <= lost
    steps = [row["step"] for row in read_json_lines(RunFolder(run).phase("00").metrics)]
    assert steps == list(range(1, 301))
    assert weights(run, "00") == weights(tmp_path / "undisturbed", "00")


def test_an_evaluation_survives_the_loss_of_a_node(
    cluster: dict[str, str],
    ray_cluster: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    with add_nodes(cluster, ("spot", "a"), ("spot", "b")) as nodes:
        removed: list[float] = []

        def remove_one() -> None:
            while not (tmp_path / "e.journal").exists() or len(journal(tmp_path / "e", "ask")) < 6:
                time.sleep(0.05)
            last = int(journal(tmp_path / "e", "ask")[-1][2])
            (node,) = [node for node in nodes if node.holds(last)]
            node.remove()
            removed.append(time.monotonic())

        remover = threading.Thread(target=remove_one, daemon=True)
        remover.start()
        score(
            tmp_path / "e", ask(30), ray_cluster, actors=2, pause_s=0.5, size=2, min_actors=1, labels={"pool": "spot"}
        )
        remover.join(timeout=10)
    assert removed
    print(f"node removed in an evaluation of 30 questions: it ended {time.monotonic() - removed[0]:.0f} s later")
    assert (tmp_path / "e" / PREDICTIONS).read_bytes() == answer_here(ask(30), tmp_path)


def test_what_must_wait_for_room_says_so(
    cluster: dict[str, str], ray_cluster: Any, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """A phase whose kind of node is taken waits for it, says for what, and goes on when it is free."""
    from ray.util import placement_group, remove_placement_group

    with add_nodes(cluster, ("only", "a")):
        taken = placement_group([{"CPU": 1}], bundle_label_selector=[{"pool": "only"}])
        assert taken.wait(60)
        code = "import sys; sys.path.insert(0, 'jobs'); import medlora.on_ray.placement as p; p.NOTE_EVERY_S = 2.0; "
        code += "import curriculum; sys.exit(curriculum.main())"
        config = write_config(one_phase(bases, data, 4), tmp_path / "d.yaml")
        selected = ("--set", "placement.label_selector={pool: only}")
        command = [sys.executable, "-c", code, "--config", config, "--run-dir", tmp_path / "run", *selected]
        job = subprocess.Popen(
            list(map(str, command)), env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip
        log, end = tmp_path / "run" / "run.log", time.monotonic() + 120
        while not (log.exists() and "waiting for" in log.read_text()):
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        remove_placement_group(taken)
        finish(job)
    asked = "00  waiting for 1 worker with 1 CPU on a node with pool=only each"
    assert re.search(asked + r" \(\d+ s\); free now: .*1 x 0 CPUs, 0 GPUs, name=a pool=only", log.read_text())
