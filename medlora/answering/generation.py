"""Greedy or sampled continuations of many prompts at once; a finished row leaves the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from medlora import pulse
from medlora.answering.prefix_cache import Prefix, compute_last_logits, make_batch, select_rows
from medlora.answering.token_budget import Batcher, find_token_budget
from medlora.kernels.modes import in_eval_mode
from medlora.model.tokenizer import stop_token_ids
from medlora.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote, without special tokens, and how many tokens it wrote, the one that stopped it counted."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Stops:
    """Where a row ends, apart from stop tokens: when one of `words` and then `tokens_after` more tokens were written.

    With `tokens_after` 0 the text is cut before the word (as lm-evaluation-harness does), else nothing is cut.
    """

    words: tuple[str, ...] = ()
    tokens_after: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Text drawn at a temperature above 0, each prompt with its own seed, so that batches do not change it."""

    temperature: float
    seeds: Sequence[int]


def get_pad_id(tokenizer: Tokenizer) -> int:
    """The padding token, or EOS for tokenizers without one."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    stops: Stops = Stops(),
    prefix: Prefix | None = None,
    batcher: Batcher | None = None,
    sampling: Sampling | None = None,
) -> list[Generated]:
    """A continuation of each prompt: greedy, or sampled.

    Prompts that begin with `prefix` take it from there. Tokens that the tokenizer does not know (padding of the
    vocabulary, words that only a later stage added) are never chosen.
    """
    done: list[Generated | None] = [None] * len(prompts)
    if not prompts:
        return []
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    known = torch.zeros(embeddings.weight.shape[0], dtype=torch.bool)
    known[list(tokenizer.get_vocab().values())] = True
    writer = _Writer(
        model, tokenizer, max_tokens, stops, ~known.to(model.device), sampling.temperature if sampling else 0.0
    )
    for shared, places in split_by_prefix(prompts, prefix):
        skipped = len(shared.ids) if shared else 0
        lengths = [len(prompts[i]) - skipped for i in places]
        longest = max(lengths)
        if batcher is None:
            batcher = Batcher(find_generation_budget(model, longest, skipped + longest + max_tokens))

        def work(batch: list[int], places: list[int] = places, shared: Prefix | None = shared) -> None:
            chosen = [places[i] for i in batch]
            uniform = [random.Random(sampling.seeds[i]) for i in chosen] if sampling else []
            for i, made in zip(chosen, writer.write([prompts[i] for i in chosen], shared, uniform), strict=True):
                done[i] = made

        with in_eval_mode(model):
            batcher.run(lengths, work)
    return [made for made in done if made is not None]


def find_generation_budget(model: PreTrainedModel, longest: int, cached_tokens: int) -> int:
    """A token budget for generation: on CPU 64 rows, as a step costs one pass over the weights however many rows."""
    if torch.device(model.device).type != "cuda":
        return 64 * longest
    return min(find_token_budget(model, longest, cached_tokens, 1), 512 * longest)


def split_by_prefix(rows: Sequence[Sequence[int]], prefix: Prefix | None) -> list[tuple[Prefix | None, list[int]]]:
    """Places of the rows that begin with the prefix, and of the others; an empty group is left out."""
    if prefix is None:
        return [(None, list(range(len(rows))))]
    n = len(prefix.ids)
    beginning = [i for i, row in enumerate(rows) if len(row) > n and tuple(row[:n]) == prefix.ids]
    rest = sorted({*range(len(rows))} - {*beginning})
    return [(shared, places) for shared, places in ((prefix, beginning), (None, rest)) if places]


class _Writer:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        max_tokens: int,
        stops: Stops,
        unknown: torch.Tensor,
        temperature: float,
    ) -> None:
        self.model, self.tokenizer, self.max_tokens, self.stops = model, tokenizer, max_tokens, stops
        self.unknown, self.temperature = unknown, temperature
        self.ends = {*stop_token_ids(tokenizer, model)}
        # A token holds at least one byte of a word; a few more leave room for what is around it.
        self.window = max((len(word.encode()) for word in stops.words), default=0) + 4

    def write(
        self, prompts: Sequence[Sequence[int]], prefix: Prefix | None, uniform: list[random.Random]
    ) -> list[Generated]:
        batch = make_batch(self.model, prompts, get_pad_id(self.tokenizer), prefix)
        mask, positions, cache = batch["attention_mask"], batch["position_ids"][:, -1:], batch["past_key_values"]
        written: list[list[int]] = [[] for _ in prompts]
        ended = [0] * len(prompts)
        alive = list(range(len(prompts)))
        logits = compute_last_logits(self.model, **batch)
        for step in range(self.max_tokens):
            pulse.beat()
            tokens = self._choose(logits, [uniform[i] for i in alive] if uniform else [])
            for i, token in zip(alive, tokens.tolist(), strict=True):
                ended[i] = token in self.ends
                if not ended[i]:
                    written[i].append(token)
            stopped = self._find_stops([written[i] for i in alive])
            staying = [at for at, i in enumerate(alive) if not ended[i] and not stopped[at]]
            if not staying or step + 1 == self.max_tokens:
                break
            if len(staying) < len(alive):
                rows = torch.tensor(staying, device=mask.device)
                select_rows(cache, rows)
                mask, positions, tokens = mask[rows], positions[rows], tokens[rows]
                alive = [alive[at] for at in staying]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            positions = positions + 1
            logits = compute_last_logits(
                self.model,
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            Generated(self._cut(text), len(row) + end) for text, row, end in zip(texts, written, ended, strict=True)
        ]

    def _choose(self, logits: torch.Tensor, uniform: list[random.Random]) -> torch.Tensor:
        logits = logits.float().masked_fill(self.unknown, -torch.inf)
        if not uniform:
            return logits.argmax(-1)
        # Inverse transform sampling with one number of each row's own stream: what a row draws depends on no other.
        summed = (logits / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = torch.tensor([[stream.random()] for stream in uniform], device=logits.device, dtype=summed.dtype)
        return torch.searchsorted(summed, drawn * summed[:, -1:], right=True).squeeze(1)

    def _find_stops(self, rows: list[list[int]]) -> list[bool]:
        if not self.stops.words:
            return [False] * len(rows)
        tails = [row[: len(row) - self.stops.tokens_after][-self.window :] for row in rows]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return [any(word in text for word in self.stops.words) for text in texts]

    def _cut(self, text: str) -> str:
        if not self.stops.tokens_after:
            for word in self.stops.words:
                text = text.split(word)[0]
        return text
