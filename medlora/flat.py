"""Training rows end to end in one sequence: no padding, a beginning that rows share computed once, the same gradients.

Every token goes through the linear layers once. Attention runs over each segment alone: a row's document sees itself, or, where
the rows of a batch begin alike (a worked example), each branch sees the shared prefix and itself. Positions are those of
the plain rows, so that rotary embeddings and sliding windows are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medlora.attention import Segment
from medlora.encoding import IGNORED, Row, find_supervised

LEAST_SHARED = 16
"""Tokens from which on a shared beginning is worth a segment of its own."""


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
