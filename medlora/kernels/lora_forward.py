"""Forward passes of PEFT's layers without its detours: LoRA branches added in place, trained rows looked up alone.

PEFT writes the outputs of a layer three times over for each adapter, and copies the whole embedding, twice, for the few
rows of it that are trained. What comes out is the same within float error; `tests/test_lean.py` compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.autograd.function import once_differentiable

from medlora.kernels.autograd import Context


def lighten(model: torch.nn.Module) -> None:
    """Give every LoRA layer and every layer of trained rows its lean forward pass; new ones, too, when called again."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            if _is_look_up(module.base_layer):
                module.forward_adapters = MethodType(_look_up_rows, module)  # type: ignore[method-assign]
        elif isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.forward = MethodType(_add_branches, module)


class _LoraParts(Protocol):
    """What is read here of PEFT's LoRA layer on a linear one."""

    active_adapters: Sequence[str]
    disable_adapters: bool
    merged: bool
    base_layer: torch.nn.Linear
    lora_A: Mapping[str, torch.nn.Linear]
    lora_B: Mapping[str, torch.nn.Linear]
    scaling: Mapping[str, float]
    lora_variant: Mapping[str, object]
    lora_bias: Mapping[str, bool]
    lora_dropout: Mapping[str, torch.nn.Module]
    training: bool

    def forward(self, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        """PEFT's own way."""


class _Shaped(Context, Protocol):
    shape: torch.Size


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + (x A') B' for frozen W [out, in] and bias; A [r, in], B [out, r]."""

    @staticmethod
    def forward(
        ctx: _Shaped,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        thin = rows @ a.T
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        out.addmm_(thin, b.T)
        ctx.save_for_backward(rows, thin, weight, a, b)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Shaped, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, thin, weight, a, b = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        through = gradient @ b
        to_x = (gradient @ weight).addmm_(through, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_a = through.T @ rows if ctx.needs_input_grad[3] else None
        to_b = gradient.T @ thin if ctx.needs_input_grad[4] else None
        return to_x, None, None, to_a, to_b


@dataclass(frozen=True)
class _Dropped:
    """What dropout made of the rows of an input: `rows` [tokens, in] and `mask`, True where it left them; share `keep`."""

    share: float
    rows: torch.Tensor
    mask: torch.Tensor

    @property
    def keep(self) -> float:
        """Share of the numbers that are left, by which the others are divided."""
        return 1 - self.share


def _drop(x: torch.Tensor, share: float) -> _Dropped:
    """Dropout of x. Layers that read the same tensor - q, k and v; gate and up - share its mask, and adapters do, too."""
    known = vars(x).get("_medlora_dropped")
    if known is None or known.share != share:
        rows, mask = torch.native_dropout(x.detach().flatten(0, -2), share, True)
        known = vars(x)["_medlora_dropped"] = _Dropped(share, rows, mask)
    return known


def _cast_masters(
    masters: Sequence[torch.Tensor], scales: Sequence[float], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All A [ranks, in] and all B, scaled, [out, ranks] in x's type, a kernel for each: small ones are what a GPU waits for."""
    ranks = [len(each) for each in masters[::2]]
    a = x.new_empty(sum(ranks), masters[0].shape[1])
    b = x.new_empty(len(masters[1]), sum(ranks))
    for part, master in zip(a.split(ranks), masters[::2], strict=True):
        part.copy_(master)
    for part, master, scale in zip(b.split(ranks, dim=1), masters[1::2], scales, strict=True):
        torch.mul(master, scale, out=part)
    return a, b


class _CastBranches(torch.autograd.Function):
    """base(x) + sum of scale_i (drop(x) A_i') B_i' in x's type, for float32 masters A_i [r, in], B_i [out, r].

    `weight` [out, in] is the frozen base's, with its bias; where the base is quantized, `base_out` is what it gives for x
    instead. `dropped` is x after dropout and `mask` [.., in] what dropout left; both None without dropout. The masters
    are cast at use, and their gradients, sums over all tokens, are returned in their own type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        base_out: torch.Tensor | None,
        dropout: _Dropped | None,
        scales: tuple[float, ...],
        *masters: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        seen = rows if dropout is None else dropout.rows
        a, b = _cast_masters(masters, scales, x)
        thin = seen @ a.T
        if base_out is not None:
            flat = base_out.flatten(0, -2)
            if base_out._is_view():  # autograd forbids writing into what another function has returned as a view
                out = torch.addmm(flat, thin, b.T)
            else:
                ctx.mark_dirty(base_out)
                out = flat.addmm_(thin, b.T)
        else:
            assert weight is not None
            out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
            out.addmm_(thin, b.T)
        ctx.save_for_backward(seen, thin, weight, a, b, None if dropout is None else dropout.mask)
        ctx.scales, ctx.keep = scales, 1.0 if dropout is None else dropout.keep
        ctx.ranks, ctx.types = [len(each) for each in masters[::2]], [each.dtype for each in masters]
        if base_out is not None and not base_out._is_view():
            return base_out
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, thin, weight, a, b, mask = ctx.saved_tensors
        shape = gradient.shape
        upstream = gradient.flatten(0, -2)
        through = upstream @ b
        to_x = None
        if ctx.needs_input_grad[0]:
            if mask is None:
                to_x = through @ a if weight is None else (upstream @ weight).addmm_(through, a)
            else:
                to_x = torch.ops.aten.native_dropout_backward(through @ a, mask, 1 / ctx.keep)
                if weight is not None:
                    to_x.addmm_(upstream, weight)
            to_x = to_x.view(*shape[:-1], -1)
        to_masters: list[torch.Tensor | None] = []
        parts = zip(through.split(ctx.ranks, dim=1), thin.split(ctx.ranks, dim=1), ctx.scales, strict=True)
        for n, (back, forth, scale) in enumerate(parts):
            to_a, to_b = ctx.needs_input_grad[6 + 2 * n], ctx.needs_input_grad[7 + 2 * n]
            to_masters.append((back.T @ seen).to(ctx.types[2 * n]) if to_a else None)
            to_masters.append((upstream.T @ forth).to(ctx.types[2 * n + 1]).mul_(scale) if to_b else None)
        to_base = gradient if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_base, None, None, *to_masters


def _may_cast(x: torch.Tensor) -> bool:
    """Whether branches are computed in x's type from float32 masters, with dropout: on CUDA.

    On CPU float32 is the type of everything, and adapters keep the bytes that PEFT's own dropout gives them.
    """
    return x.device.type == "cuda" and x.dtype.is_floating_point and not torch.compiler.is_compiling()


def _add_branches(layer: _LoraParts, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """Takes the place of a LoRA layer's `forward`; what it has no lean way for (DoRA, biases, merged weights) is PEFT's."""
    keys = [key for key in layer.active_adapters if key in layer.lora_A]
    pairs = [(layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key]) for key in keys]
    plain = (
        pairs
        and not (arguments or options or layer.disable_adapters or layer.merged)
        and not any(key in layer.lora_variant or layer.lora_bias[key] for key in keys)
    )
    if not plain:
        return type(layer).forward(layer, x, *arguments, **options)
    shares = {getattr(layer.lora_dropout[key], "p", 0.0) if layer.training else 0.0 for key in keys}
    if shares == {0.0} and all(a.dtype == b.dtype == x.dtype for a, b, _ in pairs):
        return _add_in_one_type(layer, x, pairs)
    if len(shares) == 1 and _may_cast(x):
        return _add_cast(layer, x, pairs, shares.pop())
    return type(layer).forward(layer, x)


def _add_in_one_type(
    layer: _LoraParts, x: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, float]]
) -> torch.Tensor:
    base = layer.base_layer
    a = pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _, _ in pairs])
    b = torch.cat([b * scale for _, b, scale in pairs], dim=1)
    weight = base.weight
    if type(base) is torch.nn.Linear and not weight.requires_grad and weight.dtype == x.dtype:
        lean: torch.Tensor = _LoraLinear.apply(x, weight, base.bias, a, b)
        return lean
    out: torch.Tensor = base(x)
    if out.dtype != x.dtype:
        return type(layer).forward(layer, x)
    thin = torch.nn.functional.linear(x, a)
    return torch.addmm(out.flatten(0, -2), thin.flatten(0, -2), b.T).view(out.shape)


def _add_cast(
    layer: _LoraParts, x: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, float]], share: float
) -> torch.Tensor:
    base = layer.base_layer
    weight: torch.Tensor | None = base.weight
    bias: torch.Tensor | None = base.bias
    base_out: torch.Tensor | None = None
    if type(base) is not torch.nn.Linear or base.weight.requires_grad or base.weight.dtype != x.dtype:
        weight = bias = None
        base_out = base(x)
        if base_out.dtype != x.dtype:
            return type(layer).forward(layer, x)
    dropped = _drop(x, share) if share else None
    scales = tuple(scale for _, _, scale in pairs)
    masters = [master for a, b, _ in pairs for master in (a, b)]
    out: torch.Tensor = _CastBranches.apply(x, weight, bias, base_out, dropped, scales, *masters)
    return out


def find_rows(layer: TrainableTokensLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The vocabulary rows [r] (sorted) that the active adapters of a layer have, and their values [r, size]; else None."""
    keys = [key for key in layer.active_adapters if key in layer.token_indices]
    if not keys or layer.disable_adapters or layer.merged:
        return None, None
    known = vars(layer).setdefault("_medlora_rows", {})
    weight = layer.base_layer.weight
    assert isinstance(weight, torch.Tensor)
    device = weight.device
    name = (tuple(keys), device)
    if name not in known:
        layer._check_overlapping_tokens(keys)
        known[name] = torch.tensor([i for key in keys for i in layer.token_indices[key]], device=device).sort()
    rows, order = known[name]
    return rows, torch.cat([layer.trainable_tokens_delta[key] for key in keys]).index_select(0, order)


@torch.no_grad()
def _is_look_up(base: torch.nn.Module) -> bool:
    """Whether a layer of trained rows is a head, or an embedding that gives its rows, scaled where it has a scale."""
    if not isinstance(base, torch.nn.Embedding):
        return isinstance(base, torch.nn.Linear)
    ids = torch.arange(min(len(base.weight), 4), device=base.weight.device)
    found, rows = base(ids), base.weight[: len(ids)]
    return torch.allclose(found.float(), _scale(rows, base).float(), rtol=1e-2)


def _scale(rows: torch.Tensor, base: torch.nn.Module) -> torch.Tensor:
    scale = getattr(base, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows.dtype)


def _look_up_rows(
    layer: TrainableTokensLayer, x: torch.Tensor, active: Sequence[str], *arguments: object, **options: object
) -> torch.Tensor:
    """Takes the place of a token layer's `forward_adapters`: what the base layer gives, but for the trained rows."""
    rows, values = find_rows(layer)
    if rows is None or values is None or list(active) != list(layer.active_adapters):
        return type(layer).forward_adapters(layer, x, active, *arguments, **options)
    out: torch.Tensor = layer.base_layer(x)
    if isinstance(layer.base_layer, torch.nn.Embedding):
        place = torch.searchsorted(rows, x).clamp(max=len(rows) - 1)
        found = _scale(torch.nn.functional.embedding(place, values.to(out.dtype)), layer.base_layer)
        return torch.where((rows[place] == x)[..., None], found, out)
    return out.index_copy(-1, rows, torch.nn.functional.linear(x, values.to(x.dtype)).to(out.dtype))
