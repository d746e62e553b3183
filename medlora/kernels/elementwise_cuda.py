"""RMS norms, gates and rotary positions on CUDA by Liger's kernels, where liger-kernel (the extra `gpu`) is installed.

Elementwise work was a third of a step on a GPU: each operation of torch's reads and writes the whole activation. Liger
(arXiv 2410.10989) does a norm or an activation in one kernel. Its own `apply_liger_kernel_to_*` replaces classes for the
whole process; here instances are changed, each only after it was tried, forward and backward, beside its own way.
Rotary positions are the exception: families call a function of their module, which no instance holds. What takes its
place turns what suits the kernel, and hands all else to what was there before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, cast

import torch

from medlora.kernels.elementwise_cpu import GATES, find_rotation, log_once, turns_whole

NORMS = ((1.0, "gemma"), (0.0, "llama"))
"""What families add to a norm's weight, and where they cast to float32: Gemma around everything, Llama around the root."""

_PLAIN_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class _Kernels:
    """Liger's functions."""

    norm: Any
    gates: dict[str, Any]
    rotation: Any


@dataclass
class _State:
    """Whether the kernels of this process are used; one that raises where it did not when it was tried ends that."""

    is_on: bool = True


_state = _State()


@cache
def _load() -> _Kernels | None:
    try:
        from liger_kernel.ops import (
            LigerGELUMulFunction,
            LigerRMSNormFunction,
            LigerRopeFunction,
            LigerSiLUMulFunction,
        )
    except Exception as error:  # not installed, or Triton finds no compiler or driver
        log_once(f"norms, activations and rotations are torch's own: {type(error).__name__}: {error}")
        return None
    gates = {"silu": LigerSiLUMulFunction, "gelu_pytorch_tanh": LigerGELUMulFunction}
    return _Kernels(LigerRMSNormFunction, gates, LigerRopeFunction)


def fuse_elementwise(model: torch.nn.Module) -> int:
    """Give norms, gated MLPs and rotations of a model on CUDA their fused forward pass; how many modules have one now.

    Call it after `lighten_elementwise`, which finds out which activation an MLP has. A module that computes something
    else than Liger's kernel keeps its own way, and so does every module where Liger is not installed.
    """
    kernels = _load()
    if kernels is None:
        return 0
    found: dict[object, tuple[float, str] | None] = {}
    changed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor):
            key = (type(module), weight.shape, weight.dtype)
            if key not in found:
                found[key] = _find_norm(module, weight, kernels)
            if (norm := found[key]) is not None:
                module.fused_norm = norm  # type: ignore[assignment]
                module.forward = MethodType(_normalise, module)
                changed += 1
        elif (name := _name_gate(module)) is not None:
            sample = next(iter(module.parameters()))
            dtype = sample.dtype if sample.dtype.is_floating_point else torch.bfloat16
            if _is_gate(name, sample.device, dtype):
                module.fused_gate = name  # type: ignore[assignment]
                module.forward = MethodType(_run_mlp, module)
                changed += 1
        elif type(module).__name__.endswith("Attention"):
            _fuse_rotation(module, kernels)
    return changed


def _name_gate(module: torch.nn.Module) -> str | None:
    """The activation that `lighten_elementwise` found in a gated MLP."""
    given = vars(module).get("gate")
    return next((name for name, numbers in GATES.items() if numbers == given), None)


def _find_norm(norm: torch.nn.Module, weight: torch.Tensor, kernels: _Kernels) -> tuple[float, str] | None:
    """What Liger's norm has to be told to give what this one gives, or None."""
    x = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(1, 4, -1).to(weight.dtype)
    epsilon = _get_epsilon(norm)
    if epsilon is None:
        return None
    for offset, casting in NORMS:

        def fused(x: torch.Tensor, offset: float = offset, casting: str = casting) -> torch.Tensor:
            return cast(torch.Tensor, kernels.norm.apply(x, weight, epsilon, offset, casting, False))

        if _is_same(norm.forward, fused, [x]):
            return offset, casting
    return None


