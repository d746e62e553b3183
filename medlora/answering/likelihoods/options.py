"""Log-likelihoods of several continuations of each context, the context computed once for all of its continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from medlora.answering.prefix_cache import (
    ModelInputs,
    Prefix,
    compute_last_logits,
    fork,
    make_batch,
    select_rows,
    split_by_prefix,
)
from medlora.answering.token_budget import Batcher, find_token_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD_BYTES = 256 * 2**20
"""Most bytes of float32 logits at a time."""


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
    pad_id: int,
    prefix: Prefix | None,
    get_batcher: Callable[[int], Batcher],
) -> list[list[float]]:
    """The summed log-likelihood of each context's continuations (token ids, at least one each).

    `get_batcher` makes a Batcher of a token budget, or gives one back that knows better.
    """
    sums: dict[int, list[float]] = {}
    for shared, places in split_by_prefix(contexts, prefix):
        skipped = len(shared.ids) if shared else 0
        # The keys and values of a context are copied for every one of its continuations.
        lengths = [len(contexts[i]) - skipped for i in places]
        longest, most = max(lengths), max(len(continuations[i]) for i in places)
        tail = max(len(ids) for i in places for ids in continuations[i])
        budget = find_token_budget(model, longest + tail * most, (skipped + longest + tail) * most, 1)
        batcher = get_batcher(budget)

        def work(batch: list[int], places: list[int] = places, shared: Prefix | None = shared) -> None:
            chosen = [places[i] for i in batch]
            inputs = make_batch(model, [contexts[i] for i in chosen], pad_id, shared)
            logits = compute_last_logits(model, **inputs).float()
            first = logits.log_softmax(-1)
            made = {i: [first[at, ids[0]].item() for ids in continuations[i]] for at, i in enumerate(chosen)}
            # Continuations of like length together, so that little is padded; those of one token are done.
            tails = sorted(
                ((ids, at, k) for at, i in enumerate(chosen) for k, ids in enumerate(continuations[i]) if len(ids) > 1),
                key=lambda continuation: len(continuation[0]),
            )
            while tails:
                n = max(_HEAD_BYTES // (logits.shape[-1] * 4 * len(tails[-1][0])), 1)
                part, tails = tails[-n:], tails[:-n]
                for (_, at, k), score in zip(part, _score_tails(model, inputs, part, pad_id), strict=True):
                    made[chosen[at]][k] += score
            sums.update(made)

        batcher.run(lengths, work)
    return [sums[i] for i in range(len(contexts))]


def _score_tails(
    model: PreTrainedModel, inputs: ModelInputs, tails: Sequence[tuple[list[int], int, int]], pad_id: int
) -> list[float]:
    """Log-likelihood of all but the first token of each (ids, row of the batch, _), continuing the batch's cache.

    The shorter ones are padded at the end, where nothing attends to it.
    """
    device = inputs["input_ids"].device
    longest = max(len(ids) for ids, _, _ in tails)
    rows = torch.tensor([at for _, at, _ in tails], device=device)
    padded = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _, _ in tails], device=device)
    mask = inputs["attention_mask"][rows]
    cache = fork(inputs["past_key_values"])
    select_rows(cache, rows)
    logits = model(
        input_ids=padded[:, :-1],
        attention_mask=torch.cat([mask, mask.new_ones(len(tails), longest - 1)], 1),
        position_ids=inputs["position_ids"][rows, -1:] + torch.arange(1, longest, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits.float()
    scores = logits.gather(-1, padded[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    counted = torch.tensor([[i < len(ids) - 1 for i in range(longest - 1)] for ids, _, _ in tails], device=device)
    summed: list[float] = (scores * counted).sum(-1).tolist()
    return summed
