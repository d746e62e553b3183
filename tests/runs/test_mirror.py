"""Runs in an object store, on servers of S3 and of Google's storage that fail when they are told to."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from medlora.config.evaluation import EvaluationConfig
from medlora.config.run import RunConfig
from medlora.data.reading import files as files_module
from medlora.errors import InputError
from medlora.evaluation.ledger import plan_batches, sort_predictions
from medlora.evaluation.predictions import write_predictions
from medlora.evaluation.questions import read_tests
from medlora.runs import locks, mirror, object_store
from medlora.runs.files import write_bytes
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import check_files, commit, read_manifest
from medlora.runs.object_store import Objects
from tests.support import ROOT
from tests.support.store_server import BUCKET, GoogleStore, Rule, Store, run_env


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("store"))
    yield store
    store.close()


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = GoogleStore(tmp_path_factory.mktemp("store"))
    yield store
    store.close()


@pytest.fixture(params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Store:
    store: Store = request.getfixturevalue(request.param)
    return store


ON_S3 = pytest.mark.parametrize("server", ["s3"], indirect=True)
"""What says nothing new of another store."""

GS_SLOW = pytest.mark.parametrize("server", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
"""What takes long and hardly differs between stores."""


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The server, without faults, and this process's environment as it is needed to reach it; hardly any waiting."""
    server.rule = lambda method, path, count: None
    server.seen.clear()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(object_store, "GCS_RETRY_S", 0.2)
    monkeypatch.setattr(locks, "SETTLE_S", 0.05)
    monkeypatch.setattr(mirror, "SEEN_WAIT_S", 0.05)
    return server


@pytest.fixture
def uri(store: Store, tmp_path: Path) -> str:
    return f"{store.scheme}://{BUCKET}/runs/{tmp_path.name}"


def key(uri: str, name: str) -> str:
    return f"{uri.partition(f'://{BUCKET}/')[2]}/{name}"


def machine(tmp_path: Path, name: str, uri: str) -> Path:
    """The working copy of a URI on a machine of that name."""
    return mirror.find_copy(uri, str(tmp_path / name))


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        write_bytes(folder / name, content.encode())


