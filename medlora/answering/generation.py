"""Greedy or sampled continuations of many prompts at once; a finished row leaves the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from medlora import pulse
from medlora.answering.cuda.decoder import Decoder, round_down_to_power
from medlora.answering.cuda.fast_paths import FastPaths, using_fast_paths
from medlora.answering.cuda.lane_writer import LaneWriter
from medlora.answering.prefix_cache import Prefix, compute_last_logits, make_batch, select_rows, split_by_prefix
from medlora.answering.stops import NO_STOPS, Generated, Stops, Writing
from medlora.answering.token_budget import MOST_ROWS, Batcher, find_token_budget
from medlora.kernels.modes import in_eval_mode
from medlora.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """Text drawn at a temperature above 0, each prompt with its own seed, so that batches do not change it."""

    temperature: float
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a caller keeps from call to call: prompts that begin with `prefix` take it from there.

    Without `fast`, a GPU's memory is given back at the end of a call.
    """

    prefix: Prefix | None = None
    batcher: Batcher | None = None
    fast: FastPaths | None = None


NOTHING = Kept()


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
    stops: Stops = NO_STOPS,
    sampling: Sampling | None = None,
    kept: Kept = NOTHING,
) -> list[Generated]:
    """A continuation of each prompt: greedy, or sampled.

    Tokens that the tokenizer does not know (padding of the vocabulary, words that only a later stage added) are never
    chosen.
    """
    done: list[Generated | None] = [None] * len(prompts)
    if not prompts:
        return []
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    known = torch.zeros(embeddings.weight.shape[0], dtype=torch.bool)
    known[list(tokenizer.get_vocab().values())] = True
    unknown, temperature = ~known.to(model.device), sampling.temperature if sampling else 0.0
    batcher = kept.batcher
    with in_eval_mode(model), using_fast_paths(model, kept.fast) as fast:
        writer: _Writer | LaneWriter = _Writer(model, unknown, temperature)
        if fast and fast.decoder:
            writer = LaneWriter(fast.decoder, unknown, temperature)
        for shared, places in split_by_prefix(prompts, kept.prefix):
            skipped = len(shared.ids) if shared else 0
            lengths = [len(prompts[i]) - skipped for i in places]
            if batcher is None:
                batcher = make_batcher(model, skipped + max(lengths), max_tokens, fast, skipped)

            def work(batch: list[int], places: list[int] = places, shared: Prefix | None = shared) -> None:
                chosen = [places[i] for i in batch]
                uniform = [random.Random(sampling.seeds[i]) for i in chosen] if sampling else []
                writing = Writing(model, tokenizer, stops, len(chosen))
                inputs = [prompts[i] for i in chosen], get_pad_id(tokenizer), shared
                writer.write(writing, *inputs, uniform, max_tokens)
                for i, made in zip(chosen, writing.finish(), strict=True):
                    done[i] = made

            batcher.run(lengths, work)
    return [made for made in done if made is not None]


def make_batcher(
    model: PreTrainedModel,
    longest: int,
    max_tokens: int,
    fast: FastPaths | None,
    skipped: int,
    tokens: int | None = None,
) -> Batcher:
    """A Batcher for prompts of at most `longest` tokens, `skipped` of them in a prefix; of `tokens` or as many as fit.

    On CPU that is 64 rows, as a step costs one pass over the weights however many rows. Lanes hold a power of two of rows.
    """
    if torch.device(model.device).type != "cuda":
        return Batcher(tokens or 64 * longest)
    decoder: Decoder | None = fast.decoder if fast else None
    cached, copies = longest + max_tokens, 2
    if decoder:
        cached, copies = decoder.round_up_columns(cached), 1
    computed = max(longest - skipped, 1)
    budget = tokens or min(find_token_budget(model, computed, cached, 1, copies), MOST_ROWS * computed)
    return Batcher(budget, round_down_to_power(max(budget // computed, 1)) if decoder else None)


class _Writer:
    """Writes a batch over keys and values that grow with every token."""

    def __init__(self, model: PreTrainedModel, unknown: torch.Tensor, temperature: float) -> None:
        self.model, self.unknown, self.temperature = model, unknown, temperature

    def write(
        self,
        writing: Writing,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        prefix: Prefix | None,
        uniform: list[random.Random],
        max_tokens: int,
    ) -> None:
        batch = make_batch(self.model, prompts, pad_id, prefix)
        mask, positions, cache = batch["attention_mask"], batch["position_ids"][:, -1:], batch["past_key_values"]
        alive = list(range(len(prompts)))
        logits = compute_last_logits(self.model, **batch)
        for step in range(max_tokens):
            pulse.beat()
            tokens = self._choose(logits, [uniform[i] for i in alive] if uniform else [])
            goes_on = writing.append(alive, tokens.tolist())
            staying = [at for at, more in enumerate(goes_on) if more]
            if not staying or step + 1 == max_tokens:
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

    def _choose(self, logits: torch.Tensor, uniform: list[random.Random]) -> torch.Tensor:
        logits = logits.float().masked_fill(self.unknown, -torch.inf)
        if not uniform:
            return logits.argmax(-1)
        # Inverse transform sampling with one number of each row's own stream: what a row draws depends on no other.
        summed = (logits / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = torch.tensor([[stream.random()] for stream in uniform], device=logits.device, dtype=summed.dtype)
        return torch.searchsorted(summed, drawn * summed[:, -1:], right=True).squeeze(1)
