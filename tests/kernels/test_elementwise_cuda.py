"""Fused norms, activations and rotations, with functions in plain torch in the place of Liger's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.kernels import elementwise_cuda
from medlora.kernels.elementwise_cuda import fuse_elementwise
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import load_tokenizer
from medlora.training.batches import FlatCollator
from tests.support.batches import BATCHES, measure
from tests.support.tiny import FAMILIES


class FakeNorm:
    calls = 0

    @staticmethod
    def apply(
        x: Any, weight: Any, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
    ) -> torch.Tensor:
        assert in_place is False, "Gemma's norms stand behind one another: their gradients are read twice"
        FakeNorm.calls += 1
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if casting_mode == "gemma":
            return (normal * (offset + weight.float())).to(x.dtype)
        return normal.to(x.dtype) * (offset + weight)


class FakeSiLU:
    calls = 0

    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        FakeSiLU.calls += 1
        return torch.nn.functional.silu(gate) * up


class FakeGELU(FakeSiLU):
    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        FakeSiLU.calls += 1
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


class FakeRotation(torch.autograd.Function):
    """As Liger's, it writes into what it is given where that lies as the kernel reads it, and torch does not notice."""

    calls = 0

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        laid = x.transpose(1, 2).contiguous()
        one, other = laid.chunk(2, -1)
        turned = laid * cos[:, :, None] + torch.cat([-other, one], -1) * sin[:, :, None]
        laid.data.copy_(turned)
        return laid.transpose(1, 2)

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        FakeRotation.calls += 1
        ctx.save_for_backward(cos, sin)
        return FakeRotation.turn(q, cos, sin), FakeRotation.turn(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, to_q: Any, to_k: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return FakeRotation.turn(to_q, cos, -sin), FakeRotation.turn(to_k, cos, -sin), None, None


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module with Liger's names, and this machine's CPU in the place of a GPU."""

    def may_fuse(*tensors: torch.Tensor) -> bool:
        return elementwise_cuda._state.is_on and len({x.dtype for x in tensors}) == 1

    for family in (modeling_gemma3, modeling_llama):  # put back at the end
        monkeypatch.setattr(family, "apply_rotary_pos_emb", family.apply_rotary_pos_emb)
    ops = ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction, ops.LigerGELUMulFunction, ops.LigerSiLUMulFunction = FakeNorm, FakeGELU, FakeSiLU  # type: ignore[attr-defined]
    ops.LigerRopeFunction = FakeRotation  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setattr(elementwise_cuda, "_may_fuse", may_fuse)
    elementwise_cuda._load.cache_clear()
    elementwise_cuda._is_gate.cache_clear()
    elementwise_cuda._state.is_on = True
    FakeNorm.calls = FakeSiLU.calls = 0
    yield ops
    elementwise_cuda._load.cache_clear()
    elementwise_cuda._is_gate.cache_clear()
    elementwise_cuda._state.is_on = True


def load(folder: str, **more: Any) -> Any:
    base = BaseModelConfig(model=folder, **more)
    return load_base(base, load_tokenizer(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_with_the_fused_parts(bases: dict[str, str], liger: ModuleType, family: str) -> None:
    model: Any = add_adapter(load(bases[family]), "a", LoraSettings(r=4, alpha=8), [], 0).train()

    def collate() -> Any:
        return FlatCollator(token_type_ids=family == "medgemma")(BATCHES["shared prefix"])

    loss, gradients = measure(model, collate())
    norms, mlps = 5 if family == "llama" else 13, 2  # Gemma has four norms a layer, and two of heads
    assert fuse_elementwise(model.get_decoder()) == norms + mlps
    FakeNorm.calls = FakeSiLU.calls = FakeRotation.calls = 0
    fused_loss, fused = measure(model, collate())
    assert FakeNorm.calls >= norms and FakeSiLU.calls >= mlps and FakeRotation.calls >= 2
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3, msg=name)


def test_copies_of_a_model_run_their_own_parts(bases: dict[str, str], liger: ModuleType) -> None:
    """Consecutive phases of a process borrow copies of one base."""
    model = load(bases["gemma"])
    fuse_elementwise(model)
    again = copy.deepcopy(model)
    for one, other in zip(model.modules(), again.modules(), strict=True):
        if "forward" in vars(other):
            assert vars(other)["forward"].__self__ is other and vars(one)["forward"].__self__ is one


def test_without_liger_everything_stays(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    elementwise_cuda._load.cache_clear()
    model = load(bases["llama"])
    before = {module: vars(module).get("forward") for module in model.modules()}
    assert fuse_elementwise(model) == 0
    assert {module: vars(module).get("forward") for module in model.modules()} == before
    elementwise_cuda._load.cache_clear()


def test_a_kernel_that_computes_something_else_is_not_taken(
    bases: dict[str, str], liger: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNorm, "apply", lambda x, *_: x * 1.1)
    monkeypatch.setattr(FakeGELU, "apply", lambda gate, up: (gate * up).detach())  # no gradient
    monkeypatch.setattr(FakeRotation, "apply", lambda q, k, cos, sin: (q * cos, k * cos))
    model = load(bases["gemma"])
    rotate = modeling_gemma3.apply_rotary_pos_emb
    assert fuse_elementwise(model) == 0 and modeling_gemma3.apply_rotary_pos_emb is rotate


def test_rotations_that_do_not_suit_the_kernel_go_where_they_went(bases: dict[str, str], liger: ModuleType) -> None:
    """Rows that are no power of two would be compiled one by one, and the kernel computes in one type."""
    model = load(bases["llama"])
    plain = modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        fuse_elementwise(model)  # a second time changes nothing
    fused: Any = modeling_llama.apply_rotary_pos_emb
    assert fused is not plain and fused.own is plain.own  # type: ignore[attr-defined]
    for rows, dtype, suits in ((1, None, True), (4, None, True), (3, None, False), (1, torch.float64, False)):
        FakeRotation.calls = 0
        q, k = torch.randn(rows, 2, 5, 16), torch.randn(rows, 1, 5, 16)
        cos, sin = (torch.randn(1, 5, 8, dtype=dtype).repeat(1, 1, 2) for _ in range(2))
        expected = fused.own(q.clone(), k.clone(), cos, sin)
        for one, other in zip(fused(q, k, cos, sin), expected, strict=True):
            torch.testing.assert_close(one, other)
        assert FakeRotation.calls == suits


@pytest.mark.parametrize("part", [FakeSiLU, FakeRotation])
def test_a_kernel_that_fails_later_ends_no_run(
    bases: dict[str, str], liger: ModuleType, monkeypatch: pytest.MonkeyPatch, part: Any
) -> None:
    model = load(bases["llama"])
    ids = torch.arange(5)[None] + 40
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        fuse_elementwise(model)

        def fail(*_: Any) -> torch.Tensor:
            raise RuntimeError("no kernel image")

        monkeypatch.setattr(part, "apply", fail)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not elementwise_cuda._state.is_on
