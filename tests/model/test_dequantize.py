"""A base whose quantized weights are dequantized once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from pydantic import ValidationError

from medlora.answering.stage_model import StageModel
from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.errors import InputError
from medlora.model.base import dequantize_base, load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import load_tokenizer
from medlora.records import McqRecord

IDS = torch.tensor([[7, 9, 11, 40, 10, 8]])


def load(folder: str, quantization: Any) -> Any:
    base = BaseModelConfig(model=folder, quantization=quantization)
    return load_base(base, load_tokenizer(base))


@torch.no_grad()
def compute(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def is_quantized(model: Any) -> bool:
    return any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules())


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_nf4_dequantized_once_is_the_same_function(bases: dict[str, str], family: str) -> None:
    model = load(bases[family], "nf4")
    expected = compute(model)
    assert dequantize_base(model, "always") == "nf4 weights, dequantized once to float32"
    assert torch.equal(compute(model), expected) and not is_quantized(model)
    assert not any(weight.requires_grad for weight in model.parameters())
    with_adapter: Any = add_adapter(model, "a", LoraSettings(r=2), [], 0)
    assert torch.allclose(compute(with_adapter), expected, atol=1e-5), "an adapter goes on it"


def test_int8_dequantized_once_depends_on_no_other_row(bases: dict[str, str]) -> None:
    """LLM.int8 rounds what goes into a layer, so it is near, and not the same."""
    model = load(bases["gemma"], "int8")
    before = compute(model)
    assert dequantize_base(model, "always") == "int8 weights, dequantized once to float32"
    after = compute(model)
    assert not is_quantized(model) and not torch.equal(before, after)
    assert (before - after).abs().max() <= 0.1 * before.abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_is_dequantized_at_loading_and_trains(bases: dict[str, str], quantization: Any) -> None:
    """Stages are scored on it as it was trained, whatever `evaluation.dequantize` says."""
    base = BaseModelConfig(model=bases["gemma"], quantization=quantization, dequantize=True)
    once = load(bases["gemma"], quantization)
    dequantize_base(once, "always")
    model: Any = load_base(base, load_tokenizer(base))
    assert not is_quantized(model) and torch.equal(compute(model), compute(once))
    model = add_adapter(model, "a", LoraSettings(r=2), [], 0).train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert gradients and all(each is not None and torch.isfinite(each).all() for each in gradients)
    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "t.jsonl"}], "dequantize": "never"})
    assert StageModel(base, {"base": ()}, config).weights == f"{quantization} weights, dequantized once to float32"


def test_what_cannot_be_dequantized_is_said(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for quantization in ("none", "auto"):
        with pytest.raises(ValidationError, match="only quantization: int8 or nf4 leaves weights"):
            BaseModelConfig.model_validate({"model": "m", "quantization": quantization, "dequantize": True})

    def fail(*_: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("medlora.model.base.dequantize_base", fail)
    base = BaseModelConfig(model=bases["gemma"], quantization="nf4", dequantize=True)
    with pytest.raises(InputError, match="base.dequantize: the plain weights of .* do not fit into the memory of cpu"):
        load_base(base, load_tokenizer(base))


@pytest.mark.parametrize(("quantization", "wanted"), [("nf4", "auto"), ("int8", "auto"), ("nf4", "never")])
def test_on_cpu_nothing_changes_unless_it_is_asked_for(bases: dict[str, str], quantization: str, wanted: Any) -> None:
    model = load(bases["gemma"], quantization)
    assert dequantize_base(model, wanted) == "" and is_quantized(model)


def test_memory_that_runs_out_leaves_the_rest_quantized_and_says_so(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from medlora.model import base as module

    model = load(bases["gemma"], "nf4")
    expected, made, dequantize = compute(model), [0], module._dequantize

    def limited(*arguments: Any) -> Any:
        made[0] += 1
        if made[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dequantize(*arguments)

    monkeypatch.setattr(module, "_dequantize", limited)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(module.torch, "device", lambda device: type("Device", (), {"type": "cuda"})())
    found = dequantize_base(model, "auto")
    monkeypatch.undo()
    assert found == "nf4 weights, dequantized once to float32 in 3 of 14 layers"
    assert "memory ran out: 11 of 14 layers stay quantized" in caplog.text
    assert torch.equal(compute(model), expected)


def test_a_stage_model_says_what_it_computes_with(bases: dict[str, str]) -> None:
    base = BaseModelConfig(model=bases["gemma"], quantization="nf4")
    tests = [{"name": "t", "source": "t.jsonl"}]
    question = McqRecord("q", "text", ("A", "B"), "A")
    answers = []
    for wanted in ("auto", "always"):
        config = EvaluationConfig.model_validate({"tests": tests, "dequantize": wanted})
        model = StageModel(base, {"base": ()}, config)
        answers.append(model.answer(["t"], [question]))
        assert model.weights == ("nf4 weights, dequantized once to float32" if wanted == "always" else "")
    assert answers[0] == answers[1]
