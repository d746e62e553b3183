"""One small cluster in `make test`: what needs Ray, in small. `make test-ray` holds it at large."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from medlora.evaluation.ledger import LEDGER, PREDICTIONS
from medlora.runs.files import read_json
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import check_files, read_manifest
from tests.support.curriculum import finish, start, two_phases, wait_for_step, worker_pid, write_config
from tests.support.tiny_run import run_all, weights


@pytest.mark.canary
def test_a_run_on_ray_survives_its_worker_and_gives_the_bytes_of_one_without_ray(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """Connects with a token, leads its workers itself, retries a killed one from its checkpoint, asks every question once,
    seals what is done."""
    config = two_phases(bases, data, max_steps=24, checkpoint_every_steps=4)
    config = config.model_copy(update={"phases": config.phases[1:]}).model_dump(mode="json")
    config["phases"][0] |= {"chain": "new", "replay": [], "train_extra_tokens": True}
    config["evaluation"] = {"tests": [{"name": "dev", "source": str(data / "dev.jsonl")}], "batch_size": 2}
    config = type(two_phases(bases, data)).model_validate(config)
    run = tmp_path / "run"
    driver = start(write_config(config, tmp_path / "c.yaml"), run, cluster)
    wait_for_step(run, "01", 6, driver)
    worker = psutil.Process(worker_pid(run, "01"))
    beside = {" ".join(process.cmdline()) for process in worker.parent().children()}  # type: ignore[union-attr]
    assert any("RayTrainWorker" in name for name in beside) and not any("TrainController" in name for name in beside)
    worker.kill()
    out, _ = finish(driver)
    assert "attempt 1 of 2" in out
    run_all(config, tmp_path / "undisturbed", ("01",))
    assert weights(run, "01") == weights(tmp_path / "undisturbed", "01")
    report = read_json(RunFolder(run).evaluation / "report.json")
    assert report["questions_asked"] == 6 and [row["n"] for row in report["stages"]] == [6, 6]
    for folder in (RunFolder(run).phase("01").root, RunFolder(run).evaluation):
        manifest = read_manifest(folder)
        assert manifest is not None and check_files(folder, manifest) is None
    assert (RunFolder(run).evaluation / PREDICTIONS).is_file() and not (RunFolder(run).evaluation / LEDGER).exists()
