"""A phase from records to adapter, without Ray, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medlora.config.phase import PhaseConfig
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain
from medlora.curriculum.jobs import make_job
from medlora.errors import InputError
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import check_files, read_manifest
from medlora.training.callbacks import Leaving
from medlora.training.phase import run_phase
from medlora.training.trainer import _AdapterTrainer, find_checkpoint
from tests.support.tiny_run import configure, run_all, weights


class Killed(BaseException):
    """What a test raises in the middle of a phase."""


@pytest.mark.parametrize("family", ["medgemma", "llama"])
def test_the_curriculum_runs_on_every_family(family: str, bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    manifests = run_all(configure(bases[family], data), tmp_path)
    assert [m["chain"] for m in manifests.values()] == [["00"], ["01"], ["01", "02"]]
    tensors = load_file(RunFolder(tmp_path).phase("02").adapter / "adapter_model.safetensors")
    assert tensors and not any("vision" in name for name in tensors)


def test_the_folder_holds_what_the_manifest_says(finished: Path) -> None:
    folder = RunFolder(finished).phase("01")
    manifest = read_manifest(folder.root)
    assert manifest is not None and check_files(folder.root, manifest) is None
    assert not folder.checkpoints.exists()
    assert {"adapter/adapter_model.safetensors", "adapter/tokenizer.json", "metrics.jsonl"} <= set(manifest["files"])
    assert all(path.is_file() and path.name not in manifest["files"] for path in folder.logs)
    assert manifest["chain"] == ["01"] and manifest["segments"][0]["steps"] == 6
    rows = read_json_lines(folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert all({"loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_mib"} <= set(row) for row in rows)


def test_shares_and_counts_are_recorded(finished: Path) -> None:
    counts = (read_manifest(RunFolder(finished).phase("01").root) or {})["counts"]["normal"]
    assert {key.split(":")[0]: part["examples"] for key, part in counts.items()} == {"0": 20, "1": 24, "00.0": 40}


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    run_all(configure(bases["gemma"], data), tmp_path / "same", ("00",))
    run_all(configure(bases["gemma"], data, seed=1), tmp_path / "other", ("00",))
    assert weights(tmp_path / "same", "00") == weights(finished, "00") != weights(tmp_path / "other", "00")


def test_validation_is_written_and_changes_nothing_of_the_training(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    rows = read_json_lines(RunFolder(finished).phase("02").validation)
    assert [row["step"] for row in rows] == [6] and 0 <= rows[0]["accuracy"] <= 1
    config = configure(bases["gemma"], data, p02={"validation": None})
    (tmp_path / "phases").mkdir()
    for name in ("00", "01"):
        (tmp_path / "phases" / name).symlink_to(finished / "phases" / name)
    run_all(config, tmp_path, ("02",))
    assert weights(tmp_path, "02") == weights(finished, "02")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
@pytest.mark.parametrize("killed_at", [1, 4, 5])
def test_a_phase_killed_in_the_middle_ends_with_the_bytes_of_an_undisturbed_one(
    bases: dict[str, str], data: Path, tmp_path: Path, killed_at: int, optimizer: str
) -> None:
    config = configure(bases["gemma"], data, p00={"optimizer": optimizer, "log_every_steps": 1})

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == killed_at:
            raise Killed

    run_all(config, tmp_path / "whole", ("00",))
    with pytest.raises(Killed):
        run_all(config, tmp_path / "killed", ("00",), kill)
    assert read_manifest(RunFolder(tmp_path / "killed").phase("00").root) is None
    manifest = run_all(config, tmp_path / "killed", ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == {1: None, 4: 2, 5: 4}[killed_at]
    assert weights(tmp_path / "killed", "00") == weights(tmp_path / "whole", "00")
    steps = [row["step"] for row in read_json_lines(RunFolder(tmp_path / "killed").phase("00").metrics)]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "manifest.json"]
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, lost: str
) -> None:
    config = configure(bases["gemma"], data, p00={"log_every_steps": 1})

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run_all(config, tmp_path, ("00",), kill)
    (RunFolder(tmp_path).phase("00").checkpoints / "normal" / "checkpoint-4" / lost).unlink()
    manifest = run_all(config, tmp_path, ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 2
    assert weights(tmp_path, "00") == weights(finished, "00")


def test_scores_that_were_lost_come_back_from_the_checkpoint(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    """Else a worse score after the checkpoint would pass for the best, and its adapter be kept."""
    dev = {"sources": [{"source": str(data / "dev.jsonl")}], "sample": 4, "max_tokens": 8, "scoring": "letter"}
    validation = {**dev, "every_steps": 1, "keep_best": True}
    config = configure(bases["gemma"], data, p00={"log_every_steps": 1, "validation": validation})
    run_all(config, tmp_path / "whole", ("00",))

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run_all(config, tmp_path / "torn", ("00",), kill)
    scores = RunFolder(tmp_path / "torn").phase("00").validation
    assert len(read_json_lines(scores)) >= 4
    scores.write_bytes(scores.read_bytes()[:40])
    manifest = run_all(config, tmp_path / "torn", ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 4
    assert weights(tmp_path / "torn", "00") == weights(tmp_path / "whole", "00")
    whole = RunFolder(tmp_path / "whole").phase("00").validation
    assert scores.read_bytes() == whole.read_bytes()


def test_the_full_prompt_gives_way_to_the_normal_one_at_its_step_budget(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    validation = {
        "sources": [{"source": str(data / "dev.jsonl")}],
        "sample": 2,
        "max_tokens": 8,
        "scoring": "reason",
        "every_steps": 2,
    }
    full = {"records": 5, "max_steps": 3, "until_format_score": 1.0}
    config = configure(bases["gemma"], data, p02={"full_prompt": full, "validation": validation, "max_tokens": 400})
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "01").symlink_to(finished / "phases" / "01")
    notes: list[str] = []
    manifest = run_all(config, tmp_path, ("02",), lambda event: notes.append(event.get("text", "")))["02"]
    assert [(s["segment"], s["steps"]) for s in manifest["segments"]] == [("full", 3), ("normal", 6)]
    counts = manifest["counts"]
    assert (
        next(iter(counts["full"].values()))["examples"] == 5 and next(iter(counts["normal"].values()))["examples"] == 24
    )
    assert next(iter(counts["full"].values()))["longest"] > next(iter(counts["normal"].values()))["longest"]
    assert any("switches to the normal prompt after 3 steps: the step budget is spent" in note for note in notes)


def test_the_full_prompt_ends_early_once_the_format_is_learned_and_resumes_as_ended(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.training.validation import Validator

    monkeypatch.setattr(Validator, "score", lambda *_, **__: {"accuracy": 0.5, "format_score": 0.75, "score": 0.5})
    validation = {"sources": [{"source": str(data / "dev.jsonl")}], "scoring": "reason", "every_steps": 2}
    full = {"records": 5, "max_steps": 50, "until_format_score": 0.7}
    config = configure(
        bases["gemma"],
        data,
        p02={"full_prompt": full, "validation": validation, "max_tokens": 400, "log_every_steps": 1},
    )

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["segment"] == "normal" and event["step"] == 3:
            raise Killed

    for name in ("whole", "killed"):
        (tmp_path / name / "phases").mkdir(parents=True)
        (tmp_path / name / "phases" / "01").symlink_to(finished / "phases" / "01")
    manifest = run_all(config, tmp_path / "whole", ("02",))["02"]
    assert [(s["steps"], s["stopped_early"]) for s in manifest["segments"]] == [(2, True), (6, False)]
    with pytest.raises(Killed):
        run_all(config, tmp_path / "killed", ("02",), kill)
    again = run_all(config, tmp_path / "killed", ("02",))["02"]
    assert [(s["steps"], s["stopped_early"]) for s in again["segments"]] == [(2, True), (6, False)]
    assert weights(tmp_path / "killed", "02") == weights(tmp_path / "whole", "02")


def test_the_best_adapter_is_kept_if_asked(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.training.validation import Validator

    dev = {"sources": [{"source": str(data / "dev.jsonl")}], "every_steps": 2, "keep_best": True}
    for name, falling in (("best", [0.2, 0.9, 0.3]), ("last", [0.1, 0.2, 0.3])):
        left = iter(falling)
        monkeypatch.setattr(Validator, "score", lambda *_, left=left, **__: {"accuracy": 0.0, "score": next(left)})
        config = configure(bases["gemma"], data, p00={"validation": dev, "epochs": 1, "max_steps": 6, "packing": False})
        manifest = run_all(config, tmp_path / name, ("00",))["00"]
        assert manifest["best"]["step"] == {"best": 4, "last": 6}[name]
    four = configure(bases["gemma"], data, p00={"packing": False})

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        run_all(four, tmp_path / "four", ("00",), kill)
    checkpoint = (
        RunFolder(tmp_path / "four").phase("00").checkpoints / "normal" / "checkpoint-4" / "adapter_model.safetensors"
    )
    assert (
        load_file(checkpoint).keys()
        == load_file(tmp_path / "best" / "phases" / "00" / "adapter" / "adapter_model.safetensors").keys()
    )
    assert weights(tmp_path / "best", "00") == checkpoint.read_bytes() != weights(tmp_path / "last", "00")


def test_accumulation_gives_the_gradients_of_the_whole_batch(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    """Completions of 1 and of 20 tokens weigh by their tokens, however the batch is cut."""
    losses = []
    for n, (batch, accumulation) in enumerate([(8, 1), (2, 4), (1, 8)]):
        config = configure(bases["gemma"], data, lora={"r": 4, "alpha": 8})
        phase = config.phases[2].model_copy(
            update={
                "name": "mcq",
                "chain": "new",
                "batch_size": batch,
                "accumulation": accumulation,
                "validation": None,
            }
        )
        config = config.model_copy(update={"phases": (phase,)})
        run_all(config, tmp_path / str(n), ("mcq",))
        losses.append(
            [
                (row["loss"], row["grad_norm"])
                for row in read_json_lines(RunFolder(tmp_path / str(n)).phase("mcq").metrics)
            ]
        )
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[0]), atol=1e-4, rtol=1e-3)


def test_the_same_global_batch_gives_the_same_curve(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    """Whatever the rows of a pass, from one to all of them; larger steps than these enlarge the rounding of sums, too."""
    curves = []
    for size in ("auto", 1, 4, 12):
        config = configure(bases["gemma"], data, lora={"r": 4, "alpha": 8})
        phase = {**config.phases[2].model_dump(mode="json"), "name": "mcq", "chain": "new", "validation": None}
        phase |= {"global_batch": 12, "batch_size": size, "max_steps": 4, "log_every_steps": 1, "learning_rate": 1e-3}
        del phase["accumulation"]
        config = config.model_copy(update={"phases": (PhaseConfig.model_validate(phase),)})
        (manifest,) = run_all(config, tmp_path / str(size), ("mcq",)).values()
        (segment,) = manifest["segments"]
        expected = 2 if size == "auto" else size
        assert (segment["batch_size"], segment["accumulation"]) == (expected, 12 // expected)
        curves.append([row["loss"] for row in read_json_lines(RunFolder(tmp_path / str(size)).phase("mcq").metrics)])
    assert len(curves[0]) == 4
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-6)


@pytest.mark.parametrize("fails_at", [1, 12])
def test_out_of_memory_halves_the_batch_and_ends_with_the_same_adapter(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Before the first checkpoint, and behind the one of step 4; more than 3 sequences do not fit."""
    config = configure(bases["gemma"], data, lora={"r": 4, "alpha": 8}, p02={"batch_size": 6, "accumulation": 2})
    phase = config.phases[2].model_copy(update={"name": "mcq", "chain": "new", "validation": None})
    config = config.model_copy(update={"phases": (phase,)})
    run_all(config, tmp_path / "whole", ("mcq",))

    compute, calls = _AdapterTrainer.compute_loss, 0

    def fail(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        segments = inputs["plan"].segments
        rows = len(segments) - (segments[-1][2] > 0)  # where the rows share a beginning, it is a segment of its own
        if calls >= fails_at and rows > 3:
            raise torch.OutOfMemoryError("made up")
        return compute(self, model, inputs, *more, **options)

    monkeypatch.setattr(_AdapterTrainer, "compute_loss", fail)
    events: list[dict[str, Any]] = []
    (manifest,) = run_all(config, tmp_path / "halved", ("mcq",), events.append).values()
    assert [e["text"] for e in events if "out of memory" in e.get("text", "")] == [
        "out of memory: batch_size 6 becomes 3, accumulation 2 becomes 4; the global batch stays"
    ]
    assert (manifest["segments"][0]["batch_size"], manifest["segments"][0]["accumulation"]) == (3, 4)
    assert manifest["segments"][0]["steps"] == 6
    assert (manifest["segments"][0]["resumed_from_step"] or 0) == (0 if fails_at == 1 else 4)
    whole, halved = (
        load_file(RunFolder(tmp_path / name).phase("mcq").adapter / "adapter_model.safetensors")
        for name in ("whole", "halved")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(halved[name], tensor, atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 8}, "phases.01.max_tokens: every example is longer than 8 tokens"),
        ({"learning_rate": 1e30, "log_every_steps": 1, "warmup_ratio": 0.0}, "phase 01, step .: the loss is"),
    ],
)
def test_what_only_the_user_can_mend_is_said_with_its_key(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    only = {"sources": [{"source": str(data / "mcq.jsonl")}], "replay": []}
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "00").symlink_to(finished / "phases" / "00")
    with pytest.raises(InputError, match=said):
        run_all(configure(bases["gemma"], data, p01={**only, **change}), tmp_path, ("01",))


