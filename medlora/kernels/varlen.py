"""Attention of all segments of a flat batch in one call, by torch's varlen attention (FlashAttention) on CUDA.

Keys and values are gathered so that each segment has the beginning that the rows share before its own. Which tokens these
are is a `Plan`, made once a batch. It travels by a context variable: an argument through the model would be one more
value that torch.compile guards on, and not every family hands arguments on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from medlora.kernels.elementwise_cpu import log_once

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None  # type: ignore[assignment]

Span = tuple[int, int, int]
"""Where a segment begins and ends in the flat sequence, and how many tokens of the first segment, all or none, it sees, too."""

LEAST_CAPABILITY = (8, 0)
"""FlashAttention needs an Ampere GPU or a newer one."""


@dataclass(frozen=True)
class Plan:
    """The segments of a flat batch as varlen attention wants them."""

    segments: tuple[Span, ...]
    places: torch.Tensor | None
    """LongTensor [keys]: of every key of every segment, its place in the sequence; None where that is the sequence itself."""
    cu_q: torch.Tensor
    """IntTensor [segments + 1]: where the queries of each segment begin, and where the last ones end."""
    cu_k: torch.Tensor
    """The same of its keys, among the gathered ones."""
    max_q: int
    max_k: int
    """The longest of them."""

    @property
    def tokens(self) -> int:
        """Tokens of the flat sequence."""
        return self.segments[-1][1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """The same plan on another device."""
        places, cu_q, cu_k = (
            each if each is None else each.to(device, non_blocking=non_blocking)
            for each in (self.places, self.cu_q, self.cu_k)
        )
        assert cu_q is not None and cu_k is not None
        return replace(self, places=places, cu_q=cu_q, cu_k=cu_k)


def make_plan(segments: Sequence[Span]) -> Plan:
    """The plan of a flat batch, on CPU; its integers are known without asking a device."""
    queries = [stop - start for start, stop, _ in segments]
    keys = [stop - start + shared for start, stop, shared in segments]
    places = None
    if any(shared for _, _, shared in segments):
        parts = [part for start, stop, shared in segments for part in ((0, shared), (start, stop)) if part[1]]
        places = torch.cat([torch.arange(*part) for part in parts])
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(torch.int32) for sizes in (queries, keys))
    return Plan(tuple(segments), places, cu_q, cu_k, max(queries), max(keys))


_current: ContextVar[Plan | None] = ContextVar("plan of the flat batch", default=None)


def get_plan() -> Plan | None:
    """The plan of the batch that the model is running; None for a padded one."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def using(plan: Plan | None) -> Iterator[None]:
    """While inside, attention runs over the segments of this plan; None leaves everything as it is."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def carry_plan() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: what is computed again in the backward pass has the plan of the forward pass.

    On CUDA that happens in a thread of the autograd engine, where the context variable is not set.
    """
    return nullcontext(), using(_current.get())


def attend_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, window: int | None, scale: float
) -> torch.Tensor:
    """Attention within the segments: [1, heads, tokens, size], twice with the heads of the keys -> [1, tokens, heads, size]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.places is not None:
        k, v = _Gather.apply(k, plan.places), _Gather.apply(v, plan.places)
    assert varlen_attn is not None
    options: dict[str, Any] = {"scale": scale, **_choose_options(varlen_attn)}
    # A window wider than the longest segment is none. Windows count from the query back, itself not counted.
    options["window_size"] = (-1, 0) if window is None or window >= plan.max_k else (window - 1, 0)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, **options
    )
    assert isinstance(out, torch.Tensor)  # a pair only where its sums of exponentials are asked for
    return out[None]


@cache
def _choose_options(function: Callable[..., torch.Tensor]) -> dict[str, bool]:
    """torch 2.11 takes fewer key heads as they are; from 2.12 on one has to ask for it."""
    return {"enable_gqa": True} if "enable_gqa" in signature(function).parameters else {}


class _Gather(torch.autograd.Function):
    """x [tokens, heads, size] at `places`. The gradients of a place that occurs often are summed in float32.

    torch's own index_select would add up to as many numbers as there are rows in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=gradient.device)
        return total.index_add_(0, places, gradient.float()).to(gradient.dtype), None


def attend_in_turn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Span],
    window: int | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The same by torch's sdpa, one segment after another: on every device and in every type, slow where segments are many."""
    # One split instead of slices: the gradient of a slice is as long as the whole sequence, once a segment.
    sizes = [stop - start for start, stop, _ in segments]
    keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    parts = []
    for n, (q, (_, _, shared)) in enumerate(zip(query.split(sizes, dim=2), segments, strict=True)):
        k, v = keys[n], values[n]
        if shared:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        parts.append(_call_sdpa(q, k, v, window, scale, dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _call_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float, dropout: float
) -> torch.Tensor:
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    plain = queries == keys and (window is None or keys <= window)
    mask = None if plain else make_mask(keys - queries, queries, 0, keys, window, query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scale
    )


def make_mask(first: int, queries: int, low: int, high: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, high - low], True where the query at position `first` + i sees the key at position `low` + j."""
    distance = torch.arange(first, first + queries, device=device)[:, None] - torch.arange(low, high, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def suits(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `attend_at_once` may be used for these tensors [1, heads, tokens, size]; the first time it is tried."""
    if query.device.type != "cuda":
        return False
    return find_obstacle(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]) is None


@cache
def find_obstacle(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> str | None:
    """Why varlen attention cannot be used there, logged once; None where a tiny forward and backward pass equals sdpa's."""
    why = _find_missing(device, dtype) or _compare(device, dtype, heads, key_heads, size)
    if why is not None:
        log_once(f"attention of flat batches in one call is not used: {why}")
    return why


def _find_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if varlen_attn is None:
        return f"torch {torch.__version__} has no varlen attention"
    if device.type != "cuda":
        return f"it needs CUDA, and this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, and the model computes in {str(dtype).removeprefix('torch.')}"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, it needs {needed}"
    return None


def _compare(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> str | None:
    """What differs from sdpa in a shared beginning and two rows, with and without a window; or what was raised."""
    segments = ((0, 24, 0), (24, 40, 24), (40, 61, 24))
    plan, draw = make_plan(segments).to(device), torch.Generator().manual_seed(0)
    given = [torch.randn(1, n, 61, size, generator=draw).to(device, dtype) for n in (heads, key_heads, key_heads)]
    upstream = torch.randn(1, 61, heads, size, generator=draw).to(device, dtype)
    try:
        for window in (None, 16):
            found = []
            for at_once in (True, False):
                x = [each.detach().clone().requires_grad_() for each in given]
                with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                    if at_once:
                        out = attend_at_once(x[0], x[1], x[2], plan, window, size**-0.5)
                    else:
                        out = attend_in_turn(x[0], x[1], x[2], segments, window, size**-0.5)
                    found.append([out, *torch.autograd.grad(out, x, upstream)])
            for what, one, other in zip(("output", "queries", "keys", "values"), *found, strict=True):
                one, other = one.detach().float(), other.detach().float()
                if not (one - other).abs().max() <= 3e-2 * other.abs().max():
                    return f"its {what} differ from sdpa's{f' with a window of {window}' if window else ''}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a build, a driver or a shape that it does not know raises
        return f"trying it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
