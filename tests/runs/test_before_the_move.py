"""Runs, evaluations and sweeps made by an earlier version are reused and resumed; `fixtures/before_the_move` holds them.

Commit b8b1703 made them. Bytes of trained weights differ between kinds of CPU, so the tests compare with what is trained
here. Each reuse is tested with its opposite: a folder made from something else must be refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from medlora.config.loading.files import load, load_evaluate_config, load_sweep_config
from medlora.curriculum.chains import extend_chain
from medlora.curriculum.jobs import PhaseJob, find_obstacle, make_job
from medlora.errors import InputError
from medlora.evaluation.ledger import plan_batches, read_ledger
from medlora.evaluation.plan import check_evaluation
from medlora.runs.files import read_json, read_json_lines
from medlora.runs.folders import PhaseFolder, RunFolder, find_finished
from medlora.runs.manifests import check_files, hash_files, read_manifest
from medlora.sweep.checks import check_sweep, find_start, refuse_other
from medlora.sweep.ledger import Ledger
from medlora.sweep.plan import describe_sweep
from tests.support import ROOT

ARCHIVE = ROOT / "tests" / "fixtures" / "before_the_move" / "before_the_move.tar.xz"
LIVING = ("run.json", "run.log", "config.yaml", "data.json", "trials.jsonl", "lock", "lock.json")
"""Files at the top of a folder that a job writes each time, as they were or longer."""


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders as they were, in the working folder: their configs have relative paths."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: Path, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A job in a process of its own, which prints at its end whether torch or Ray was imported."""
    code = f"import sys, runpy; sys.argv = {['x', *arguments]!r}\n"
    code += f"try: runpy.run_path({str(ROOT / 'jobs' / job)!r}, run_name='__main__')\n"
    code += "finally: print('HEAVY', sorted({'torch', 'ray'} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def read_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file that a job must not write again."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parent != folder or path.name not in LIVING]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}


@pytest.mark.parametrize(
    ("job", "config", "folder", "out", "change", "named"),
    [
        ("curriculum.py", "two.yaml", "runs/tiny", "--run-dir", "phases.01.learning_rate=1e-3", "phases.01.learning_rate: was 0.01"),
        ("evaluate_mcq.py", "evaluate.yaml", "evaluations/finished", "--out", "evaluation.max_tokens=9", "evaluation.max_tokens: was 256"),
        ("sweep.py", "sweep.yaml", "sweeps/finished", "--out", "dev.every_steps=3", "sweep.dev.every_steps: was 2"),
    ],
)  # fmt: skip
def test_what_was_finished_is_reused_and_something_else_is_refused(
    before: Path, job: str, config: str, folder: str, out: str, change: str, named: str
) -> None:
    was = read_files(before / folder)
    report = next(
        part for part in was if part.endswith(("evaluation/report.json", "finished/report.json", "sweep.json"))
    )
    done = start(before, job, "--config", config, out, folder)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.endswith("HEAVY []\n")
    assert read_files(before / folder) == was
    content = json.loads(was[report][0])
    stages = content["dev"]["stages"] if job == "sweep.py" else content["stages"]
    assert len(stages) >= 2 and all(f"{100 * row['accuracy']:.1f}%" in done.stdout for row in stages)

    done = start(before, job, "--config", config, out, folder, "--set", change)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert read_files(before / folder) == was


