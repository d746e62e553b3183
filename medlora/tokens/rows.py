"""Token ids -> training rows: labels, packing, lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from medlora.prompts import Example
from medlora.tokens.encode import Tokens, tokenise
from medlora.tokens.tokenizer import Tokenizer

IGNORED = -100
"""The label of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: ids, labels (IGNORED where there is no loss) and positions, all of one length.

    Positions start again at 0 where the next packed document begins; attention never crosses such a border.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a phase's examples fit its sequence length; reported before training starts."""

    examples: int
    rows: int
    dropped: int
    """Examples whose prompt and completion together are longer than the sequence."""
    split: int
    """Plain-text documents longer than the sequence, continued in the next row."""
    tokens: int
    supervised_tokens: int
    longest: int
    """Tokens of the longest example before anything was done to it."""
    p50: int = 0
    p90: int = 0
    p99: int = 0
    """Percentiles of the examples' tokens."""


class Rows(Sequence[Row]):
    """Tokens of examples as training rows; each row is made when it is read.

    `lengths`, `prompts` and `texts` are arrays over all of `tokens`; `order` selects examples, in training order.
    Prompted examples: loss on completion and end token; one that is too long is dropped whole and counted. Plain text:
    loss on every token except a document's first; a document that is too long continues in further rows. With `packing`
    documents share rows, which are filled one after another.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        lengths: numpy.ndarray,
        prompts: numpy.ndarray,
        texts: numpy.ndarray,
        order: Sequence[int],
        max_tokens: int,
        packing: bool,
    ) -> None:
        self.tokens = tokens
        starts: list[int] = []
        pieces: list[tuple[int, int, int]] = []
        dropped = split = filled = 0
        for i in order:
            n, head = int(lengths[i]), int(prompts[i])
            if not texts[i]:
                if n > max_tokens:
                    dropped += 1
                    continue
                starts.append(len(pieces))
                pieces.append((i, 0, n))
                filled = 0
                continue
            split += n > max_tokens
            for start, stop in _split(n, max_tokens, head):
                size = stop - start + (head if start else 0)
                if not (packing and filled and filled + size <= max_tokens):
                    starts.append(len(pieces))
                    filled = 0
                filled += size
                pieces.append((i, start, stop))
        self.starts = numpy.array([*starts, len(pieces)], dtype=numpy.int64)
        self.pieces = numpy.array(pieces, dtype=numpy.int64).reshape(-1, 3)
        chosen = numpy.asarray(order, dtype=numpy.int64)
        self.sizes, supervised = self._count(prompts, texts)
        of = lengths[chosen] if len(chosen) else numpy.zeros(1, dtype=numpy.int64)
        p50, p90, p99 = (int(value) for value in numpy.percentile(of, (50, 90, 99), method="higher"))
        counts = (len(order), len(self), dropped, split, int(self.sizes.sum()), supervised, int(of.max()))
        self.lengths = Lengths(*counts, p50, p90, p99)

    def _count(self, prompts: numpy.ndarray, texts: numpy.ndarray) -> tuple[numpy.ndarray, int]:
        """Tokens of each row, and how many of all carry a loss."""
        if not len(self.pieces):
            return numpy.zeros(0, dtype=numpy.int64), 0
        example, start, stop = self.pieces.T
        head, is_text = prompts[example].astype(numpy.int64), texts[example]
        sizes = stop - start + numpy.where(start > 0, head, 0)
        supervised = sizes - numpy.where(is_text, 1, numpy.maximum(head, 1))
        return numpy.add.reduceat(sizes, self.starts[:-1]), int(supervised.sum())

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one document."""
        return len(self.pieces) > len(self)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def find_examples(self, index: int) -> list[int]:
        """The places of the examples that a row is made from."""
        return [int(example) for example in self.pieces[self.starts[index] : self.starts[index + 1], 0]]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = Row([], [], [])
        for i, start, stop in self.pieces[self.starts[index] : self.starts[index + 1]].tolist():
            example = self.tokens[i]
            ids = list(example.ids[start:stop])
            if start:
                ids = [*example.ids[: example.prompt], *ids]
            hidden = (
                1 if example.is_text else max(example.prompt, 1)
            )  # nothing in its document predicts the first token
            row.input_ids.extend(ids)
            row.labels.extend([IGNORED] * hidden + ids[hidden:])
            row.position_ids.extend(range(len(ids)))
        return row


def _split(n: int, max_tokens: int, head: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a document of `n` tokens begin and end, each with room for the `head` that is repeated."""
    yield 0, min(n, max_tokens)
    step = max_tokens - head
    for start in range(max_tokens, n, step):
        yield start, min(n, start + step)


def arrange(tokens: Sequence[Tokens], max_tokens: int, packing: bool, order: Sequence[int] | None = None) -> Rows:
    """Tokens that are held in memory as rows of at most `max_tokens`; see `Rows`."""
    lengths = numpy.array([len(each.ids) for each in tokens], dtype=numpy.int64)
    prompts = numpy.array([each.prompt for each in tokens], dtype=numpy.int64)
    texts = numpy.array([each.is_text for each in tokens], dtype=bool)
    return Rows(tokens, lengths, prompts, texts, range(len(tokens)) if order is None else order, max_tokens, packing)


def encode(
    tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int, packing: bool
) -> tuple[list[Row], Lengths]:
    """Rows of at most `max_tokens` tokens, in the order of the examples, and what became of the examples."""
    rows = arrange(tokenise(tokenizer, examples), max_tokens, packing)
    return list(rows), rows.lengths
