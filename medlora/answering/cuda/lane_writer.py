"""A batch written over static lanes: the device is a step ahead of the host."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from medlora import pulse
from medlora.answering.cuda.decoder import LEAST_ROWS, Decoder
from medlora.answering.cuda.transfers import fetch_later, send
from medlora.answering.prefix_cache import Prefix
from medlora.answering.stops import Writing


class LaneWriter:
    """Writes what `generation._Writer` writes: each row's own continuation, whatever the other rows are.

    Step t + 1 is launched before the tokens of step t are looked at, so the host's work (stop words) hides behind the
    device's. Rows that are done are ignored, and left out once half of the rows are.
    """

    def __init__(self, decoder: Decoder, unknown: torch.Tensor, temperature: float) -> None:
        self.decoder, self.unknown, self.temperature = decoder, unknown, temperature

    def write(
        self,
        writing: Writing,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        prefix: Prefix | None,
        uniform: list[random.Random],
        max_tokens: int,
    ) -> None:
        """Fill `writing`; raises torch.OutOfMemoryError, with lanes and graphs released, where a batch does not fit."""
        decoder = self.decoder
        with decoder.releasing():
            decoder.unknown.copy_(self.unknown)  # graphs read it there
            logits = decoder.prefill(prompts, pad_id, prefix, max_tokens, self.temperature if uniform else 0.0)
            # Which prompt each row of the batch is; None: nobody's.
            slots: list[int | None] = [*range(len(prompts)), *[None] * (decoder.rows - len(prompts))]
            self._draw(slots, uniform)
            decoder.token[: len(logits)] = decoder.choose(logits)
            del logits
            for step in range(max_tokens):
                pulse.beat()
                fetch = fetch_later(decoder.token[: decoder.rows, 0])
                if step + 1 < max_tokens:
                    # A row that turns out to be done draws once too often, from its own stream.
                    self._draw(slots, uniform)
                    decoder.step()
                tokens = fetch()
                alive = [(row, i) for row, i in enumerate(slots) if i is not None]
                goes_on = writing.append([i for _, i in alive], [tokens[row] for row, _ in alive])
                for (row, _), more in zip(alive, goes_on, strict=True):
                    if not more:
                        slots[row] = None
                staying = [row for row, i in enumerate(slots) if i is not None]
                if not staying or step + 1 == max_tokens:
                    break
                if len(staying) <= decoder.rows // 2 and decoder.rows > LEAST_ROWS:
                    decoder.keep_rows(staying)
                    slots = [*(slots[row] for row in staying), *[None] * (decoder.rows - len(staying))]

    def _draw(self, slots: Sequence[int | None], uniform: Sequence[random.Random]) -> None:
        if uniform:
            drawn = [[uniform[i].random() if i is not None else 0.0] for i in slots]
            numbers = torch.tensor(drawn, dtype=torch.float64)
            self.decoder.drawn[: len(slots)] = send(numbers, self.decoder.device)