def test_the_phases_of_an_interrupted_run_are_those_of_its_config(before: Path) -> None:
    from medlora.drivers.curriculum import check_run

    config, run = load(Path("three.yaml")), RunFolder(before / "runs/tiny")
    assert [read_manifest(run.phase(name).root) is not None for name in ("00", "01", "02")] == [True, True, False]
    check_run(config, run, None)
    chain: Any = ()
    for phase in config.phases:
        assert find_obstacle(make_job(config, phase, chain), run.phase(phase.name)) == []
        chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
    with (before / "data/mcq.jsonl").open("a") as file:
        file.write("\n")
    check_run(config, run, None)  # a blank line is no record
    rows = (before / "data/mcq.jsonl").read_text(encoding="utf-8").splitlines()
    (before / "data/mcq.jsonl").write_text("\n".join(rows[:-2]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="made from something else:\n +data"):
        check_run(config, run, None)


def test_a_finished_phase_stands_whatever_became_of_its_logs(before: Path) -> None:
    folder = RunFolder(before / "runs/tiny").phase("00")
    manifest = read_manifest(folder.root)
    named = [path for path in folder.logs if manifest and path.name in manifest["files"]]
    assert named  # that version vouched for them
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:7]), Path.unlink):
        for path in named:
            damage(path)
        assert find_finished(folder) == (manifest, "")
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:7])
    with pytest.raises(InputError, match=r"metrics.jsonl has changed since phase 00 was finished; .* --redo 00"):
        find_finished(folder)


def test_an_unfinished_phase_resumes_as_if_nothing_had_happened(before: Path) -> None:
    config, run = load(Path("three.yaml")), RunFolder(before / "runs/tiny")
    chain: Any = ()
    for phase in config.phases[:2]:
        chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
    resume(make_job(config, config.phases[2], chain), run.phase("02"), before, 4)


def test_an_unfinished_trial_of_a_sweep_resumes_as_if_nothing_had_happened(before: Path) -> None:
    plan = check_sweep(load_sweep_config(Path("sweep.yaml")))
    trial = Ledger(before / "sweeps/tiny/trials.jsonl").trials["002"]
    made = plan.make_trial([trial.params], "trial-002")
    _, chain = find_start(plan)
    folder = RunFolder(before / "sweeps/tiny/trials/002")
    assert load(folder.config) == made
    resume(make_job(made, made.phases[2], chain, plan.dropped), folder.phase("02"), before, 2)


def resume(job: PhaseJob, folder: PhaseFolder, tmp_path: Path, step: int) -> None:
    """Train the rest of a phase of 8 steps, and all of it elsewhere; both must end with the same adapter."""
    from medlora.training.phase import run_phase

    assert find_obstacle(job, folder) == []
    checkpoint = f"checkpoints/normal/checkpoint-{step}/adapter_model.safetensors"
    there = (folder.root / checkpoint).read_bytes()
    undisturbed, here = PhaseFolder(tmp_path / "undisturbed"), []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step + 2:
            here.append((undisturbed.root / checkpoint).read_bytes())

    run_phase(job, undisturbed, look)
    events: list[dict[str, Any]] = []
    manifest = run_phase(job, folder, events.append)
    assert manifest["segments"][0]["resumed_from_step"] == step
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(step + 2, 9, 2))
    assert [row["step"] for row in read_json_lines(folder.metrics)] == [1, 2, 4, 6, 8]
    assert check_files(folder.root, manifest) is None and not folder.checkpoints.exists()
    ended, expected = ((each.adapter / "adapter_model.safetensors").read_bytes() for each in (folder, undisturbed))
    if here == [there]:
        assert hash_files(folder.adapter) == hash_files(undisturbed.adapter)
    # The checkpoint may come from another kind of CPU: then only rounding may differ, by far less than a step does.
    assert measure(ended, expected) < 0.02 * measure(there, expected)


def measure(one: bytes, other: bytes) -> float:
    """How far apart the weights of two adapters are."""
    from safetensors.torch import load as read_weights

    a, b = read_weights(one), read_weights(other)
    assert a.keys() == b.keys()
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a)) ** 0.5


