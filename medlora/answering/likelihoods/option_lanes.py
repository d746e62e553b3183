"""Log-likelihoods of continuations on a GPU, without a copy of the context for each of them.

All continuations of a context stand in one row behind it, and masks keep them apart: each sees the context and itself. Keys and
values of the context stay where they were written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from medlora.answering.cuda.decoder import Decoder, round_down_to_power
from medlora.answering.cuda.lanes import Masks, mask_out
from medlora.answering.prefix_cache import Prefix, split_by_prefix
from medlora.answering.token_budget import Batcher, find_token_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD_BYTES = 256 * 2**20
"""Most bytes of float32 logits at a time."""


@torch.no_grad()
def score_over_lanes(
    model: PreTrainedModel,
    decoder: Decoder,
    contexts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
    pad_id: int,
    prefix: Prefix | None,
) -> list[list[float]]:
    """As `options.score_continuations`; raises torch.OutOfMemoryError, lanes released, when one context does not fit."""
    sums: dict[int, list[float]] = {}
    for shared, places in split_by_prefix(contexts, prefix):
        skipped = len(shared.ids) if shared else 0
        lengths = [len(contexts[i]) - skipped for i in places]
        longest = max(lengths)
        tail = max(sum(len(ids) - 1 for ids in continuations[i]) for i in places)
        cached = decoder.round_up_columns(skipped + longest + tail)
        budget = find_token_budget(model, longest + tail, cached, tail + 1, copies=1)
        rows = round_down_to_power(max(budget // (longest + tail), 1))

        def work(batch: list[int], places: list[int] = places, shared: Prefix | None = shared) -> None:
            chosen = [places[i] for i in batch]
            rows = [contexts[i] for i in chosen], [continuations[i] for i in chosen]
            with decoder.releasing():
                sums.update(zip(chosen, _score(decoder, *rows, pad_id, shared), strict=True))

        Batcher(rows * longest, most_rows=rows, cuts=True).run(lengths, work)
    return [sums[i] for i in range(len(contexts))]


def _score(
    decoder: Decoder,
    contexts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
    pad_id: int,
    prefix: Prefix | None,
) -> Iterator[list[float]]:
    most = max(sum(len(ids) - 1 for ids in row) for row in continuations)
    logits = decoder.prefill(contexts, pad_id, prefix, max(most, 1), 0.0).float()
    firsts = [[ids[0] for ids in row] for row in continuations]
    widest = max(map(len, firsts))
    picked = logits.gather(
        1, torch.tensor([row + row[:1] * (widest - len(row)) for row in firsts], device=logits.device)
    )
    sums = (picked - logits.logsumexp(-1, keepdim=True)).tolist()
    if most:
        for row, tails in zip(sums, _score_tails(decoder, continuations, most, pad_id), strict=True):
            for k, tail in enumerate(tails):
                row[k] += tail
    for row, first in zip(sums, firsts, strict=True):
        yield row[: len(first)]


def _score_tails(
    decoder: Decoder, continuations: Sequence[Sequence[list[int]]], most: int, pad_id: int
) -> list[list[float]]:
    """The summed log-likelihood of all but the first token of each continuation, behind the contexts in the lanes."""
    assert decoder.lanes is not None
    columns: tuple[list[list[int]], ...] = ([], [], [], [])
    for row in continuations:
        parts = [(tail[:-1], tail[1:], [k] * (len(tail) - 1), range(len(tail) - 1)) for k, tail in enumerate(row)]
        flat = [[value for part in column for value in part] for column in zip(*parts, strict=True)]
        padding = most - len(flat[0])
        # Padding is nobody's: it sees itself alone, and no one sees it.
        for into, values, filler in zip(columns, flat, (pad_id, pad_id, -1, 0), strict=True):
            into.append(values + [filler] * padding)
    ids, targets, owners, offsets = columns
    device, rows, places = decoder.device, len(continuations), decoder.lanes.places
    owner, offset = torch.tensor(owners, device=device), torch.tensor(offsets, device=device)
    position = decoder.position[:rows] + offset  # that of the first token behind the context, and on
    masks = _make_masks(decoder, rows, owner, position)
    places.decoding = False  # columns are the host's again: the tokens go behind the context, all at once
    logits: torch.Tensor = decoder.model(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=masks,
        position_ids=position,
        past_key_values=decoder.lanes,
        use_cache=True,
    ).logits
    aims = torch.tensor(targets, device=device)[..., None]
    at_once = max(_HEAD_BYTES // (logits.shape[-1] * 4 * most), 1)
    scores = torch.cat(
        [
            (part.float().gather(-1, aim) - part.float().logsumexp(-1, keepdim=True)).squeeze(-1)
            for part, aim in zip(logits.split(at_once), aims.split(at_once), strict=True)
        ]
    )
    count = max(map(len, continuations))
    summed = scores.new_zeros(rows, count + 1).scatter_add_(1, owner % (count + 1), scores)  # -1: the last column
    return [row[: len(each)] for row, each in zip(summed.tolist(), continuations, strict=True)]


def _make_masks(decoder: Decoder, rows: int, owner: torch.Tensor, position: torch.Tensor) -> Masks:
    """What the tokens behind the contexts see, [rows, 1, tokens, columns + tokens]."""
    assert decoder.lanes is not None
    filled, device = decoder.lanes.places.filled, decoder.device
    pads = decoder.pad[:rows, None]
    columns = torch.arange(filled, device=device)
    of_context = (columns >= pads)[:, None].expand(-1, owner.shape[1], -1)
    n = torch.arange(owner.shape[1], device=device)
    mine = (owner[:, :, None] == owner[:, None]) & (n[:, None] >= n)
    own = torch.where((owner >= 0)[:, :, None], mine, n[:, None] == n)
    seen = torch.cat([of_context & (owner >= 0)[:, :, None], own], -1)
    keys = torch.cat([columns - pads, position], 1)  # positions of all keys
    distance = position[:, :, None] - keys[:, None]
    window = getattr(decoder.config, "sliding_window", None)
    return mask_out(decoder.kinds, ~seen[:, None], distance[:, None], window, decoder.model.dtype)
