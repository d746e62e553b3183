"""Training on a CUDA GPU: every path of a step beside the padded batch in float32, and what a run does around it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import PhaseConfig
from medlora.curriculum.jobs import make_job
from medlora.kernels import lora_forward, varlen
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import load_tokenizer
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from medlora.training.batches import Collator, FlatCollator, find_flat_obstacle
from medlora.training.callbacks import Leaving
from medlora.training.phase import run_phase
from medlora.training.trainer import _AdapterTrainer
from tests.support.batches import BATCHES, measure
from tests.support.tiny_run import configure

pytestmark = pytest.mark.gpu

STACKS = {
    "one adapter": [LoraSettings(r=4, alpha=8)],
    "a stack": [LoraSettings(r=4, alpha=8), LoraSettings(r=2, alpha=6, rslora=True)],
}


def build(folder: str, quantization: str, dtype: str, shapes: list[LoraSettings]) -> Any:
    base = BaseModelConfig(model=folder, quantization=quantization, compute_dtype=dtype)  # type: ignore[arg-type]
    model: Any = load_base(base, load_tokenizer(base), "cuda")
    for n, shape in enumerate(shapes):
        model = add_adapter(model, f"0{n}", shape, [], seed=n)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.train()


def compute_gradients(model: Any, collator: Any, name: str) -> torch.Tensor:
    """All gradients as one vector."""
    batch = {key: value.to("cuda") for key, value in collator(BATCHES[name]).items()}
    _, gradients = measure(model, batch)
    return torch.cat([gradients[key].float().flatten() for key in sorted(gradients)])


def has_varlen() -> bool:
    return varlen.find_obstacle(torch.device("cuda", 0), torch.bfloat16, 2, 1, 16) is None


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 4, 256), (32, 16, 128), (4, 1, 256), (2, 2, 64)])
def test_varlen_attention_passes_its_trial_on_a_new_card(heads: int, key_heads: int, size: int) -> None:
    device = torch.device("cuda", 0)
    why = varlen.find_obstacle(device, torch.bfloat16, heads, key_heads, size)
    assert (why is None) == (torch.cuda.get_device_capability(device) >= varlen.LEAST_CAPABILITY), why


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["gemma", "medgemma", "llama"])
def test_gradients_in_bfloat16_are_as_near_to_float32_as_the_plain_path_s(
    bases: dict[str, str], family: str, quantization: str, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain path is a padded batch with PEFT's own layers. Gemma's window is 8 tokens, and the shared beginning 21."""
    more = {"token_type_ids": family == "medgemma"}
    exact = build(bases[family], quantization, "float32", STACKS[stack])
    lean = build(bases[family], quantization, "bfloat16", STACKS[stack])
    if has_varlen():
        assert find_flat_obstacle(lean) is None
    for name in BATCHES:
        reference = compute_gradients(exact, Collator(0, **more), name)
        fast = compute_gradients(lean, FlatCollator(**more), name)
        with monkeypatch.context() as patch:
            patch.setattr(lora_forward, "_may_cast", lambda x: False)
            plain = compute_gradients(lean, Collator(0, **more), name)
        error, allowed = (fast - reference).norm(), 2 * (plain - reference).norm() + 2e-2 * reference.norm()
        assert error <= allowed, name


def test_fused_parts_are_taken_where_liger_is_installed(bases: dict[str, str]) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    model = build(bases["gemma"], "none", "bfloat16", STACKS["one adapter"])
    assert sum(hasattr(module, "fused_norm") or hasattr(module, "fused_gate") for module in model.modules()) >= 10
    assert hasattr(modeling_gemma3.apply_rotary_pos_emb, "is_fused")


def train(
    base: str, data: Path, folder: Path, is_leaving: Any = None, **keys: Any
) -> tuple[dict[str, Any], list[float]]:
    """A phase on questions, 12 rows a step; its segment's figures and its losses."""
    config = configure(base, data, lora={"r": 4, "alpha": 8})
    phase = {**config.phases[2].model_dump(mode="json"), "name": "mcq", "chain": "new", "validation": None}
    phase |= {"global_batch": 12, "batch_size": "auto", "log_every_steps": 1, "optimizer": "auto", **keys}
    del phase["accumulation"]
    config = config.model_copy(update={"phases": (PhaseConfig.model_validate(phase),)})
    place = RunFolder(folder).phase("mcq")
    manifest: Any = run_phase(make_job(config, config.phases[0], ()), place, lambda event: None, "cuda", is_leaving)
    return manifest["segments"][0], [row["loss"] for row in read_json_lines(place.metrics)]


def test_a_pass_takes_all_rows_and_the_curve_is_that_of_small_ones(
    bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    segment, whole = train(bases["gemma"], data, tmp_path / "auto")
    assert (segment["batch_size"], segment["accumulation"], segment["padding"] == 0.0) == (12, 1, has_varlen())
    assert segment["optimizer"] == "adamw_torch_fused"
    for size in (1, 4):
        _, losses = train(bases["gemma"], data, tmp_path / str(size), batch_size=size)
        assert losses == pytest.approx(whole, rel=2e-2)


@pytest.mark.parametrize("optimizer", ["auto", "paged_adamw_8bit"])
def test_a_phase_that_leaves_resumes_near_the_undisturbed_one(
    bases: dict[str, str], data: Path, tmp_path: Path, optimizer: str
) -> None:
    """Within rounding: the backward pass of attention adds in no fixed order."""
    _, whole = train(bases["gemma"], data, tmp_path / "whole", optimizer=optimizer)
    asked = iter([False, False, True])
    with pytest.raises(Leaving):
        train(bases["gemma"], data, tmp_path / "left", lambda: next(asked, False), optimizer=optimizer)
    segment, losses = train(bases["gemma"], data, tmp_path / "left", optimizer=optimizer)
    assert segment["resumed_from_step"] == 3
    assert segment["optimizer"] == ("adamw_torch_fused" if optimizer == "auto" else optimizer)
    assert losses == pytest.approx(whole, rel=2e-2)


def test_out_of_memory_halves_the_pass_and_keeps_the_curve(
    bases: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = train(bases["gemma"], data, tmp_path / "whole")
    compute = _AdapterTrainer.compute_loss

    def fail(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        plan = inputs.get("plan")
        if (len(inputs["input_ids"]) if plan is None else len(plan.segments) - 1) > 3:
            raise torch.OutOfMemoryError("made up")
        return compute(self, model, inputs, *more, **options)

    monkeypatch.setattr(_AdapterTrainer, "compute_loss", fail)
    segment, losses = train(bases["gemma"], data, tmp_path / "halved")
    assert segment["batch_size"] <= 3 and losses == pytest.approx(whole, rel=2e-2)
