"""Which faster ways a model takes on a GPU: found by trying them against the plain way, with a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from medlora.answering.card.adapters import PreparedAdapters
from medlora.answering.card.captures import Capture
from medlora.answering.card.decoder import Decoder
from medlora.answering.prefix_cache import compute_last_logits, make_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TRIED, _NEXT = ((3, 4, 5, 6, 7), (4, 6, 5)), (5, 3)
"""Prompts of two lengths that the ways are tried with, and what is written behind them."""


class Card:
    """What a GPU keeps of one model from call to call; `release` gives all of it back.

    `decoder` is None where the model does not decode over lanes as it does otherwise, which is said once.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        self.model = model
        self.adapters = PreparedAdapters(model)
        self.decoder = self._try_decoder(capture)
        self.is_flat = False

    def release(self) -> None:
        """Free lanes, graphs and prepared adapters."""
        if self.decoder:
            self.decoder.release()
        self.adapters.release()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """While inside, the active stage computes with prepared adapters."""
        with self.adapters.find().installed():
            yield

    @torch.no_grad()
    def _try_decoder(self, capture: Capture | None) -> Decoder | None:
        name = type(self.model).__name__
        try:
            decoder = Decoder(self.model, self.adapters, capture)
            plain = self._decode_plainly()
            with self.prepared():
                found = _decode_over_lanes(decoder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a family's own forward pass, given what no other code gives it
            log.warning("%s generates without static lanes: %s", name, str(error).splitlines()[0] if str(error) else error)
            return None
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        if not (found - plain).abs().max() <= tolerance * plain.abs().max():
            log.warning("%s generates without static lanes: they give other logits", name)
            return None
        decoder.release()
        return decoder

    def _decode_plainly(self) -> torch.Tensor:
        """Logits after two prompts, and after one more token, in float32, [2, 2, vocabulary]."""
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
        return torch.stack(logits).float()


def _decode_over_lanes(decoder: Decoder) -> torch.Tensor:
    logits = [decoder.start(_TRIED, 0, None, 1, 0.0)]
    decoder.token[: len(_NEXT)] = torch.tensor(_NEXT, device=decoder.device)[:, None]
    logits.append(decoder.compute_logits())
    return torch.stack(logits).float()


@contextmanager
def using_card(model: PreTrainedModel, card: Card | None) -> Iterator[Card | None]:
    """The card of a model with the active stage prepared: the given one, or on a GPU one that is released at the end.

    None on CPU, where the ways that were measured there stay.
    """
    if card is None and torch.device(model.device).type != "cuda":
        yield None
        return
    own = card or Card(model)
    try:
        with own.prepared():
            yield own
    finally:
        if card is None:
            own.release()
