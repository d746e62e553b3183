"""Which faster ways a model takes on a GPU: each is tried against the plain way, with a few tokens, before it is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from medlora.answering.cuda.adapters import PreparedAdapters
from medlora.answering.cuda.captures import Capture
from medlora.answering.cuda.decoder import Decoder
from medlora.answering.likelihoods.flat_letters import LEAST_SHARED, compute_flat_logits
from medlora.answering.prefix_cache import compute_last_logits, make_batch
from medlora.kernels.varlen import find_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TRIED, _NEXT = ((3, 4, 5, 6, 7), (4, 6, 5)), (5, 3)
"""Prompts of two lengths that decoding is tried with, and what is written behind them."""

_BEGINNING = tuple(3 + i % 5 for i in range(LEAST_SHARED))


class FastPaths:
    """What a GPU keeps of one model from call to call; `release` gives all of it back."""

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        self.model, self._capture = model, capture
        self.adapters = PreparedAdapters(model)

    def release(self) -> None:
        """Free lanes, graphs and prepared adapters."""
        if decoder := vars(self).get("decoder"):
            decoder.release()
        self.adapters.release()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """While inside, the active stage computes with prepared adapters."""
        with self.adapters.find().installed():
            yield

    @cached_property
    def decoder(self) -> Decoder | None:
        """Steps over static lanes; None, said once, where the model does not decode over them as it does otherwise."""
        decoder: Decoder | None = None

        def try_lanes() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal decoder
            decoder = Decoder(self.model, self.adapters, self._capture)
            return self._decode_over_lanes(decoder), self._decode_plainly()

        works = self._compare("generates without static lanes", try_lanes)
        if decoder:
            decoder.release()
        return decoder if works else None

    @cached_property
    def is_flat(self) -> bool:
        """Whether letters are scored from flat batches: there is varlen attention, and the model keeps contexts apart."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        if find_obstacle(self.model.device, self.model.dtype, heads, key_heads, size) is not None:
            return False
        return self.keeps_contexts_apart()

    def keeps_contexts_apart(self) -> bool:
        """Whether the contexts of a flat batch have the logits that each has in a padded one."""
        contexts = [[*_BEGINNING, *row] for row in _TRIED]

        def try_flat() -> tuple[torch.Tensor, torch.Tensor]:
            plain = compute_last_logits(self.model, **make_batch(self.model, contexts, 0, use_cache=False))
            return compute_flat_logits(self.model, contexts), plain

        return self._compare("scores letters in padded batches", try_flat)

    @torch.no_grad()
    def _compare(self, otherwise: str, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether two ways give the same logits within rounding; if not, it is said what the model does otherwise."""
        try:
            found, plain = (each.float() for each in compute())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a family's own forward pass, given what no other code gives it
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
            if (found - plain).abs().max() <= tolerance * plain.abs().max():
                return True
            why = "the logits differ"
        log.warning("%s %s: %s", type(self.model).__name__, otherwise, why)
        return False

    def _decode_plainly(self) -> torch.Tensor:
        """Logits after two prompts, and after one more token, [2, 2, vocabulary]."""
        batch = make_batch(self.model, _TRIED, 0)
        logits = [compute_last_logits(self.model, **batch)]
        mask = batch["attention_mask"]
        logits.append(
            compute_last_logits(
                self.model,
                input_ids=torch.tensor(_NEXT, device=mask.device)[:, None],
                attention_mask=torch.cat([mask, mask.new_ones(len(_NEXT), 1)], 1),
                position_ids=batch["position_ids"][:, -1:] + 1,
                past_key_values=batch["past_key_values"],
                use_cache=True,
            )
        )
        return torch.stack(logits)

    def _decode_over_lanes(self, decoder: Decoder) -> torch.Tensor:
        logits = [decoder.prefill(_TRIED, 0, None, 1, 0.0)]
        decoder.token[: len(_NEXT)] = torch.tensor(_NEXT, device=decoder.device)[:, None]
        logits.append(decoder.compute_logits())
        return torch.stack(logits)


@contextmanager
def using_fast_paths(model: PreTrainedModel, fast: FastPaths | None) -> Iterator[FastPaths | None]:
    """The fast paths of a model with the active stage prepared: the given ones, or on a GPU new ones, released at the end.

    None on CPU, where the ways that were measured there stay.
    """
    if fast is None and torch.device(model.device).type != "cuda":
        yield None
        return
    own = fast or FastPaths(model)
    try:
        with own.prepared():
            yield own
    finally:
        if fast is None:
            own.release()
