"""Prepared adapters give what PEFT gives, at every layer that takes them; other layers keep their own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medlora.answering.cuda.adapters import PreparedAdapters
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter
from medlora.model.tokenizer import load_tokenizer
from tests.support.tiny import build_gpt2

IDS = torch.tensor([[7, 9, 11, 40, 10, 8]])


def load(folder: str, dora: bool = False, **options: Any) -> Any:
    base = BaseModelConfig(model=folder, **options)
    model: Any = load_base(base, load_tokenizer(base))
    model = add_adapter(model, "a", LoraSettings(r=4, alpha=8), [], 1)
    model = add_adapter(model, "b", LoraSettings(r=2, alpha=8, dora=dora), [10, 40], 2)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


@torch.no_grad()
def compute(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.float()


@pytest.mark.parametrize(
    "options", [{}, {"compute_dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}]
)
def test_a_stage_computes_with_prepared_adapters_what_it_computes_without(
    bases: dict[str, str], options: dict[str, str]
) -> None:
    model = load(bases["gemma"], **options)
    adapters = PreparedAdapters(model)
    # One of bfloat16's steps on either side: what is added is rounded elsewhere.
    tolerance = 3e-2 if "compute_dtype" in options else 1e-5
    seen = []
    for stage in (["a"], ["a", "b"], ["b"], []):
        activate(model, stage)
        expected = compute(model)
        with adapters.find().installed():
            found = compute(model)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.equal(compute(model), expected), "it is as it was before"
        seen.append(found)
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
    assert len(adapters.stages) == 4
    activate(model, ["a"])
    assert adapters.find() is next(iter(adapters.stages.values())), "a stage is prepared once"


def test_a_float32_adapter_over_bfloat16_is_prepared_in_bfloat16(bases: dict[str, str]) -> None:
    model = load(bases["gemma"], compute_dtype="bfloat16")
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.float()
            module.lora_B.float()
    branches = [forward for _, forward in PreparedAdapters(model).find().forwards]
    assert branches and all(part.dtype == torch.bfloat16 for each in branches for part in each.args[2:])  # type: ignore[attr-defined]


def test_layers_of_another_kind_keep_their_own_way(bases: dict[str, str], tmp_path: Any) -> None:
    for model in (load(bases["llama"], dora=True), load(build_gpt2(tmp_path / "gpt2"))):
        adapters = PreparedAdapters(model)
        expected = compute(model)
        with adapters.find().installed():
            assert torch.allclose(compute(model), expected, atol=1e-5)
        assert adapters.find().forwards == []


def test_what_gives_other_logits_is_not_taken_and_said_once(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(bases["llama"])
    monkeypatch.setattr("medlora.answering.cuda.adapters._add_branch", lambda layer, base, a, b, x: 2 * base(x))
    adapters = PreparedAdapters(model)
    for stage in (["a"], ["a", "b"]):
        activate(model, stage)
        assert adapters.find().forwards == []
    assert len(caplog.records) == 1 and "adapters are not prepared" in caplog.text


def test_a_weight_that_is_written_to_drops_every_stage(bases: dict[str, str]) -> None:
    model = load(bases["gemma"])
    adapters = PreparedAdapters(model)
    before = adapters.find()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_A" in name).mul_(2)
    after = adapters.find()
    assert after is not before and [*adapters.stages.values()] == [after]
    with after.installed():
        assert torch.allclose(compute(model), compute(model), atol=1e-5)
    expected = compute(model)
    with after.installed():
        assert torch.allclose(compute(model), expected, atol=1e-5)
