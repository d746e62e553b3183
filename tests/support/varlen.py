"""torch's varlen attention in plain torch, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medlora.kernels import varlen


def use_reference_varlen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let flat batches on CPU take the way that they take on a GPU; each call adds an entry to the list."""
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return reference_varlen(*arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(varlen, "suits", lambda query, key: True)
    return calls


def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    **_: Any,
) -> torch.Tensor:
    """[queries, heads, size]; masks are aligned at the bottom right, as FlashAttention's are."""
    assert isinstance(window_size, tuple) and window_size[1] == 0, "causal is a tuple whose second number is 0"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    parts = []
    q_ends, k_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = distance >= 0
        if window_size[0] >= 0:
            seen = seen & (distance <= window_size[0])
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(parts)