def test_data_is_read_where_it_lies(store: Store, uri: str) -> None:
    """A packed file and one in a folder of its own, in stores of both protocols."""
    rows = [{"text": "아스피린"}, {"text": "인슐린"}]
    files, path = object_store.open_store(uri)
    for name, row in zip(("a.jsonl.gz", "deep/b.jsonl"), rows, strict=True):
        lines = json.dumps(row).encode() + b"\n"
        with files.open_output_stream(f"{path}/{name}", compression=None) as stream:
            stream.write(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert files_module.list_files(uri) == [f"{uri}/a.jsonl.gz", f"{uri}/deep/b.jsonl"]
    assert [row for name in files_module.list_files(uri) for _, row in files_module.read_file(name)] == rows
    with pytest.raises(InputError, match="there is no such file"):
        files_module.list_files(f"{uri}/nope.jsonl")


def test_a_folder_of_no_store_is_left_alone(store: Store, tmp_path: Path) -> None:
    fill(tmp_path, {"a": "1"})
    mirror.push(tmp_path)
    mirror.pull(tmp_path)
    with mirror.hold_run(tmp_path):
        assert store.seen == [] and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert mirror.find_copy("runs/x", None) == Path("runs/x") and mirror.find_uri(tmp_path) is None


def test_the_path_of_a_working_copy_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = mirror.find_copy("s3://lab/a/b.c/run-1", str(tmp_path))
    assert mirror.find_uri(folder / "phases" / "00") == "s3://lab/a/b.c/run-1/phases/00"
    assert mirror.find_copy("s3://lab/run/", str(tmp_path)) != folder and folder.name == "run-1"
    assert mirror.find_copy("s3://lab/a/b.c/run-1", str(tmp_path), "read") != folder


@pytest.mark.parametrize(
    "where",
    [
        "s3://",
        "s3://lab",
        "s3://lab/",
        "s3://lab/../x",
        "s3://lab/a/../../b",
        "s3://lab/a?endpoint_override=x",
        "s3://k:s@lab/a",
    ],
)
def test_a_uri_that_is_no_plain_path_is_refused(tmp_path: Path, where: str) -> None:
    with pytest.raises(InputError, match="s3://"):
        mirror.find_copy(where, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_what_one_machine_pushes_another_pulls(store: Store, tmp_path: Path, uri: str) -> None:
    here, there = machine(tmp_path, "one", uri), machine(tmp_path, "two", uri)
    fill(here, {"manifest.json": "m", "a/manifest.json": "m", "a/w.bin": "1", "z.json": "z", "lock": "", ".ray/x": "1"})
    mirror.push(here)
    order = [written.removeprefix(key(uri, "")) for written in store.list_written()]
    assert set(order) == {"a/w.bin", "z.json", "a/manifest.json", "manifest.json"}
    assert set(order[:2]) == {"a/w.bin", "z.json"}  # manifests last
    mirror.pull(there)
    assert {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} == set(order)
    store.seen.clear()
    mirror.push(here)
    mirror.pull(there)
    assert not [path for method, path in store.seen if method in ("PUT", "POST") or "w.bin" in path]  # nothing new

    # What changes and goes on one machine does so on the other; what the other made in the meantime is not ours to keep.
    fill(here, {"a/w.bin": "22"})
    (here / "z.json").unlink()
    mirror.push(here / "a")
    fill(there, {"mine": "x", "b/mine": "x"})
    mirror.pull(there, exclude=("b",))
    assert (there / "a" / "w.bin").read_text() == "22" and (there / "z.json").exists()
    assert not (there / "mine").exists() and (there / "b" / "mine").exists()
    mirror.push(here)
    mirror.pull(there)
    assert not (there / "z.json").exists()


def test_what_identifies_a_folder_is_pushed_first_and_removed_last(store: Store, tmp_path: Path, uri: str) -> None:
    """A death in between left a phase in the store that every later driver refused."""
    here = machine(tmp_path, "one", uri)
    others = [f"phases/00/checkpoints/normal/checkpoint-1/{n}.bin" for n in range(12)]
    names = ["run.json", "phases/00/fingerprint.json", *others, "phases/00/manifest.json"]
    fill(here, {name: name for name in reversed(names)})
    mirror.push(here)
    order = [written.removeprefix(key(uri, "")) for written in store.list_written()]
    assert order[:2] == names[:2] and set(order[2:-1]) == set(others) and order[-1] == names[-1]
    if store.scheme == "gs":
        return
    shutil.rmtree(here / "phases")
    store.seen.clear()
    mirror.push(here)
    gone = [path.partition("/phases/00/")[2] for method, path in store.seen if method == "DELETE"]
    assert gone[0] == "manifest.json" and gone[-1] == "fingerprint.json" and len(gone) == 14


def test_one_driver_has_a_run_and_a_dead_one_does_not_keep_it(
    store: Store, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machine(tmp_path, "one", uri), machine(tmp_path, "two", uri)
    with mirror.hold_run(here):
        fill(here, {"run.json": "{}"})
        with (
            pytest.raises(InputError, match=rf"{uri} is in use by process \d+ on .*its lock falls in \d+ s"),
            mirror.hold_run(there),
        ):
            pass
    assert [name for name in store.list(key(uri, "")) if "lock" in name] == []
    code = f"from medlora.runs.locks import take_lock as t; from medlora.runs.object_store import Objects; t(Objects.open({uri!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)  # ends without giving the lock back
    left = store.read(key(uri, "lock.json"))
    with mirror.hold_run(there):
        assert (there / "run.json").is_file()  # pulled
    # From another machine nobody sees that the process is dead: its lock falls with age, by the store's clock.
    Objects.open(uri).write(locks.LOCK, left)
    monkeypatch.setattr(locks, "_name_machine", lambda: "another")
    with pytest.raises(InputError, match="is in use"), mirror.hold_run(there):
        pass
    monkeypatch.setattr(locks, "EXPIRY_S", 1.0)
    time.sleep(2)
    with mirror.hold_run(there):
        pass


def test_who_lost_the_lock_writes_nothing_more(store: Store, tmp_path: Path, uri: str) -> None:
    here = machine(tmp_path, "one", uri)
    with pytest.raises(InputError, match="has taken this run over; nothing more is written"), mirror.hold_run(here):
        fill(here, {"run.json": "first"})
        mirror.push(here)
        Objects.open(uri).write(locks.LOCK, locks.describe_me("other"))
        fill(here, {"run.json": "second"})
    assert store.read(key(uri, "run.json")) == b"first"
    assert json.loads(store.read(key(uri, "lock.json")))["token"] == "other"


def test_a_folder_of_others_in_the_store_is_no_run(store: Store, tmp_path: Path, uri: str) -> None:
    stranger = machine(tmp_path, "one", uri)
    fill(stranger, {"thesis.doc": "x"})
    mirror.push(stranger)
    other = machine(tmp_path, "two", uri)
    with (
        pytest.raises(InputError, match=r"holds other files \(thesis.doc\) and is no medlora run"),
        mirror.hold_run(other),
    ):
        pass
    assert store.list(key(uri, "")) == [key(uri, "thesis.doc")]


def test_a_worker_that_does_not_see_the_driver_s_folder_says_so(store: Store, tmp_path: Path, uri: str) -> None:
    for here, elsewhere in (
        (machine(tmp_path, "one", uri), machine(tmp_path, "two", f"{uri}-other")),
        (tmp_path / "mount", tmp_path / "another mount"),
    ):
        nonce = mirror.leave_nonce(here)
        mirror.check_seen(here, nonce)
        for folder, told in ((elsewhere, nonce), (here, "of an earlier driver")):
            with pytest.raises(InputError, match="does not see there what the driver wrote.*must be a mount"):
                mirror.check_seen(folder, told)


def test_adapters_in_a_store_are_what_a_run_begins_from_and_what_is_scored(
    store: Store, finished: Path, tmp_path: Path, uri: str
) -> None:
    from medlora.config.evaluation import EvaluateConfig
    from medlora.curriculum.chains import start_chain
    from medlora.evaluation.stages import find_stages

    there = machine(tmp_path, "owner", f"{uri}/mine")
    shutil.copytree(RunFolder(finished).phase("00").adapter, there / "adapter")
    mirror.push(there)
    phase = {"name": "00", "chain": "stack", "sources": [{"source": "miniature:text"}]}
    cache = {"storage": {"cache": str(tmp_path / "cache")}}
    config = {"name": "x", "base": {"model": "miniature"}, "start": [f"{uri}/mine"], "phases": [phase], **cache}
    (link,) = start_chain(RunConfig.model_validate(config))
    whole = (there / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (Path(link.folder) / "adapter_model.safetensors").read_bytes() == whole
    # A worker elsewhere fetches it by the link's path alone.
    shutil.rmtree(tmp_path / "cache")
    mirror.pull(Path(link.folder))
    assert (Path(link.folder) / "adapter_model.safetensors").read_bytes() == whole
    tests = [{"name": "t", "source": "miniature:mcq/dev"}]
    scored = {"name": "x", "base": {"model": "miniature"}, "evaluation": {"tests": tests}, **cache}
    stages = [{"name": "mine", "adapters": [f"{uri}/mine/adapter"]}]
    found = find_stages(EvaluateConfig.model_validate({**scored, "stages": stages}))
    assert (Path(found["mine"][0].folder) / "adapter_model.safetensors").read_bytes() == whole
    stages = [{"name": "mine", "adapters": [f"{uri}/none"]}]
    with pytest.raises(
        InputError, match=rf"stages.0.adapters.0: {uri}/none: no adapter here; looked for .*{uri}/none/"
    ):
        find_stages(EvaluateConfig.model_validate({**scored, "stages": stages}))


def fail(fault: str, where: str, times: int) -> Rule:
    """The first `times` writes to a path that holds `where` fail."""
    failed = [0]

    def rule(method: str, path: str, count: int) -> str | None:
        if method in ("PUT", "POST") and where in path and failed[0] < times:
            failed[0] += 1
            return fault
        return None

    return rule


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_a_store_that_stumbles_is_asked_again(store: Store, tmp_path: Path, uri: str, fault: str) -> None:
    here = machine(tmp_path, "one", uri)
    fill(here, {"w.bin": "w" * 100_000, "manifest.json": "m"})
    store.rule = fail(fault, "w.bin", 2 if store.scheme == "gs" else 4)  # S3's client itself tries three times
    mirror.push(here)
    assert store.read(key(uri, "w.bin")) == b"w" * 100_000


@pytest.mark.parametrize(("fault", "said"), [("403", "ACCESS_DENIED|PERMISSION_DENIED"), ("503", "after 3 tries")])
def test_a_store_that_fails_for_good_keeps_what_was_whole(
    store: Store, tmp_path: Path, uri: str, fault: str, said: str
) -> None:
    here, there = machine(tmp_path, "one", uri), machine(tmp_path, "two", uri)
    for step in (2, 4):
        fill(here, {f"checkpoint-{step}/w.bin": f"weights {step}", f"checkpoint-{step}/o.bin": "o" * step})
        commit(here / f"checkpoint-{step}", {"step": step})
        if step == 2:
            mirror.push(here)
    store.rule = fail(fault, "checkpoint-4/w.bin", 10**6)
    with pytest.raises(InputError, match=said) as error:
        mirror.push(here)
    assert f"{uri}/checkpoint-4/w.bin" in str(error.value) and "give the same command again" in str(error.value)
    assert not [name for name in store.list(key(uri, "")) if name.endswith("checkpoint-4/manifest.json")]
    mirror.pull(there)
    manifest = read_manifest(there / "checkpoint-2")
    assert manifest and check_files(there / "checkpoint-2", manifest) is None
    assert read_manifest(there / "checkpoint-4") is None
    store.rule = lambda method, path, count: None
    mirror.push(here)
    mirror.pull(there)
    manifest = read_manifest(there / "checkpoint-4")
    assert manifest and check_files(there / "checkpoint-4", manifest) is None


@GS_SLOW
def test_a_phase_goes_through_faults_and_from_machine_to_machine_with_the_same_bytes(
    store: Store, bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, uri: str
) -> None:
    from tests.support.tiny_run import configure, run_all, weights

    config = configure(bases["gemma"], data)
    counts = {"all": 0}

    def stumble(method: str, path: str, count: int) -> str | None:
        """Every seventh write gets a 503, every eleventh is cut off (of Google's storage, whose client waits a second after
        each, half as many); in the end the second checkpoint is denied."""
        if method not in ("PUT", "POST"):
            return None
        counts["all"] += 1
        if "checkpoint-4" in path and "optimizer.pt" in path:
            return "403"
        rarer = 2 if store.scheme == "gs" else 1
        return "503" if counts["all"] % (7 * rarer) == 0 else "drop" if counts["all"] % (11 * rarer) == 0 else None

    here, there = machine(tmp_path, "one", uri), machine(tmp_path, "two", uri)
    store.rule = stumble
    with pytest.raises(
        InputError,
        match="checkpoint-4/optimizer.pt: the store does not answer as it should: .*(ACCESS|PERMISSION)_DENIED",
    ):
        run_all(config, here, ("00",))
    assert counts["all"] > 22
    shutil.rmtree(tmp_path / "one")  # that machine is gone
    store.rule = fail("503", "", 2)  # of the three tries for what is pushed first, alone
    manifest = run_all(config, there, ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 2
    assert weights(there, "00") == weights(finished, "00")
    log = store.read(key(uri, "phases/00/phase.log")).decode()
    assert "normal resumes from step 2 of" in log and log.count("phase 00 (new) on") == 2
    # The next phase, on a third machine, finds its parent in the store.
    third = machine(tmp_path, "three", uri)
    mirror.pull(third, exclude=("checkpoints",))
    run_all(config, third, ("01",))
    assert weights(third, "01") == weights(finished, "01")
    kept = {
        name.removeprefix(key(uri, "phases/")) for name in store.list(key(uri, "phases/")) if not name.endswith("/")
    }
    assert not [name for name in kept if "checkpoint" in name]
    assert {"00/manifest.json", "00/adapter/adapter_model.safetensors", "01/manifest.json"} <= kept
    whole = store.read(key(uri, "phases/01/adapter/adapter_model.safetensors"))
    assert whole == weights(finished, "01")


def run_job(job: str, env: dict[str, str], *arguments: str, code: int = 0) -> str:
    command = [sys.executable, f"jobs/{job}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def answer_in_one_pass(base: str, run: Path, evaluation: EvaluationConfig, folder: Path) -> bytes:
    """predictions.parquet of the base and the first two phases of a run, by one model that holds all their adapters."""
    from medlora.answering.stage_model import StageModel
    from medlora.config.model import BaseModelConfig
    from medlora.curriculum.chains import Link

    links = {name: Link(name=name, folder=str(RunFolder(run).phase(name).adapter)) for name in ("00", "01")}
    stages = {"base": [], "00": [links["00"]], "01": [links["01"]]}
    tests = read_tests(evaluation)
    model = StageModel(BaseModelConfig(model=base), stages, evaluation)
    answers = [
        prediction
        for batch in plan_batches(tests, evaluation.batch_size or 32, list(stages))
        for prediction in model.answer([test for test, _ in batch.questions], [record for _, record in batch.questions])
    ]
    write_predictions(folder / "p.parquet", sort_predictions(answers, list(stages), tests))
    return (folder / "p.parquet").read_bytes()


@ON_S3
def test_a_curriculum_and_an_evaluation_live_in_the_store(
    store: Store,
    bases: dict[str, str],
    data: Path,
    finished: Path,
    tmp_path: Path,
    local_ray: dict[str, str],
    uri: str,
) -> None:
    """Its first stages are scored while later phases train; the predictions are those of one pass over all stages."""
    from tests.support.tiny_run import configure, weights

    two = configure(bases["gemma"], data)
    config = two.model_copy(update={"phases": two.phases[:2]}).model_dump(mode="json")
    shutil.copy(data / "mcq.jsonl", tmp_path / "test.jsonl")
    config["evaluation"] = {"tests": [{"name": "mcq", "source": str(tmp_path / "test.jsonl")}], "batch_size": 8}
    config["evaluation"]["beside_training"] = True
    config["storage"] = {"folder": uri, "cache": None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ("--config", str(tmp_path / "c.yaml"))
    home, other = tmp_path / "home", tmp_path / "other"
    env = run_env(store, home) | local_ray
    stumble = fail("503", "optimizer.pt", 2)

    def dawdle(method: str, path: str, count: int) -> str | None:
        """Phase 01 is a few steps: its checkpoints take their time until the base is scored beside it."""
        if method == "PUT" and "phases/01/checkpoints" in path:
            logs = [log.read_text(encoding="utf-8") for log in home.rglob("run.log")]
            time.sleep(0 if any("scored beside the training" in log for log in logs) else 2)
        return stumble(method, path, count)

    store.rule = dawdle
    said = run_job("curriculum", env, *arguments)
    assert f"run: {uri}/tiny\n" in said
    early, there = (
        re.findall(r"(\w+)  scored beside the training", said),
        re.search(r"(\d+) answers are there", said),
    )
    assert early in (["base"], ["base", "00"]) and there and int(there[1]) >= 24 * len(early)
    evaluation = RunConfig.model_validate(config).evaluation
    assert evaluation
    predictions = store.read(key(uri, "tiny/evaluation/predictions.parquet"))
    assert predictions == answer_in_one_pass(bases["gemma"], finished, evaluation, tmp_path)
    for phase in ("00", "01"):
        name = f"tiny/phases/{phase}/adapter/adapter_model.safetensors"
        assert store.read(key(uri, name)) == weights(finished, phase)
    kept = store.list(key(uri, "tiny/"))
    assert {key(uri, f"tiny/{name}") for name in ("run.json", "run.log", "data.json", "config.yaml")} <= set(kept)
    assert key(uri, "tiny/evaluation/report.html") in kept and key(uri, "tiny/evaluation/manifest.json") in kept
    assert not [name for name in kept if "lock" in name or "ledger" in name or re.search("checkpoint-.*[^/]$", name)]
    # Another machine finds all of it done; a difference is refused there as it is here.
    stranger = {**env, "HOME": str(other)}
    assert "everything is done already" in run_job("curriculum", stranger, *arguments)
    said = run_job("curriculum", stranger, *arguments, "--set", "phases.01.learning_rate=5e-3", code=2)
    assert "phases.01.learning_rate: was 0.01, now 0.005" in said

    evaluate = {
        "name": "scored",
        "base": config["base"],
        "stages": [f"{uri}/tiny:base,01"],
        "evaluation": {"tests": config["evaluation"]["tests"], "batch_size": 8},
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(evaluate), encoding="utf-8")
    chosen = ("--config", str(tmp_path / "e.yaml"), "--out", f"{uri}/scored")
    assert f"evaluation: {uri}/scored\n" in run_job("evaluate_mcq", stranger, *chosen)
    assert store.read(key(uri, "scored/predictions.parquet"))[:4] == b"PAR1"
    assert "everything is done already" in run_job("evaluate_mcq", env, *chosen)
    said = run_job("evaluate_mcq", env, *chosen, "--set", "seed=1", code=2)
    assert "holds another evaluation" in said


def test_a_store_that_denies_ends_a_run_with_one_message(store: Store, data: Path, tmp_path: Path, uri: str) -> None:
    phase = {"name": "00", "chain": "new", "sources": [{"source": str(data / "text.jsonl")}]}
    config = {"name": "x", "base": {"model": "miniature"}, "phases": [phase], "storage": {"folder": uri}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    store.rule = lambda method, path, count: "403"
    said = run_job("curriculum", run_env(store, tmp_path), "--config", str(tmp_path / "c.yaml"), code=2)
    assert f"{uri}/x" in said and "_DENIED" in said and said.startswith("medlora: ")
