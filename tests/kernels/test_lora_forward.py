"""The lean forward passes give what PEFT's own give, and the same gradients."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.kernels import attention, elementwise_cpu, lora_forward
from medlora.kernels.attention import attend
from medlora.model.base import load_base
from medlora.model.chain import activate
from medlora.model.tokenizer import load_tokenizer
from tests.support.batches import build
from tests.support.tiny import FAMILIES

SHAPES = {
    "one adapter": [LoraSettings(r=4, alpha=8)],
    "a stack of two ranks": [LoraSettings(r=4, alpha=8), LoraSettings(r=2, alpha=6, rslora=True)],
    "attention below all": [LoraSettings(r=4, alpha=8, targets="attention"), LoraSettings(r=3, alpha=3)],
    "dora": [LoraSettings(r=4, alpha=8), LoraSettings(r=4, alpha=8, dora=True)],
    "dropout": [LoraSettings(r=4, alpha=8, dropout=0.5)],
}


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
    family = sys.modules[type(model.get_decoder().layers[0].self_attn).__module__]
    rotate = family.apply_rotary_pos_emb
    for module in lean:
        vars(module).pop("forward", None)
        vars(module).pop("forward_adapters", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "apply_rotary_pos_emb", rotate.own)
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


CAST = {
    "one adapter": [LoraSettings(r=4, alpha=8)],
    "a stack of two ranks": [LoraSettings(r=4, alpha=8), LoraSettings(r=2, alpha=6, rslora=True)],
    "dropout": [LoraSettings(r=4, alpha=8, dropout=0.3)],
    "a stack with dropout": [LoraSettings(r=4, alpha=8, dropout=0.3), LoraSettings(r=2, alpha=6, dropout=0.3)],
}


@pytest.fixture
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for every input of a shape, in PEFT's dropout and in ours: the two draw theirs in another order."""

    def make_mask(x: torch.Tensor, share: float) -> torch.Tensor:
        draw = torch.Generator().manual_seed(x.numel())
        return torch.rand(x.shape, generator=draw) >= share

    def drop(x: torch.Tensor, share: float) -> Any:
        mask = make_mask(x, share).flatten(0, -2)
        return lora_forward._Dropped(share, x.detach().flatten(0, -2) * mask / (1 - share), mask)

    def forward(layer: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        return x * make_mask(x, layer.p) / (1 - layer.p) if layer.training else x

    monkeypatch.setattr(lora_forward, "_drop", drop)
    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)


@pytest.mark.parametrize("shapes", CAST)
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_branches_from_float32_masters_give_what_peft_gives(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, same_dropout: None, shapes: str, quantization: str
) -> None:
    """The way of a GPU, on CPU, in float32: the whole model."""
    monkeypatch.setattr(lora_forward, "_may_cast", lambda x: True)
    monkeypatch.setattr(
        lora_forward, "_add_in_one_type", lambda layer, x, pairs: lora_forward._add_cast(layer, x, pairs, 0.0)
    )
    model, _ = build(bases["gemma"], CAST[shapes], quantization)
    compare(model, torch.arange(40).view(2, 20) + 40)


@pytest.mark.parametrize("shapes", CAST)
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_in_bfloat16_a_layer_gives_what_peft_gives_within_its_rounding(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, same_dropout: None, shapes: str, quantization: str
) -> None:
    """Output, and gradients of its input and of its float32 masters; PEFT computes the branches in float32."""
    monkeypatch.setattr(lora_forward, "_may_cast", lambda x: True)
    model, _ = build(bases["gemma"], CAST[shapes], quantization, compute_dtype="bfloat16")
    layers = [m for m in model.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]
    draw = torch.Generator().manual_seed(0)
    for layer in (layers[0], layers[6]):
        given = torch.randn(2, 20, layer.in_features, generator=draw).bfloat16()
        upstream = torch.randn(2, 20, layer.out_features, generator=draw).bfloat16()
        masters = [p for p in layer.parameters() if p.requires_grad]
        assert len(masters) == 2 and all(p.dtype == torch.float32 for p in masters)
        found = []
        for forward in (layer.forward, lambda x, layer=layer: type(layer).forward(layer, x)):
            x = given.clone().requires_grad_()
            out = forward(x * 1)
            found.append([out, *torch.autograd.grad(out, [x, *masters], upstream)])
        for lean, plain in zip(*found, strict=True):
            assert lean.dtype == plain.dtype
            assert (lean - plain).float().norm() <= 1e-2 * plain.float().norm()


