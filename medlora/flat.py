"""Training rows end to end in one sequence: no padding, a beginning that rows share computed once, the same gradients.

Every token goes through the linear layers once. Attention runs over each segment alone: a row's document sees itself, or, where
the rows of a batch begin alike (a worked example), each branch sees the shared prefix and itself. Positions are those of
the plain rows, so that rotary embeddings and sliding windows are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medlora.encoding import IGNORED, Row, find_supervised

Segment = tuple[int, int, int]
"""Where a segment begins and ends in the flat sequence, and how many tokens of the first segment, all or none, it sees, too."""

LEAST_SHARED = 16
"""Tokens from which on a shared beginning is worth a segment of its own."""

MOST_SCORES = 2**20
"""Scores of a segment and head that are kept for the backward pass on CPU; longer segments are torch's to compute."""


def flatten(rows: Sequence[Row], share_prefix: bool = True) -> tuple[Row, list[Segment]]:
    """The rows as one, and its segments; with `share_prefix` a beginning that all rows share stands there once.

    A label that follows the last token of a prefix or segment is never supervised, so the loss is that of the rows.
    """
    shared = _measure_shared(rows) if share_prefix else 0
    flat, segments = Row([], [], []), []
    if shared:
        segments.append((0, shared, 0))
        _extend(flat, rows[0], 0, shared)
    for row in rows:
        begins = [i for i, position in enumerate(row.position_ids) if position == 0] if not shared else [shared]
        for begin, end in zip(begins, [*begins[1:], len(row.input_ids)], strict=True):
            at = len(flat.input_ids)
            _extend(flat, row, begin, end)
            segments.append((at, at + end - begin, shared))
    return flat, segments


def _extend(flat: Row, row: Row, start: int, stop: int) -> None:
    flat.input_ids.extend(row.input_ids[start:stop])
    flat.labels.extend(row.labels[start:stop])
    flat.position_ids.extend(row.position_ids[start:stop])


def _measure_shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, each row one document, and the next token of none of them supervised."""
    if len(rows) < 2 or any(0 in row.position_ids[1:] for row in rows):
        return 0
    most = min(next((i for i, label in enumerate(row.labels) if label != IGNORED), len(row.labels)) for row in rows) - 1
    columns = zip(*(row.input_ids[: max(most, 0)] for row in rows), strict=True)
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), max(most, 0))
    return shared if shared >= LEAST_SHARED else 0


@dataclass(frozen=True)
class FlatCollator:
    """Rows -> a batch of one sequence without padding; takes the place of `encoding.Collator`."""

    share_prefix: bool = True
    token_type_ids: bool = False
    """Multimodal Gemma 3 wants them in training: all 0, for text."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """LongTensors `input_ids`, `labels`, `position_ids` [1, tokens], `supervised` (see `find_supervised`), and `segments`.

        The mask says nothing: of four dimensions, it keeps transformers from making one of tokens x tokens.
        """
        flat, segments = flatten(rows, self.share_prefix)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([flat.input_ids]),
            "labels": torch.tensor([flat.labels]),
            "position_ids": torch.tensor([flat.position_ids]),
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "segments": segments,
        }
        batch["supervised"] = find_supervised(batch["labels"])
        if self.token_type_ids:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Sequence[Segment] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, or, where a batch comes with `segments`, attention within each of them.

    `query` [1, heads, tokens, size], `key` and `value` with as many or fewer heads; the mask is not looked at.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window, scale = options.get("sliding_window"), options.get("scaling") or query.shape[-1] ** -0.5
    dropout = options.get("dropout", 0.0) if module.training else 0.0
    # One split instead of slices: the gradient of a slice is as long as the whole sequence, once a segment.
    sizes = [stop - start for start, stop, _ in segments]
    keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    parts = []
    for n, (q, (_, _, shared)) in enumerate(zip(query.split(sizes, dim=2), segments, strict=True)):
        k, v = keys[n], values[n]
        if shared:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        by_hand = q.device.type == "cpu" and not dropout and q.shape[2] * k.shape[2] <= MOST_SCORES
        parts.append(_multiply(q, k, v, window, scale) if by_hand else _call_sdpa(q, k, v, window, scale, dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _multiply(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """Attention as two products, the query heads of a key head in one matrix: on CPU a third faster than torch's flash
    attention for heads as wide as Gemma's, which wants keys and values copied for every query head."""
    _, heads, queries, size = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    folded = query.reshape(-1, groups * queries, size)
    scores = torch.baddbmm(query.new_zeros(1), folded, key[0].transpose(1, 2), beta=0, alpha=scale)
    scores = scores.view(-1, groups, queries, keys).add_(_make_bias(queries, keys, window, query.dtype))
    return torch.bmm(scores.softmax(-1).view(-1, groups * queries, keys), value[0]).view(1, heads, queries, size)


def _call_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float, dropout: float
) -> torch.Tensor:
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    plain = queries == keys and (window is None or keys <= window)
    mask = None if plain else _make_mask(queries, keys, window, query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scale
    )


def _make_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], True where a query sees a key: the queries are the last of the keys' positions."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


@lru_cache(maxsize=32)  # every layer of a forward pass asks for the same ones
def _make_bias(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """`_make_mask` as numbers to add to scores, on CPU."""
    seen = _make_mask(queries, keys, window, torch.device("cpu"))
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(~seen, float("-inf"))


AttentionInterface.register("sdpa", attend)
