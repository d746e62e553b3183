"""The lean forward passes give what PEFT's own give, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import EXTRA, FAMILIES

from medlora.chains import activate, add_adapter
from medlora.config import BaseModelConfig, LoraSettings
from medlora.models import added_token_ids, load_base, load_tokenizer

SHAPES = {
    "one adapter": [LoraSettings(r=4, alpha=8)],
    "a stack of two ranks": [LoraSettings(r=4, alpha=8), LoraSettings(r=2, alpha=6, rslora=True)],
    "attention below all": [LoraSettings(r=4, alpha=8, targets="attention"), LoraSettings(r=3, alpha=3)],
    "dora": [LoraSettings(r=4, alpha=8), LoraSettings(r=4, alpha=8, dora=True)],
    "dropout": [LoraSettings(r=4, alpha=8, dropout=0.5)],
}


def build(base: str, shapes: list[LoraSettings], quantization: Any = "none", rows: bool = False, **more: Any) -> Any:
    """The base with these adapters on top of each other, all of which do something; the last one is trained."""
    config = BaseModelConfig(model=base, quantization=quantization, **more)
    tokenizer = load_tokenizer(config, extra_tokens=EXTRA)
    model: Any = load_base(config, tokenizer)
    ids = added_token_ids(tokenizer, EXTRA) if rows else []
    for n, shape in enumerate(shapes):
        model = add_adapter(model, f"0{n}", shape, ids if n == 0 else [], seed=n)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.3)
    return model.train(), ids


def measure(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    extra = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits
    (logits.float().log_softmax(-1)[..., 7].sum() + logits.float().pow(2).mean()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach(), gradients


def compare(model: Any, ids: torch.Tensor, rel: float = 1e-5) -> None:
    logits, gradients = measure(model, ids)
    lean = [module for module in model.modules() if {"forward", "forward_adapters"} & set(vars(module))]
    assert lean
    for module in lean:
        vars(module).pop("forward", None)
        vars(module).pop("forward_adapters", None)
    plain_logits, plain_gradients = measure(model, ids)
    torch.testing.assert_close(logits, plain_logits, atol=rel * plain_logits.abs().max().item(), rtol=rel)
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in plain_gradients.items():
        scale = max(gradient.abs().max().item(), 1e-6)
        torch.testing.assert_close(gradients[name], gradient, atol=10 * rel * scale, rtol=10 * rel, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_adapters_give_what_peft_gives(bases: dict[str, str], family: str, shapes: str) -> None:
    model, _ = build(bases[family], SHAPES[shapes])
    compare(model, torch.arange(60).view(3, 20) + 40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [True, False])
def test_trained_rows_are_looked_up_in_embedding_and_head(bases: dict[str, str], family: str, trained: bool) -> None:
    """The rows of added words, trained or frozen under another adapter, each twice in the batch and beside other tokens."""
    shapes = [LoraSettings(r=4, alpha=8)] * (1 if trained else 2)
    model, rows = build(bases[family], shapes, rows=True)
    assert len(rows) == 2
    ids = torch.tensor([[41, rows[0], 50, rows[1], 60, rows[0]], [rows[1], 42, 43, 44, 45, 46]])
    compare(model, ids)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_bases_get_the_same_branches(bases: dict[str, str], quantization: str) -> None:
    model, _ = build(bases["gemma"], SHAPES["a stack of two ranks"], quantization)
    compare(model, torch.arange(40).view(2, 20) + 40)


def test_a_base_in_bfloat16_keeps_to_peft(bases: dict[str, str]) -> None:
    """Adapters stay in float32 there: another type is cast as PEFT casts it."""
    model, _ = build(bases["gemma"], SHAPES["one adapter"], compute_dtype="bfloat16")
    compare(model, torch.arange(40).view(2, 20) + 40, rel=1e-2)


def test_switching_stages_switches_rows_and_branches(bases: dict[str, str]) -> None:
    model, rows = build(bases["gemma"], [LoraSettings(r=4, alpha=8)] * 2, rows=True)
    ids = torch.tensor([[41, rows[0], 50, rows[1]]])
    seen = {}
    with torch.no_grad():
        for stage in ([], ["00"], ["00", "01"], ["01"], []):
            activate(model, stage)
            logits = model.eval()(input_ids=ids).logits
            known = seen.setdefault(tuple(stage), logits)
            assert torch.equal(known, logits)
    assert len({tuple(logits.flatten().tolist()) for logits in seen.values()}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_give_what_the_family_s_own_give(bases: dict[str, str], family: str) -> None:
    """Gemma's weights are counted from 1, Llama's from 0."""
    base = BaseModelConfig(model=bases[family])
    model = load_base(base, load_tokenizer(base))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms and all("forward" in vars(norm) for norm in norms)
    for norm in norms[:3]:
        size = norm.weight.numel()
        norm.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(size))
        x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        upstream = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(2))
        lean, plain = norm(x), type(norm).forward(norm, x)
        torch.testing.assert_close(lean, plain, atol=1e-5, rtol=1e-5)
        (lean_gradient,), (gradient,) = (torch.autograd.grad(out, x, upstream) for out in (lean, plain))
        torch.testing.assert_close(lean_gradient, gradient, atol=1e-5, rtol=1e-5)