@cache
def _is_gate(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Liger's activation gives what torch's does, on this device."""
    kernels = _load()
    assert kernels is not None
    gate = torch.linspace(-4, 4, 256, device=device).view(1, 4, 64).to(dtype)
    up = torch.linspace(2, -1, 256, device=device).view(1, 4, 64).to(dtype)
    return _is_same(lambda g, u: _PLAIN_GATES[name](g) * u, kernels.gates[name].apply, [gate, up])


def _fuse_rotation(attention: torch.nn.Module, kernels: _Kernels) -> None:
    """Put a fused `apply_rotary_pos_emb` into the module of a class, if Liger's turns like the one that is there."""
    module, sample = sys.modules[type(attention).__module__], next(attention.parameters(), None)
    own = find_rotation(module)
    if own is None or sample is None or hasattr(own, "is_fused"):
        return

    def join(rotate: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., torch.Tensor]:
        return lambda q, k: torch.cat([x.flatten() for x in rotate(q, k, angles.cos(), angles.sin())])

    dtype = sample.dtype if sample.dtype.is_floating_point else torch.bfloat16
    q = torch.linspace(-2, 3, 2048, device=sample.device).view(1, 4, 8, 64).to(dtype)
    angles = torch.linspace(0, 3, 256, device=sample.device).view(1, 8, 32).repeat(1, 1, 2).to(dtype)
    if not _is_same(join(own), join(kernels.rotation.apply), [q, q[:, 1:3]]):
        return

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *arguments: object, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (arguments or options) and _may_rotate(q, k, cos, sin):
            try:
                return cast(tuple[torch.Tensor, torch.Tensor], kernels.rotation.apply(q, k, cos, sin))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the plain way would go on
                _give_up(error)
        return own(q, k, cos, sin, *arguments, **options)

    turned: Any = rotate
    turned.own, turned.is_fused = getattr(own, "own", own), True
    vars(module)["apply_rotary_pos_emb"] = turned


def _may_rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel is for these. It is compiled for each number of rows: flat batches have one, lanes a power of two."""
    few = len(q) & (len(q) - 1) == 0
    return few and _may_fuse(q, k, cos, sin) and turns_whole(q, cos, sin) and turns_whole(k, cos, sin)


def _is_same(
    plain: Callable[..., torch.Tensor], fused: Callable[..., torch.Tensor], given: Sequence[torch.Tensor]
) -> bool:
    """Whether two functions have the same output and gradients, within the rounding of their type."""
    results: list[list[torch.Tensor]] = []
    try:
        for function in (plain, fused):
            x = [each.detach().clone().requires_grad_() for each in given]
            with torch.enable_grad(), torch.autocast(given[0].device.type, enabled=False):
                out = function(*[each * 1 for each in x])  # copies: a kernel may overwrite what it was given
                upstream = torch.linspace(1, -2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
                results.append([out, *torch.autograd.grad(out, x, upstream)])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton compiles when it is first called, and may not know the device
        log_once(f"a part is torch's own: trying Liger's raised {type(error).__name__}: {error}")
        return False
    tolerance = 1e-4 if given[0].dtype == torch.float32 else 2e-2
    return all(
        bool((one.float() - other.float()).abs().max() <= tolerance * one.float().abs().max())
        for one, other in zip(*results, strict=True)
    )


def _get_epsilon(norm: torch.nn.Module) -> float | None:
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    return float(epsilon) if isinstance(epsilon, float) else None


def _may_fuse(*tensors: torch.Tensor) -> bool:
    """On CUDA, in one type, and not for torch.compile, which fuses by itself."""
    return (
        _state.is_on
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cuda" and x.dtype == tensors[0].dtype and x.numel() for x in tensors)
    )


def _give_up(error: Exception) -> None:
    _state.is_on = False
    log_once(f"Liger's kernels are not used any more, one raised {type(error).__name__}: {error}")


def _normalise(norm: Any, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """Takes the place of an RMS norm's `forward`."""
    own = type(norm).forward
    plain = not (arguments or options) and not norm.weight.requires_grad and x.shape[-1:] == norm.weight.shape
    kernels = _load()
    if not plain or kernels is None or not _may_fuse(x, norm.weight):
        return cast(torch.Tensor, own(norm, x, *arguments, **options))
    offset, casting = norm.fused_norm
    try:
        return cast(torch.Tensor, kernels.norm.apply(x, norm.weight, _get_epsilon(norm), offset, casting, False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the plain way would go on
        _give_up(error)
        return cast(torch.Tensor, own(norm, x))


def _run_mlp(mlp: Any, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """Takes the place of a gated MLP's `forward`."""
    own = type(mlp).forward
    kernels = _load()
    if arguments or options or kernels is None or not _may_fuse(x):
        return cast(torch.Tensor, own(mlp, x, *arguments, **options))
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if gate.shape != up.shape or not _may_fuse(gate, up):
        return cast(torch.Tensor, own(mlp, x))
    try:
        inner = kernels.gates[mlp.fused_gate].apply(gate, up)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the plain way would go on
        _give_up(error)
        return cast(torch.Tensor, own(mlp, x))
    return cast(torch.Tensor, mlp.down_proj(inner))
