"""Numbers that are not finite: found at their step, never saved, and left behind by the next attempt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medlora.config.run import RunConfig
from medlora.model.adapter_files import find_non_finite, write_adapter
from medlora.runs.folders import PhaseFolder, RunFolder
from medlora.runs.manifests import commit, read_manifest
from medlora.training import trainer
from medlora.training.divergence import Diverged, StepWatch
from medlora.training.segment import Segment
from medlora.training.trainer import _AdapterTrainer, find_checkpoint
from tests.support.tiny_run import configure, run_all, weights


class Killed(BaseException):
    """What a test raises in the middle of a phase."""


def break_at(patch: pytest.MonkeyPatch, step: int, what: str, passes: int = 1, value: float = math.nan) -> None:
    """Give step number `step` a gradient, or its forward pass number `passes` a loss, that is not finite."""
    before, seen = _AdapterTrainer.training_step, 0

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        loss = before(self, *arguments, **options)
        if self.state.global_step == step - 1:
            seen += 1
            trained = [p for p in self.model.parameters() if p.requires_grad]
            if what == "gradient":
                trained[0].grad.view(-1)[0] = value
            elif seen == passes:
                self.watch.losses[-1] = torch.tensor(value)
                trained[0].grad.view(-1)[0] = value
        return loss

    patch.setattr(_AdapterTrainer, "training_step", training_step)


def checkpoints(folder: Path) -> Path:
    return RunFolder(folder).phase("00").checkpoints / "normal"


def poison(checkpoint: Path) -> None:
    """Seal NaN into a checkpoint, as versions before this check did."""
    path = checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, path)
    commit(checkpoint, {"step": 4})


def kill_at(step: int) -> Any:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Killed

    return kill


@pytest.mark.parametrize(
    ("step", "what", "value", "resumed"),
    [(6, "gradient", math.nan, 4), (5, "gradient", math.inf, 4), (5, "loss", math.nan, 2), (1, "loss", math.inf, None)],
)
def test_a_step_that_is_not_finite_ends_the_phase_and_the_next_attempt_gives_the_same_bytes(
    bases: dict[str, str],
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    what: str,
    value: float,
    resumed: int | None,
) -> None:
    """A gradient of a finite loss leaves the checkpoint before it usable; of a loss, only the one before that."""
    config = configure(bases["gemma"], data, p00={"log_every_steps": 4, "packing": True})
    with monkeypatch.context() as patch:
        break_at(patch, step, what, value=value)
        with pytest.raises(Diverged) as raised:
            run_all(config, tmp_path, ("00",))
    said = str(raised.value)
    assert f"phase 00, step {step}: the {'loss is' if what == 'loss' else 'gradient norm is'} " in said
    assert "learning rate " in said and "Records of the batch: " in said and "text.jsonl: " in said
    assert "lower phases.00.learning_rate" in said and "--redo 00" in said
    assert f"resumes from {f'step {resumed}' if resumed else 'the beginning'}," in said
    phase = RunFolder(tmp_path).phase("00")
    assert read_manifest(phase.root) is None and not phase.adapter.exists()
    told: list[str] = []
    manifest = run_all(config, tmp_path, ("00",), lambda event: told.append(event.get("text", "")))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == resumed
    assert any(text.startswith(f"step {step} diverged before (the ") for text in told)
    assert weights(tmp_path, "00") == weights(finished, "00")
    assert not any("diverged" in name for name in manifest["files"])


def test_a_divergence_that_comes_again_ends_the_same_way_each_time(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(bases["gemma"], data)
    for _ in range(3):
        with monkeypatch.context() as patch:
            break_at(patch, 4, "loss")
            with pytest.raises(Diverged, match="phase 00, step 4: the loss is nan"):
                run_all(config, tmp_path, ("00",))
    assert run_all(config, tmp_path, ("00",))["00"]["finished"]


def test_a_kill_after_the_resume_keeps_the_checkpoints_made_since(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(bases["gemma"], data, p00={"log_every_steps": 1})
    with monkeypatch.context() as patch:
        break_at(patch, 3, "loss")
        with pytest.raises(Diverged):
            run_all(config, tmp_path, ("00",))
    with pytest.raises(Killed):
        run_all(config, tmp_path, ("00",), kill_at(5))
    manifest = run_all(config, tmp_path, ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 4
    assert weights(tmp_path, "00") == weights(finished, "00")


def test_only_the_forward_pass_with_the_broken_loss_is_named(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(bases["gemma"], data, lora={"r": 4, "alpha": 8}, p02={"batch_size": 2, "accumulation": 4})
    phase = config.phases[2].model_copy(update={"name": "mcq", "chain": "new", "validation": None})
    config = config.model_copy(update={"phases": (phase,)})
    drawn: list[Segment] = []
    original = trainer.StepWatch

    def watch(phase: Any, segment: Segment, *more: Any) -> StepWatch:
        drawn.append(segment)
        return original(phase, segment, *more)

    monkeypatch.setattr(trainer, "StepWatch", watch)
    break_at(monkeypatch, 2, "loss", passes=3)
    with pytest.raises(Diverged) as raised:
        run_all(config, tmp_path, ("mcq",))
    named = str(raised.value).split("Records of the batch: ")[1].split(". Nothing")[0].split("; ")
    segment = drawn[0]
    assert segment.name_rows is not None
    assert named == segment.name_rows([8 + 2 * 2, 8 + 2 * 2 + 1])
    ids = {json.loads(line)["id"] for line in (data / "mcq.jsonl").read_text(encoding="utf-8").splitlines()}
    assert all(name.rpartition(": ")[2] in ids for name in named)


def test_a_checkpoint_of_nan_that_was_sealed_earlier_is_not_resumed_from(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    config = configure(bases["gemma"], data, p00={"log_every_steps": 1})
    with pytest.raises(Killed):
        run_all(config, tmp_path, ("00",), kill_at(5))
    poison(checkpoints(tmp_path) / "checkpoint-4")
    told: list[str] = []
    manifest = run_all(config, tmp_path, ("00",), lambda event: told.append(event.get("text", "")))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 2
    assert any("checkpoint-4 is not used, since 1 of its tensors hold values that are not finite" in t for t in told)
    assert weights(tmp_path, "00") == weights(finished, "00")


def test_a_checkpoint_behind_a_loss_that_was_no_number_is_not_resumed_from(
    bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run_all(configure(bases["gemma"], data, p00={"log_every_steps": 1}), tmp_path, ("00",), kill_at(5))
    newest = checkpoints(tmp_path) / "checkpoint-4"
    state = json.loads((newest / "trainer_state.json").read_text())
    state["log_history"][-1]["loss"] = math.nan
    (newest / "trainer_state.json").write_text(json.dumps(state))
    commit(newest, {"step": 4})
    assert find_checkpoint(checkpoints(tmp_path)) == checkpoints(tmp_path) / "checkpoint-2"


def test_weights_that_overflow_in_the_last_step_are_not_saved(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.training.callbacks import LossLoggingCallback

    def overflow(self: Any, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 6:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.inf

    monkeypatch.setattr(LossLoggingCallback, "on_step_end", overflow)
    config: RunConfig = configure(bases["gemma"], data)
    with pytest.raises(Diverged, match="phase 00, step 6: behind the step 1 of .* trained tensors hold values that"):
        run_all(config, tmp_path, ("00",))
    monkeypatch.undo()
    manifest = run_all(config, tmp_path, ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_are_checked_whatever_their_types_and_sizes(tmp_path: Path, value: float) -> None:
    from peft import LoraConfig

    sound = {
        "large": torch.full((3,), 3e38),
        "half": torch.ones(2, dtype=torch.float16),
        "empty": torch.empty(0),
        "ids": torch.arange(3),
        "brain": torch.full((2, 2), 3e38, dtype=torch.bfloat16),
    }
    assert find_non_finite(sound) == [] == find_non_finite({})
    for name in ("large", "half", "brain"):
        broken = {key: tensor.clone() for key, tensor in sound.items()}
        broken[name].view(-1)[-1] = value
        assert find_non_finite(broken) == [name]
        with pytest.raises(FloatingPointError, match=f"1 of 5 trained tensors .* {name} among them"):
            write_adapter(tmp_path / "a", LoraConfig(), broken, None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_workers_agree_on_the_rows_and_one_alone_does_not_wait_for_the_others(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, two forward passes of four rows each: pass 1 of worker 1 holds rows 12 to 15 of the step's 16."""
    phase = configure(bases["gemma"], data).phases[0].model_copy(update={"accumulation": 2})
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    all_losses = [[1.0, 2.0], [3.0, math.nan]]
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: into.__setitem__(slice(None), all_losses))
    said = []
    for losses in all_losses:
        segment = Segment("normal", [None] * 160, 10, 10, name_rows=lambda rows: [f"row {row}" for row in rows])  # type: ignore[list-item]
        watch = StepWatch(phase, segment, PhaseFolder(tmp_path), 16)
        for loss in losses:
            watch.add(torch.tensor(loss))
        with pytest.raises(Diverged) as raised:
            watch.check(2, torch.tensor(math.nan), 1e-3)
        said.append(str(raised.value))
    assert said[0] == said[1] and "Records of the batch: row 28; row 29; row 30; row 31." in said[0]
    assert not (tmp_path / "checkpoints").exists()  # rank 0 alone writes the note
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: pytest.fail("the other worker is not there"))
    watch.add(torch.tensor(math.inf))
    with pytest.raises(Diverged, match="the loss is inf .*row 16; .*; and 8 more rows"):
        watch.check(2, torch.tensor(1.0), 1e-3)


def test_float16_may_skip_steps_but_not_for_ever(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    phase = configure(bases["gemma"], data).phases[0]
    watch = StepWatch(phase, Segment("normal", [], 100, 100), PhaseFolder(tmp_path), 4, torch.float16)

    def step(number: int, norm: float, loss: float = 1.0) -> None:
        watch.add(torch.tensor(loss))
        watch.check(number, torch.tensor(norm), 1e-3, scaled=True)

    for number in range(1, 21):
        step(number, math.inf)
    step(21, 1.0)
    with pytest.raises(Diverged, match="step 46: .*set base.compute_dtype to bfloat16"):
        for number in range(22, 60):
            step(number, math.inf)
    with pytest.raises(Diverged, match="step 61: the loss is nan"):
        step(61, math.inf, math.nan)
