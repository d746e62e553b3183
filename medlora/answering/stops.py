"""What a model wrote, and where it stops writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


NO_STOPS = Stops()


class Writing:
    """The rows of a batch as they are written, a token at a time; each ends at a stop token or at its stop words."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, stops: Stops, rows: int) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ends = {*stop_token_ids(tokenizer, model)}
        # A token holds at least one byte of a word; a few more leave room for what is around it.
        self.window = max((len(word.encode()) for word in stops.words), default=0) + 4
        self.completing: dict[int, bool] = {}
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows

    def append(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Add a token to each of `rows`; which of them go on."""
        for row, token in zip(rows, tokens, strict=True):
            self.ended[row] = token in self.ends
            if not self.ended[row]:
                self.written[row].append(token)
        stopped = self._find_stops([self.written[row] for row in rows])
        return [not self.ended[row] and not stop for row, stop in zip(rows, stopped, strict=True)]

    def finish(self) -> list[Generated]:
        """What was written in each row."""
        texts = self.tokenizer.batch_decode(self.written, skip_special_tokens=True)
        return [
            Generated(self._cut(text), len(row) + end)
            for text, row, end in zip(texts, self.written, self.ended, strict=True)
        ]

    def _find_stops(self, rows: list[list[int]]) -> list[bool]:
        tails = [row[: len(row) - self.stops.tokens_after][-self.window :] for row in rows]
        asked = [
            i
            for i, (row, tail) in enumerate(zip(rows, tails, strict=True))
            # A row of fewer than `tokens_after` tokens shows two more of them with each that is written.
            if tail and (len(row) < self.stops.tokens_after or self._may_complete(tail[-1]))
        ]
        stopped = [False] * len(rows)
        texts = self.tokenizer.batch_decode([tails[i] for i in asked], skip_special_tokens=True) if asked else []
        for i, text in zip(asked, texts, strict=True):
            stopped[i] = any(word in text for word in self.stops.words)
        return stopped

    def _may_complete(self, token: int) -> bool:
        """Whether a stop word can end with this token; decoding every row after every token would keep a GPU waiting."""
        if token not in self.completing:
            text = str(self.tokenizer.decode([token], skip_special_tokens=True))
            # Nothing at all: a space that a decoder strips. U+FFFD: a part of a character.
            unclear = not text or "\ufffd" in text
            self.completing[token] = any(unclear or word[-1] in text for word in self.stops.words)
        return self.completing[token]

    def _cut(self, text: str) -> str:
        if not self.stops.tokens_after:
            for word in self.stops.words:
                text = text.split(word)[0]
        return text