def test_layers_that_read_the_same_input_share_its_dropout() -> None:
    x = torch.ones(4, 50, 100)
    torch.manual_seed(0)
    first, again, other = lora_forward._drop(x, 0.25), lora_forward._drop(x, 0.25), lora_forward._drop(x.clone(), 0.25)
    assert again is first and not torch.equal(other.mask, first.mask)
    assert first.mask.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(first.rows, first.mask / 0.75)
    assert not torch.equal(lora_forward._drop(x, 0.5).mask, first.mask)


def test_on_cpu_mixed_types_and_dropout_are_peft_s(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their adapters keep the bytes that they had."""
    monkeypatch.setattr(lora_forward, "_add_cast", lambda *_: pytest.fail("not on CPU"))
    for shapes, dtype in (("dropout", "float32"), ("one adapter", "bfloat16")):
        model, _ = build(bases["llama"], CAST[shapes], compute_dtype=dtype)
        measure(model, torch.arange(10).view(1, 10) + 40)


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


@pytest.mark.parametrize("pieces", [7, 2**16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gated_activations_are_torch_s(monkeypatch: pytest.MonkeyPatch, activation: str, pieces: int) -> None:
    """Also where they are large, and in pieces that do not divide them."""
    monkeypatch.setattr(elementwise_cpu, "PIECE", pieces)
    gate = torch.linspace(-30, 30, 2 * 3 * 25).view(2, 3, 25).requires_grad_()
    up = torch.randn(2, 3, 25, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(2, 3, 25, generator=torch.Generator().manual_seed(1))
    plain = ACT2FN[activation](gate) * up
    expected = torch.autograd.grad(plain, (gate, up), upstream)
    # Copies, since the backward pass overwrites what it is given.
    lean = elementwise_cpu._Gated.apply(gate * 1, up * 1, *elementwise_cpu.GATES[activation])
    torch.testing.assert_close(lean, plain, atol=1e-6, rtol=1e-5)
    for found, wanted in zip(torch.autograd.grad(lean, (gate, up), upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_an_mlp_that_does_more_keeps_its_own_forward() -> None:
    """Its parts have the usual names, but another activation, or something between them."""

    class Odd(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(max=0.5)

    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    relu = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, hidden_act="relu"))
    for mlp, lean in ((LlamaMLP(config), True), (Odd(config), False), (relu, False)):
        elementwise_cpu.lighten_elementwise(mlp)
        assert ("forward" in vars(mlp)) == lean


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (2, 2)])
def test_attention_within_segments_is_torch_s(window: int | None, heads: tuple[int, int]) -> None:
    """In float64, where torch's own attention computes each segment; a shared beginning, and documents of their own."""
    draw = torch.Generator().manual_seed(0)
    for segments in ([(0, 9, 0), (9, 14, 9), (14, 25, 9)], [(0, 9, 0), (9, 10, 0), (10, 25, 0)]):
        given = [torch.randn(1, n, 25, 8, generator=draw) for n in (heads[0], heads[1], heads[1])]
        upstream = torch.randn(1, 25, heads[0], 8, generator=draw)
        found = []
        for kind in (torch.float32, torch.float64):
            x = [tensor.to(kind).requires_grad_() for tensor in given]
            out, _ = attend(torch.nn.Module(), *x, None, segments=segments, sliding_window=window, scaling=0.3)
            found.append([out, *torch.autograd.grad(out, x, upstream.to(kind))])
        for lean, plain in zip(*found, strict=True):
            torch.testing.assert_close(lean.double(), plain, atol=1e-5, rtol=1e-4)


def test_attention_is_registered_by_a_call_and_not_by_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    theirs = object()
    AttentionInterface.register("sdpa", theirs)
    spec = importlib.util.spec_from_file_location("copy_of_attention", attention.__file__)
    assert spec is not None and spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert AttentionInterface._global_mapping["sdpa"] is theirs
    copied.install()
    assert AttentionInterface._global_mapping["sdpa"] is copied.attend
