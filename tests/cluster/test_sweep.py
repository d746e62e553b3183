"""Sweeps on a real cluster: the search with trials that train nothing, then whole sweeps on a tiny base as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from medlora.config.loading.files import load
from medlora.config.placement import Placement
from medlora.curriculum.chains import find_chain
from medlora.curriculum.jobs import make_job
from medlora.errors import InputError
from medlora.runs import mirror
from medlora.runs.files import read_json, read_json_lines
from medlora.runs.folders import PhaseFolder, RunFolder
from medlora.runs.manifests import check_files, hash_files, read_manifest
from medlora.sweep.ledger import Ledger, Trial
from medlora.sweep.population import Proposal
from medlora.sweep.space import Range
from medlora.sweep.suggest import Suggester
from tests.support import ROOT
from tests.support.cluster import submit
from tests.support.fake_trials import fake_trial
from tests.support.store_server import BUCKET, Store
from tests.support.sweeps import start, write_sweep

SPACE = {"x": Range(0.0, 1.0)}


def search(
    folder: Path,
    cluster: Any,
    trials: int,
    does: dict[int, dict[str, Any]],
    halving: bool = True,
    placement: Placement | None = None,
    concurrency: int = 2,
) -> Ledger:
    """A search over fake trials; `does` says by number what a trial does."""
    from medlora.on_ray.tune_search import Halving, Search, search_on_ray

    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / "trials.jsonl")
    known = list(ledger.trials.values())
    suggester = Suggester(SPACE, "random", 0, trials, known)

    def describe(trial: Trial) -> dict[str, Any]:
        return {
            "id": trial.id,
            "folder": str(folder),
            "x": trial.params["x"],
            "steps": 9,
            **does.get(int(trial.id), {}),
        }

    def propose() -> Proposal | None:
        found = suggester.suggest() if ledger.trials else (None, {"x": 0.1})
        return Proposal(*found, {}) if found else None

    search_on_ray(
        Search(
            ledger=ledger,
            suggester=suggester,
            halving=Halving(1, 3, known) if halving else None,
            trials=trials,
            propose=propose,
            describe=describe,
            trainable=fake_trial,
            placement=placement or Placement(),
            concurrency=concurrency,
            on_event=lambda event: None,
        ),
        folder,
        cluster,
    )
    return ledger


def read_lines(ledger: Ledger, event: str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(ledger.path) if line["event"] == event]


def count_tries(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text().splitlines()) for path in sorted(folder.glob("*.tries"))}


def find_groups() -> list[str]:
    """Placement groups that still hold something."""
    from ray.util import placement_group_table

    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_a_stopped_trial_s_slot_is_free_at_once_and_no_placement_group_is_left(
    ray_cluster: Any, tmp_path: Path
) -> None:
    import ray

    ledger = search(tmp_path / "s", ray_cluster, 20, {})
    states = Counter(trial.state for trial in ledger.trials.values())
    assert states["stopped"] >= 8 and states["stopped"] + states["finished"] == 20
    assert ledger.trials["000"].state == "finished"  # the worst of all, yet the unchanged config is never stopped
    lines = read_json_lines(ledger.path)
    last_begin = max(i for i, line in enumerate(lines) if line["event"] == "running")
    for i, line in enumerate(lines[:last_begin]):
        if line.get("stop"):
            following = next(each for each in lines[i:] if each["event"] == "running")
            assert following["time"] - line["time"] < 5
    processes = {path.read_text().split()[0] for path in (tmp_path / "s").glob("*.tries")}
    assert len(processes) <= 4  # two slots: the next trial takes over the process of the one before
    end = time.monotonic() + 5
    while find_groups() or ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < end, (find_groups(), ray.available_resources())
        time.sleep(0.1)
    assert not (tmp_path / "s" / ".ray").exists()


def test_a_dead_trial_goes_on_twice_and_a_diverged_one_never(
    ray_cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    does = {
        1: {"does": "die"},
        2: {"does": "die", "always": True},
        3: {"does": "diverge", "always": True},
        4: {"does": "raise"},
    }
    ledger = search(tmp_path / "s", ray_cluster, 6, does, halving=False)
    states = {id: trial.state for id, trial in ledger.trials.items()}
    assert states == dict.fromkeys(("000", "001", "005"), "finished") | dict.fromkeys(("002", "003", "004"), "failed")
    assert count_tries(tmp_path / "s") == {"000": 1, "001": 2, "002": 3, "003": 1, "004": 1, "005": 1}
    assert [ledger.trials[id].deaths for id in ("001", "002", "003", "004")] == [1, 3, 0, 0]
    assert ledger.trials["002"].why == "its process died" and ledger.trials["003"].why == "the loss is nan"
    assert "trial 001: its process died; it resumes from its last checkpoint" in caplog.text
    assert ledger.trials["004"].why.startswith("RuntimeError: a bug of ours (fake_trials.py:")
    assert "trial 004 ends by an exception:\nTraceback (most recent call last)" in caplog.text


def test_more_trials_at_a_time_than_there_is_room_for_are_refused(ray_cluster: Any) -> None:
    from medlora.on_ray.placement import find_concurrency

    assert find_concurrency(None, Placement(), ray_cluster) == find_concurrency(2, Placement(), ray_cluster) == 2
    with pytest.raises(
        InputError, match="concurrency: 3 trials at a time with 1 CPU each; the cluster .* has room for 2"
    ):
        find_concurrency(3, Placement(), ray_cluster)
    with pytest.raises(InputError, match="1 trials at a time with 1 CPU and 0.5 GPU each; .* has room for 0"):
        find_concurrency(None, Placement(gpus_per_worker=0.5), ray_cluster)


def test_two_trials_share_a_gpu_and_a_third_waits(
    cluster: dict[str, str], ray_cluster: Any, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    import ray

    from medlora.on_ray.cluster import connect
    from medlora.on_ray.placement import find_concurrency
    from tests.support.cluster import add_nodes

    half = Placement(gpus_per_worker=0.5)
    with add_nodes(cluster, ("gpu", "gpu", "--num-gpus=1", "--num-cpus=3")), connect() as grown:
        assert find_concurrency(None, half, grown) == 2
        config = write_sweep(tmp_path, bases, data, {"lora.r": [2, 4]}, {})
        refused = start(
            config, tmp_path / "out", cluster, "--set", "placement={gpus_per_worker: 0.5}", "--set", "concurrency=3"
        )
        does = {i: {"beside": 2, "steps": 4} for i in range(3)}
        ledger = search(tmp_path / "s", grown, 3, does, halving=False, placement=half, concurrency=3)
        _, err = finish(refused, code=2)
    end = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # the next sweep would wait for a GPU that is gone
        assert time.monotonic() < end
        time.sleep(0.2)
    assert "concurrency: 3 trials at a time with 1 CPU and 0.5 GPU each" in err and "has room for 2" in err
    assert not (tmp_path / "out" / "start").exists() and not (tmp_path / "out" / "trials.jsonl").exists()
    assert [trial.state for trial in ledger.trials.values()] == ["finished"] * 3
    first, second, third = sorted(
        (read_json(path) for path in (tmp_path / "s").glob("*.ran")), key=lambda ran: ran["began"]
    )
    assert {ran["gpus"] for ran in (first, second, third)} == {"0"}
    assert second["began"] < first["ended"] and third["began"] >= min(first["ended"], second["ended"])


def test_a_search_goes_on_from_its_ledger_alone(ray_cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    ledger = Ledger(folder / "trials.jsonl")
    for x in (0.1, 0.9, 0.8):
        ledger.begin({"x": x})
    for id in ("000", "001"):
        for step in range(1, 10):
            ledger.add_score(id, step, ledger.trials[id].params["x"], stop=False)
        ledger.end(id, "finished")
    ledger.add_score("002", 1, 0.05, stop=False)  # the driver was killed here
    ledger = search(folder, ray_cluster, 6, {})
    assert list(ledger.trials) == [f"{i:03}" for i in range(6)]
    assert set(count_tries(folder)) == {"002", "003", "004", "005"}
    assert all(trial.ended for trial in ledger.trials.values())
    # What the earlier driver heard stands in the rungs: 0.9 and 0.1 at step 3, so a poor new trial is stopped by them.
    poor = [trial for trial in ledger.trials.values() if trial.id > "002" and trial.params["x"] < 0.5]
    assert poor and all(trial.state == "stopped" for trial in poor)


# ---- whole sweeps ---------------------------------------------------------------------------------------------------


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, out + err
    return out, err


def wait_for(process: subprocess.Popen[str], what: Any) -> Any:
    end = time.monotonic() + 200
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def check_bytes(sweep: Path, id: str, phase: str, folder: Path) -> None:
    """A trial has the bytes of the same phase trained in this process, which serves no trials."""
    from medlora.training.phase import run_phase

    trial, again = RunFolder(sweep / "trials" / id), PhaseFolder(folder / "again" / phase)
    config = load(trial.config)
    ((before, trained),) = [pair for pair in pairwise(config.phases) if pair[1].name == phase]
    run_phase(make_job(config, trained, find_chain(trial, before.name)), again, lambda event: None)
    assert hash_files(again.adapter) == hash_files(trial.phase(phase).adapter)


def test_a_sweep_survives_its_trials_and_its_driver(
    cluster: dict[str, str], bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    space = {"phases.02.learning_rate": [1e-3, 5e-3, 1e30], "lora.r": [2, 8]}
    steps = {"max_steps": 40, "checkpoint_every_steps": 5, "log_every_steps": 1}
    more = {"search": "grid", "trials": 6, "start": str(finished), "dev": {"every_steps": 10}, "best": 2}
    config, out = write_sweep(tmp_path, bases, data, space, steps, **more), tmp_path / "sweep"
    ledger = out / "trials.jsonl"

    def read(event: str, **wanted: Any) -> list[dict[str, Any]]:
        lines = [line for line in read_json_lines(ledger) if line["event"] == event]
        return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]

    driver = start(config, out, cluster)
    wait_for(driver, lambda: read("score", trial="001"))
    victim = read_json(out / "trials" / "001" / "phases" / ".02.lock.json")["pid"]
    os.kill(victim, signal.SIGKILL)
    wait_for(driver, lambda: read("died", trial="001") and read("ended"))
    driver.kill()
    driver.communicate()
    ended = {line["trial"] for line in read("ended")} | {line["trial"] for line in read("score", stop=True)}
    before = {id: (out / "trials" / id / "phases" / "02" / "fingerprint.json").stat().st_mtime_ns for id in ended}
    assert ended and len(ended) < 6

    said, err = finish(start(config, out, cluster, "--final-test"))
    assert f"{len(ended)} of 6 trials are done already; none of them is run again" in said
    assert "test t, trial" in said and "scored once" in said and err == ""
    assert {
        id: (out / "trials" / id / "phases" / "02" / "fingerprint.json").stat().st_mtime_ns for id in ended
    } == before
    known = Ledger(ledger).trials
    assert list(known) == [f"{i:03}" for i in range(6)] and all(trial.ended for trial in known.values())
    diverged = [trial for trial in known.values() if trial.params["phases.02.learning_rate"] == 1e30]
    assert diverged and all(trial.state == "failed" and trial.deaths == 0 for trial in diverged)
    assert all("lower phases.02.learning_rate" in trial.why for trial in diverged)

    summary = read_json(out / "sweep.json")
    assert [row["trial"] for row in summary["dev"]["stages"]][0] == "000" and len(summary["dev"]["stages"]) <= 3
    assert summary["dev"]["stages"][0]["n"] == 6 and summary["test"]["trial"] == summary["winner"]
    assert "on all of dev (6 questions), the unchanged config (trial 000)" in said
    for name in ("sweep.html", "trials.parquet", "best.yaml", "dev/report.html", "tensorboard/000"):
        assert (out / name).exists()
    assert (out / "trials" / "000" / "phases" / "01").resolve() == finished / "phases" / "01"
    record = (out / "test" / "report.json").read_bytes()
    said, _ = finish(start(config, out, cluster, "--final-test"))
    assert "everything is done already" in said and (out / "test" / "report.json").read_bytes() == record

    # Which trials are stopped depends on their scores; whichever finished last has often followed one that was.
    check_bytes(out, [trial.id for trial in known.values() if trial.state == "finished"][-1], "02", tmp_path)

    best = load(out / "best.yaml")
    assert best.evaluation is not None and [phase.name for phase in best.phases] == ["00", "01", "02"]
    _, err = finish(start(config, out, cluster, "--set", "seed=1"), code=2)
    assert "holds another sweep" in err and "Traceback" not in err


def test_two_sweeps_side_by_side_do_not_touch_each_other(
    cluster: dict[str, str],
    bases: dict[str, str],
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One trains the phase before its own, once, into its folder; the other, a submitted job, lives in a store."""
    rate, dev = "loguniform 1e-3 3e-2", {"every_steps": 3, "sources": [{"source": str(data / "dev.jsonl")}]}
    small = {"trials": 2, "search": "random", "concurrency": 1, "scheduler": {"kind": "none"}, "dev": dev}
    one = write_sweep(tmp_path / "a", bases, data, {"phases.01.learning_rate": rate}, {}, phases=["01"], **small)
    pbt = {"scheduler": {"kind": "pbt", "population": 2, "generations": 2}, "dev": {"every_steps": 4}}
    more = {**pbt, "concurrency": 1, "best": 4, "start": str(finished), "storage": {"cache": str(tmp_path / "here")}}
    two = write_sweep(tmp_path / "b", bases, data, {"phases.02.learning_rate": rate}, {"max_steps": 8}, **more)
    store, uri, out = Store(tmp_path), f"s3://{BUCKET}/sweeps/b", tmp_path / "a" / "out"
    try:
        driver = start(one, out, cluster)
        job = ["--config", str(two), "--out", uri]
        # The same working folder, uploaded once before, is gone with the node that another test has added and taken away.
        said = submit(cluster, ["env", "-C", str(ROOT), "python", "jobs/sweep.py", *job], options=(), env=store.env)
        finish(driver)
        assert f"sweep: {uri}\n" in said and "Warning" not in said and "Traceback" not in said
        # Another machine finds in the store all that there is.
        other = ("--set", f"storage.cache={tmp_path / 'other'}")
        said, _ = finish(start(two, uri, {**cluster, **store.env}, *other))
        assert "everything is done already" in said
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        stored = mirror.find_copy(uri, str(tmp_path / "third"))
        mirror.pull(stored)
    finally:
        store.close()
    ledgers = [Ledger(folder / "trials.jsonl").trials for folder in (out, stored)]
    for folder, trials, phase in zip((out, stored), ledgers, ("01", "02"), strict=True):
        assert [trial.state for trial in trials.values()] == ["finished"] * len(trials)
        for trial in trials.values():
            last = f"{phase}-2" if trial.about.get("generation") == 2 else phase
            trained = folder / "trials" / trial.id / "phases" / last
            assert check_files(trained, read_manifest(trained) or {"files": {"-": ""}}) is None
        assert len(read_json(folder / "sweep.json")["trials"]) == len(trials)
    assert [len(trials) for trials in ledgers] == [2, 5]
    assert read_manifest(out / "start" / "phases" / "00") and not (stored / "start").exists()
    assert (out / "trials" / "001" / "phases" / "00").resolve() == out / "start" / "phases" / "00"
    check_bytes(out, "001", "01", tmp_path)  # in the process that had trained the trial before it

    # The population ends as a schedule of phases that continue each other, every trial of it as a run that is whole.
    trials = ledgers[1]
    assert [trial.step for trial in trials.values()] == [8, 4, 4, 8, 8]
    for id in ("003", "004"):
        phases, parent = stored / "trials" / id / "phases", stored / "trials" / trials[id].about["parent"] / "phases"
        assert read_manifest(phases / "02") == (mother := read_manifest(parent / "02"))
        lineage = read_manifest(phases / "02-2")
        assert lineage is not None and mother is not None
        assert mother["adapter_hash"] in lineage["fingerprint"]["parent"]
        assert all(read_manifest(phases / name) for name in ("00", "01"))
    best, winner = load(stored / "best.yaml"), read_json(stored / "sweep.json")["winner"]
    parts = ["02"] if winner == "000" or winner < "003" else ["02", "02-2"]
    assert [phase.name for phase in best.phases] == ["00", "01", *parts]
    assert not [path for path in stored.rglob("*") if ".ray" in path.parts or "lock" in path.name]