def test_an_interrupted_evaluation_asks_only_what_is_missing(before: Path) -> None:
    plan = check_evaluation(load_evaluate_config(Path("evaluate.yaml")), force=False)
    folder, stages = before / "evaluations/interrupted", list(plan.task.stages)
    assert stages == ["base", "00", "mine"]
    assert read_json(folder / "fingerprint.json") == plan.task.fingerprint and read_manifest(folder) is None
    known = read_ledger(folder / "ledger.jsonl", stages)
    finished = read_json(before / "evaluations/finished/report.json")
    assert len(known) == 8 * 3 and not any(prediction.error for prediction in known)
    answered = {(prediction.stage, prediction.test, prediction.id) for prediction in known}
    batches = plan_batches(plan.task.asked.tests, 4, stages, answered)
    left = {(stage, test, record.id) for batch in batches for stage in batch.stages for test, record in batch.questions}
    assert len(batches) == 1 and len(left) == 4 * 3 and not left & answered
    assert len(left | answered) == sum(row["n"] for row in finished["stages"])


def test_an_interrupted_sweep_goes_on_from_its_ledger(before: Path) -> None:
    plan, folder = check_sweep(load_sweep_config(Path("sweep.yaml"))), before / "sweeps/tiny"
    assert read_json(folder / "fingerprint.json") == describe_sweep(plan)
    refuse_other(folder, plan)
    trials = Ledger(folder / "trials.jsonl").trials
    assert {id: (trial.state, trial.step) for id, trial in trials.items()} == {
        "000": ("finished", 8),
        "001": ("finished", 8),
        "002": ("running", 4),
    }
    assert trials["000"].params == plan.start_params and trials["001"].seconds > 0
    tried = [trial.params for trial in trials.values()]
    assert [params for params in plan.list_grid() if params not in tried] == [{"phases.02.learning_rate": 3e-4}]
    for id in ("000", "001"):
        phase = folder / "trials" / id / "phases/02"
        assert check_files(phase, read_manifest(phase) or {"files": {"-": ""}}) is None
    with pytest.raises(InputError, match="holds another sweep:\n +run.seed: was 0, now 1"):
        refuse_other(folder, check_sweep(load_sweep_config(Path("sweep.yaml"), ["set=[seed=1]", "start=null"])))


def test_the_jobs_do_what_was_left_to_do(before: Path, cluster: dict[str, str]) -> None:
    """The same commands as before the interruption, on a real cluster: nothing that was done is done again."""
    trials = [before / "sweeps/tiny/trials" / id / "phases/02" for id in ("000", "001")]
    done = {
        folder: read_files(folder)
        for folder in (before / "runs/tiny/phases/00", before / "runs/tiny/phases/01", *trials)
    }
    ledger = read_ledger(before / "evaluations/interrupted/ledger.jsonl", ["base", "00", "mine"])
    commands = [
        ["curriculum.py", "--config", "three.yaml"],
        ["evaluate_mcq.py", "--config", "evaluate.yaml", "--out", "evaluations/interrupted"],
        ["sweep.py", "--config", "sweep.yaml"],
    ]
    env = {**cluster, "PYTHONPATH": str(ROOT)}
    for command in commands:
        ended = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / command[0]), *command[1:]],
            cwd=before,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {folder: read_files(folder) for folder in done} == done

    finished = [before / "runs/tiny/phases/02", before / "sweeps/tiny/trials/002/phases/02"]
    manifests = [read_manifest(folder) for folder in finished]
    assert [manifest and manifest["segments"][0]["resumed_from_step"] for manifest in manifests] == [4, 2]
    report = read_json(before / "runs/tiny/evaluation/report.json")
    assert [row["stage"] for row in report["stages"]] == ["base", "00", "01", "02"]

    import pyarrow.parquet

    assert read_json(before / "evaluations/interrupted/report.json")["questions_asked"] == 4
    rows = pyarrow.parquet.read_table(before / "evaluations/interrupted/predictions.parquet").to_pylist()
    answers = {(row["stage"], row["test"], row["id"]): row["choice"] for row in rows}
    assert len(answers) == 12 * 3 and not (before / "evaluations/interrupted/ledger.jsonl").exists()
    assert all(answers[each.stage, each.test, each.id] == each.choice for each in ledger)

    sweep = read_json(before / "sweeps/tiny/sweep.json")
    assert sweep["states"] == {"finished": 4, "stopped": 0, "failed": 0, "invalid": 0}
