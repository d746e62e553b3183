"""Log-likelihoods of the letters of questions, at the last token of each context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from medlora.answering.cuda.transfers import send
from medlora.answering.prefix_cache import Prefix, compute_last_logits, make_batch, split_by_prefix
from medlora.answering.token_budget import Batcher, find_token_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def score_letters(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    letters: Sequence[Sequence[int]],
    pad_id: int,
    prefix: Prefix | None,
    get_batcher: Callable[[int], Batcher],
) -> list[list[float]]:
    """The log-likelihood of each of a context's `letters` (token ids) after it, in padded batches.

    `get_batcher` makes a Batcher of a token budget, or gives one back that knows better.
    """
    scores: dict[int, list[float]] = {}
    for shared, places in split_by_prefix(contexts, prefix):
        skipped = len(shared.ids) if shared else 0
        lengths = [len(contexts[i]) - skipped for i in places]
        longest = max(lengths)
        batcher = get_batcher(find_token_budget(model, longest, skipped + longest, 1))

        def work(batch: list[int], places: list[int] = places, shared: Prefix | None = shared) -> None:
            chosen = [places[i] for i in batch]
            inputs = make_batch(model, [contexts[i] for i in chosen], pad_id, shared, use_cache=shared is not None)
            logits = compute_last_logits(model, **inputs).float()
            picked = pick_letters(logits, [letters[i] for i in chosen]).tolist()
            scores.update((i, row[: len(letters[i])]) for i, row in zip(chosen, picked, strict=True))

        batcher.run(lengths, work)
    return [scores[i] for i in range(len(contexts))]


def pick_letters(logits: torch.Tensor, letters: Sequence[Sequence[int]]) -> torch.Tensor:
    """The log-likelihoods of each row's tokens, from float32 logits [rows, vocabulary]: [rows, most letters of a row].

    What is behind a row's own letters means nothing.
    """
    most = max(map(len, letters))
    ids = send(torch.tensor([[*row, *[row[0]] * (most - len(row))] for row in letters]), logits.device)
    return logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
