"""Attention of flat batches: each segment over itself, and over the beginning that the rows share.

On CPU it multiplies a piece of queries with the keys that the piece sees. Keys that no query of a piece sees - later ones,
and those behind a sliding window - cost nothing, and keys and values are never copied. Scores of long rows never leave the
CPU's cache and are computed again in the backward pass (as in FlashAttention, Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medlora.kernels import varlen
from medlora.kernels.autograd import Context
from medlora.kernels.varlen import Span, make_mask

PIECE_SCORES = 2**17
"""Scores of a piece: they and their gradients, 1 MB of float32, stay in a core's second cache."""


SAVED_KEYS = 1024
"""Most keys of a query whose probabilities are saved for the backward pass; more take more memory than
the rest of a layer."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Sequence[Span] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, or, where a batch has a plan or comes with `segments`, attention within each segment.

    `query` [1, heads, tokens, size], `key` and `value` with as many or fewer heads; the mask is ignored.
    """
    plan = varlen.get_plan() if segments is None else None
    if plan is not None and plan.tokens == query.shape[2]:  # not, say, a tower for images
        segments = plan.segments
    if segments is None:
        if query.device.type == "cuda" and _is_one_token(query, key, attention_mask, options):
            return attend_with_packed_heads(query, key, value, attention_mask, options.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window, scale = options.get("sliding_window"), options.get("scaling") or query.shape[-1] ** -0.5
    dropout = options.get("dropout", 0.0) if module.training else 0.0
    if not dropout and varlen.suits(query, key):
        plan = plan or varlen.make_plan(segments).to(query.device)
        return varlen.attend_at_once(query, key, value, plan, window, scale), None
    if query.device.type == "cpu" and query.dtype == torch.float32 and not dropout:
        return _SegmentAttention.apply(query, key, value, tuple(segments), window, scale), None
    return varlen.attend_in_turn(query, key, value, segments, window, scale, dropout), None


def _is_one_token(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether there is one query a row, with fewer key heads, and a mask that is the same for all heads."""
    plain = not any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    masked = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[1] == 1
    return plain and masked and query.shape[2] == 1 < query.shape[1] // key.shape[1] and not options.get("dropout")


def attend_with_packed_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of one token a row: [rows, heads, 1, size], twice with fewer heads -> [rows, 1, heads, size].

    The query heads of a key head are taken for its queries. transformers 5.23 does so, too; earlier ones write keys and
    values once for each query head, in every layer of every step.
    """
    rows, heads, _, size = query.shape
    packed = query.reshape(rows, key.shape[1], -1, size)
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scale)
    return out.reshape(rows, 1, heads, -1)


@lru_cache(maxsize=512)  # every layer of a forward pass asks for the same ones
def _make_bias(first: int, queries: int, low: int, high: int, window: int | None) -> torch.Tensor | None:
    """`make_mask` as numbers to add to scores [queries, 1, keys], on CPU; None where every query sees every key."""
    seen = make_mask(first, queries, low, high, window, torch.device("cpu"))
    return None if seen.all() else torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]


