"""Letters from flat batches, the layout of training: no padding, and what all contexts begin with once a pass.

The host renders and tokenises the next contexts while the device computes, and reads the results a pass later.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from medlora import pulse
from medlora.answering.cuda.transfers import fetch_later, send
from medlora.answering.likelihoods.letters import pick_letters
from medlora.answering.prefix_cache import share_prefix
from medlora.answering.token_budget import find_token_budget
from medlora.kernels.memory import clear_memory
from medlora.kernels.varlen import Span, make_plan, using

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Fetch = Callable[[], list[list[float]]]
"""Waits for the results of a pass."""

MOST_TOKENS = 32_768
"""Tokens of a pass: enough to keep a GPU busy, few enough that the host's work for the next ones hides behind it."""

LEAST_SHARED = 16
"""A shared beginning of at least so many tokens is computed once a pass."""


@dataclass(frozen=True, slots=True)
class FlatContexts:
    """Contexts as one sequence."""

    ids: list[int]
    positions: list[int]
    segments: list[Span]
    last: list[int]
    """Where the last token of each context is."""


def lay_out(contexts: Sequence[Sequence[int]]) -> FlatContexts:
    """The contexts one after another, behind what all of them begin with."""
    shared = min(len(share_prefix([list(context) for context in contexts])), min(map(len, contexts)) - 1)
    shared = shared if shared >= LEAST_SHARED and len(contexts) > 1 else 0
    flat = FlatContexts(list(contexts[0][:shared]), list(range(shared)), [(0, shared, 0)] if shared else [], [])
    for context in contexts:
        start = len(flat.ids)
        flat.ids.extend(context[shared:])
        flat.positions.extend(range(shared, len(context)))
        flat.segments.append((start, len(flat.ids), shared))
        flat.last.append(len(flat.ids) - 1)
    return flat


def compute_flat_logits(model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits after each context, [contexts, vocabulary]."""
    flat = lay_out(contexts)
    device, plan = model.device, make_plan(flat.segments)
    places = None if plan.places is None else send(plan.places, device)
    with using(replace(plan, places=places, cu_q=send(plan.cu_q, device), cu_k=send(plan.cu_k, device))):
        logits: torch.Tensor = model(
            input_ids=send(torch.tensor([flat.ids]), device),
            position_ids=send(torch.tensor([flat.positions]), device),
            # Four dimensions stop transformers from making a mask of tokens x tokens.
            attention_mask=torch.zeros(1, 1, 1, 1, device=device),
            use_cache=False,
            logits_to_keep=send(torch.tensor(flat.last), device),
        ).logits
    return logits[0]


class FlatScorer:
    """Scores letters pass after pass; when memory runs out, passes become half as long, which is said once."""

    def __init__(self, model: PreTrainedModel, tokens: int | None = None) -> None:
        self.model = model
        self.tokens = tokens or min(find_token_budget(model, 128, 0, 1), MOST_TOKENS)
        self._warned = False

    @torch.no_grad()
    def score(self, contexts: Iterable[list[int]], letters: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-likelihood of each of a context's `letters` (token ids) after it.

        Raises torch.OutOfMemoryError when one context alone does not fit.
        """
        scores: list[list[float]] = []
        waiting: deque[Fetch] = deque()
        begun = 0
        for batch in self._cut(contexts):
            waiting.extend(self._launch(batch, letters[begun : begun + len(batch)]))
            begun += len(batch)
            while len(waiting) > 1:
                scores += waiting.popleft()()
            pulse.beat()
        for fetch in waiting:
            scores += fetch()
        return [row[: len(wanted)] for row, wanted in zip(scores, letters, strict=True)]

    def _cut(self, contexts: Iterable[list[int]]) -> Iterator[list[list[int]]]:
        """Contexts in their order, as many as make a pass; each is taken from `contexts` only when it is needed."""
        batch: list[list[int]] = []
        shared = total = 0
        for context in contexts:
            if batch and context[:shared] != batch[0][:shared]:
                shared = len(share_prefix([batch[0][:shared], context]))
            shared = shared if batch else len(context)
            if batch and total + len(context) - len(batch) * shared > self.tokens:
                yield batch
                batch, shared, total = [], len(context), 0
            batch.append(context)
            total += len(context)
        if batch:
            yield batch

    def _launch(self, batch: Sequence[list[int]], letters: Sequence[Sequence[int]]) -> list[Fetch]:
        try:
            picked = pick_letters(compute_flat_logits(self.model, batch).float(), letters)
            return [fetch_later(picked)]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            self.tokens = max(self.tokens // 2, 1)
            if not self._warned:
                log.warning("out of memory with %d contexts in a pass: passes are halved", len(batch))
                self._warned = True
        clear_memory()  # outside of `except`, where the traceback would keep the pass's tensors alive
        half = len(batch) // 2
        return [*self._launch(batch[:half], letters[:half]), *self._launch(batch[half:], letters[half:])]