def test_a_divergence_that_validation_sees_first_is_said_the_same_way(
    bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    validation = {"sources": [{"source": str(data / "dev.jsonl")}], "every_steps": 1, "sample": 4}
    diverging = {"learning_rate": 1e30, "log_every_steps": 50, "warmup_ratio": 0.0, "chain": "new"}
    phase = {**diverging, "max_steps": 4, "train_extra_tokens": True, "validation": validation}
    config = configure(bases["gemma"], data, p02=phase)
    config = config.model_copy(update={"phases": config.phases[2:]})
    with pytest.raises(
        InputError, match="phase 02, step .: the model's log-likelihoods.*lower phases.02.learning_rate"
    ):
        run_all(config, tmp_path, ("02",))


def test_a_tokenizer_without_the_letters_is_refused_before_the_model_is_loaded(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlora.training.phase.load_base", lambda *_: pytest.fail("the model was loaded"))
    config = configure(bases["gemma"], data)
    broken = tmp_path / "base"
    broken.mkdir()
    for file in Path(bases["gemma"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "A"}, "content": "에이"}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    phase = config.phases[2].model_copy(update={"chain": "new", "validation": None})
    config = config.model_copy(
        update={"base": config.base.model_copy(update={"model": str(broken)}), "phases": (phase,)}
    )
    with pytest.raises(InputError, match="cannot answer 'A'"):
        run_all(config, tmp_path / "run", ("02",))


def test_the_chain_of_a_stage_is_what_the_phases_did() -> None:
    link = {name: Link(name=name, folder=f"/{name}") for name in ("00", "01", "02")}
    config = configure("m", Path("/d"))
    new, onward, stack = config.phases
    assert extend_chain((), new, Path("/00")) == (link["00"],)
    assert extend_chain((link["00"],), onward, Path("/01")) == (link["01"],)
    assert extend_chain((link["01"],), stack, Path("/02")) == (link["01"], link["02"])
    assert extend_chain((link["00"], link["01"]), onward.model_copy(update={"name": "02"}), Path("/02")) == (
        link["00"],
        link["02"],
    )
    assert extend_chain((link["01"],), new, Path("/00")) == (link["00"],)


def test_a_curriculum_goes_on_from_adapters_of_elsewhere(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    """An adapter folder as the replaced scripts left it (`lora_adapter/` inside) is continued as if it were a phase's."""
    import shutil

    from medlora.curriculum.chains import start_chain

    shutil.copytree(RunFolder(finished).phase("00").adapter, tmp_path / "old" / "lora_adapter")
    config = configure(bases["gemma"], data)
    raw = {
        **config.model_dump(mode="json"),
        "start": [str(tmp_path / "old")],
        "phases": [p.model_dump(mode="json") for p in config.phases[1:]],
    }
    raw["phases"][0] |= {"replay": [], "train_extra_tokens": True}
    started = RunConfig.model_validate(raw)
    chain = start_chain(started)
    manifest = run_phase(
        make_job(started, started.phases[0], chain), RunFolder(tmp_path / "run").phase("01"), lambda event: None
    )
    assert manifest["chain"] == ["01"] and manifest["fingerprint"]["parent"]
    frozen = load_file(tmp_path / "old" / "lora_adapter" / "adapter_model.safetensors")
    trained = load_file(tmp_path / "run" / "phases" / "01" / "adapter" / "adapter_model.safetensors")
    assert frozen.keys() == trained.keys() and any(not torch.equal(frozen[name], trained[name]) for name in frozen)
    with pytest.raises(InputError, match=r"start.0: .*no adapter here; looked for adapter_config.json in"):
        start_chain(started.model_copy(update={"start": (str(tmp_path),)}))


def test_a_disk_that_fills_up_is_said_and_the_phase_goes_on_once_there_is_room(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        config = configure(bases["gemma"], data)
        with pytest.raises(InputError, match="the disk is full; make room and give the same command again"):
            run_all(config, small, ("00",))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run_all(config, small, ("00",))
        assert weights(small, "00") == weights(finished, "00")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_phase_that_must_leave_its_node_goes_on_from_where_it_left(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    config = configure(bases["gemma"], data, p00={"checkpoint_every_steps": 100})
    job, folder = make_job(config, config.phases[0], ()), RunFolder(tmp_path).phase("00")
    asked = iter([False, False, True])
    with pytest.raises(Leaving):
        run_phase(job, folder, lambda event: None, is_leaving=lambda: next(asked))
    assert find_checkpoint(folder.checkpoints / "normal") == folder.checkpoints / "normal" / "checkpoint-3"
    said: list[str] = []
    run_phase(job, folder, lambda event: said.append(event.get("text", "")), is_leaving=lambda: False)
    assert "resumes from step 3 of 6" in said
    assert weights(tmp_path, "00") == weights(finished, "00")