def _cut(
    segments: Sequence[Span], groups: int, window: int | None
) -> Iterator[tuple[slice, list[slice], torch.Tensor | None]]:
    """Pieces of queries, the places in the sequence of the keys that they see, and the bias of their scores or None."""
    for start, stop, shared in segments:
        offset = shared - start  # from places in the sequence to positions in the row
        size = max(8, PIECE_SCORES // (groups * (stop + offset)))
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            first, high = begin + offset, end + offset
            low = 0 if window is None else max(0, first - window + 1)
            keys = [slice(max(low, shared) - offset, end)]
            if low < shared:
                keys.insert(0, slice(low, shared))
            yield slice(begin, end), keys, _make_bias(first, end - begin, low, high, window)


def _score(
    queries: torch.Tensor, key: torch.Tensor, at: Sequence[slice], bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Probabilities [queries, keys] of queries [tokens * groups, size]."""
    widths = [part.stop - part.start for part in at]
    scores = queries.new_empty(len(queries), sum(widths))
    for part, out in zip(at, scores.split(widths, dim=1), strict=True):
        out.addmm_(queries, key[part].T, beta=0, alpha=scale)
    if bias is not None:
        scores.view(len(bias), -1, scores.shape[1]).add_(bias)
    return torch.softmax(scores, 1, out=scores)


class _Segmented(Context, Protocol):
    segments: tuple[Span, ...]
    window: int | None
    scale: float


class _SegmentAttention(torch.autograd.Function):
    """[1, heads, tokens, size], twice with the heads of the keys -> [1, tokens, heads, size]."""

    @staticmethod
    def forward(
        ctx: _Segmented,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: tuple[Span, ...],
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        _, heads, tokens, size = query.shape
        groups = heads // key.shape[1]
        # [key heads, tokens * groups, size]: with one key head, as it lies in memory.
        queries = query.view(-1, groups, tokens, size).transpose(1, 2).reshape(-1, tokens * groups, size)
        out, saved = torch.empty_like(queries), []
        for head in range(len(queries)):
            for piece, at, bias in _cut(segments, groups, window):
                rows = slice(piece.start * groups, piece.stop * groups)
                shares = _score(queries[head, rows], key[0, head], at, bias, scale)
                if shares.shape[1] <= SAVED_KEYS:
                    saved.append(shares)
                done = 0
                for part in at:
                    width = part.stop - part.start
                    product = shares[:, done : done + width], value[0, head, part]
                    torch.addmm(out[head, rows], *product, beta=1 if done else 0, out=out[head, rows])
                    done += width
        ctx.save_for_backward(queries, key, value, *saved)
        ctx.segments, ctx.window, ctx.scale = segments, window, scale
        return out.view(-1, tokens, groups, size).transpose(0, 1).reshape(1, tokens, heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Segmented, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, key, value, *saved = ctx.saved_tensors
        known = iter(saved)
        _, tokens, heads, size = gradient.shape
        groups = heads // key.shape[1]
        gradients = gradient.view(tokens, -1, groups, size).transpose(0, 1).reshape(-1, tokens * groups, size)
        to_queries = torch.empty_like(queries)
        to_key, to_value = (torch.zeros(len(queries), tokens, size) for _ in range(2))
        for head in range(len(queries)):
            for piece, at, bias in _cut(ctx.segments, groups, ctx.window):
                rows = slice(piece.start * groups, piece.stop * groups)
                q, back, into = queries[head, rows], gradients[head, rows], to_queries[head, rows]
                widths = [part.stop - part.start for part in at]
                again = sum(widths) > SAVED_KEYS
                shares = _score(q, key[0, head], at, bias, ctx.scale) if again else next(known)
                to_shares = torch.empty_like(shares)
                for part, out in zip(at, to_shares.split(widths, dim=1), strict=True):
                    torch.mm(back, value[0, head, part].T, out=out)
                to_scores = torch._softmax_backward_data(to_shares, shares, 1, shares.dtype)
                pairs = zip(at, shares.split(widths, dim=1), to_scores.split(widths, dim=1), strict=True)
                for n, (part, share, to_score) in enumerate(pairs):
                    to_value[head, part].addmm_(share.T, back)
                    to_key[head, part].addmm_(to_score.T, q, alpha=ctx.scale)
                    into.addmm_(to_score, key[0, head, part], beta=1 if n else 0, alpha=ctx.scale)
        to_query = to_queries.view(-1, tokens, groups, size).transpose(1, 2).reshape(1, heads, tokens, size)
        return to_query, to_key[None], to_value[None], None, None, None


def install() -> None:
    """Make `attend` the `sdpa` of transformers, for every model of this process; other models see no difference."""
    AttentionInterface.register("sdpa", attend)
