"""Rows -> batches: padded, or flat with a shared prefix."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from medlora.kernels.varlen import Span, find_obstacle, make_plan, using
from medlora.tokens.rows import IGNORED, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_supervised(labels: torch.Tensor) -> torch.Tensor:
    """The positions of the flattened `labels` [rows, length] whose next label carries a loss.

    Computed where batches are made, so that nobody waits for the GPU to learn how many there are.
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch padded on the right to its longest row.

    There is no attention mask. Padding comes after everything that carries loss, and restarting positions separate packed
    documents (transformers builds the block-diagonal mask from them). If any row of a batch is packed, padding is a
    separate document. Otherwise positions simply continue, so that attention stays causal.
    """

    pad_id: int
    token_type_ids: bool = False
    """Multimodal Gemma 3 wants them in training: all 0, for text."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """LongTensors `input_ids`, `labels`, `position_ids` [rows, longest], and `supervised` (see `find_supervised`)."""
        longest = max(len(row.input_ids) for row in rows)
        packed = any(0 in row.position_ids[1:] for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            n = len(row.input_ids)
            ids.append(row.input_ids + [self.pad_id] * (longest - n))
            labels.append(row.labels + [IGNORED] * (longest - n))
            positions.append(row.position_ids + list(range(longest - n) if packed else range(n, longest)))
        batch = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
        }
        batch["supervised"] = find_supervised(batch["labels"])
        if self.token_type_ids:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch


log = logging.getLogger("medlora.phase")


LEAST_SHARED = 16
"""A shared beginning of at least so many tokens is computed once, as a separate segment."""


def flatten(rows: Sequence[Row], share_prefix: bool = True) -> tuple[Row, list[Span]]:
    """The rows as one row, and its segments; with `share_prefix` a beginning that all rows share occurs once.

    A label that follows the last token of a prefix or segment is never supervised, so the loss equals that of the rows.
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
    """Rows -> a batch of one sequence without padding; takes the place of `Collator`."""

    share_prefix: bool = True
    token_type_ids: bool = False
    """Multimodal Gemma 3 wants them in training: all 0, for text."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """LongTensors `input_ids`, `labels`, `position_ids` [1, tokens], `supervised` (see `find_supervised`), and `plan`,
        the `varlen.Plan` that `varlen.using` gives to attention.

        The mask is empty. Its four dimensions stop transformers from making a mask of tokens x tokens.
        """
        flat, segments = flatten(rows, self.share_prefix)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([flat.input_ids]),
            "labels": torch.tensor([flat.labels]),
            "position_ids": torch.tensor([flat.position_ids]),
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "plan": make_plan(segments),
        }
        batch["supervised"] = find_supervised(batch["labels"])
        if self.token_type_ids:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch


@dataclass(frozen=True)
class Batching:
    """How the rows of a phase become batches on a model; `why` explains what differs from the config."""

    collator: Collator | FlatCollator
    packs: bool
    """Whether documents may share a row."""
    why: tuple[str, ...] = ()

    @property
    def is_flat(self) -> bool:
        """Whether batches are flat ones."""
        return isinstance(self.collator, FlatCollator)


def find_flat_obstacle(model: PreTrainedModel) -> str | None:
    """Why a GPU would run flat batches slowly, one segment after another; None where it takes them in one call."""
    text = model.config.get_text_config()
    heads: int = text.num_attention_heads
    size: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads: int = getattr(text, "num_key_value_heads", None) or heads
    return find_obstacle(model.device, model.dtype, heads, key_heads, size)


def choose_batching(model: PreTrainedModel, padded: Collator, flat: FlatCollator | None, packed: bool) -> Batching:
    """Flat or packed batches as wanted, if the model computes each row in them as it does alone.

    This is tried with a few tokens. Some layers (recurrent ones, eager attention, positions without rotation) would let
    one document see another.
    """
    family, why = type(model).__name__, []
    if flat is not None:
        for collator in dict.fromkeys([flat, FlatCollator(False, flat.token_type_ids)]):
            if _keeps_apart(model, padded, collator, _make_rows(LEAST_SHARED), _make_rows(0)[:2]):
                if collator is not flat:
                    why.append(f"{family} computes a beginning that rows share for each of them (share_prefix)")
                return Batching(collator, True, tuple(why))
        why.append(f"{family} does not keep the rows of a flat batch apart: batches are padded")
    if packed and not _keeps_apart(model, padded, padded, [], _make_rows(0)):
        why.append(f"{family} does not keep packed documents apart: each has a row of its own")
        return Batching(padded, False, tuple(why))
    return Batching(padded, True, tuple(why))


def _make_rows(shared: int) -> list[Row]:
    """Three documents of different lengths that begin with the same `shared` tokens."""
    rows = []
    for n, length in enumerate((7, 5, 9)):
        ids = [5 + i % 7 for i in range(shared)] + [4 + (5 * n + 3 * i) % 11 for i in range(length)]
        rows.append(Row(ids, [IGNORED] * (len(ids) - 1) + ids[-1:], list(range(len(ids)))))
    return rows


def _keeps_apart(
    model: PreTrainedModel, alone: Collator, together: Collator | FlatCollator, beginning: list[Row], packed: list[Row]
) -> bool:
    """Whether `together` gives the logits of each document alone: rows that begin alike, and a row of packed ones."""
    batches = [beginning] if beginning else []
    whole = Row([], [], [])
    for row in packed:
        _extend(whole, row, 0, len(row.input_ids))
    batches.append([whole, _make_rows(0)[2]])
    try:
        for rows in batches:
            documents = [_cut_document(row, begin, end) for row in rows for begin, end in _find_documents(row)]
            expected = torch.cat([_compute_logits(model, alone, [document])[0] for document in documents])
            found = _arrange_logits(model, together, rows)
            if model.dtype == torch.float32:
                same = (found - expected).abs().max() <= 1e-3 * expected.abs().max()
            else:  # a single number may be far off by rounding, and LLM.int8 rounds a row by what stands beside it
                same = (found - expected).norm() <= 0.1 * expected.norm()
            if not same:
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a family's own forward pass, given what no other code gives it
        log.info("%s: %s was tried and raises %s", type(model).__name__, type(together).__name__, error)
        return False
    return True


def _find_documents(row: Row) -> list[tuple[int, int]]:
    begins = [i for i, position in enumerate(row.position_ids) if position == 0]
    return list(zip(begins, [*begins[1:], len(row.input_ids)], strict=True))


def _cut_document(row: Row, begin: int, end: int) -> Row:
    return Row(row.input_ids[begin:end], row.labels[begin:end], row.position_ids[begin:end])


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, collator: Collator | FlatCollator, rows: Sequence[Row]) -> torch.Tensor:
    batch = {key: value.to(model.device) for key, value in collator(rows).items()}
    del batch["labels"], batch["supervised"]
    was_training = model.training
    try:
        with using(batch.pop("plan", None)):
            logits: torch.Tensor = model.eval()(**batch, use_cache=False).logits
        return logits.float()
    finally:
        model.train(was_training)


def _arrange_logits(model: PreTrainedModel, collator: Collator | FlatCollator, rows: Sequence[Row]) -> torch.Tensor:
    """The logits of a batch's rows one after another, a shared beginning once for each row."""
    logits = _compute_logits(model, collator, rows)
    if isinstance(collator, Collator):
        return torch.cat([logits[i, : len(row.input_ids)] for i, row in enumerate(rows)])
    _, segments = flatten(rows, collator.share_prefix)
    shared = segments[0][1] if segments[-1][2] else 0
    beginning = logits[0, :shared]
    parts = [torch.cat([beginning, logits[0, start:stop]]) for start, stop, _ in segments[1 if shared else 0 :]]
    return torch.cat(parts)
