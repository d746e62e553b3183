"""Examples -> token ids and labels; packing of plain text; collation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch

from medlora.prompts import Example
from medlora.turns import OPTIONS, Convention, Render, fix_date, learn, write_prompt

log = logging.getLogger(__name__)

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
class Tokens:
    """An example as ids: prompt, completion, end tokens. The first `prompt` ids carry no loss; plain text's is its BOS,
    which begins every further piece of the document, too."""

    ids: Sequence[int]
    prompt: int
    is_text: bool


@dataclass(frozen=True, slots=True)
class Lengths:
    """What became of a phase's examples at its sequence length; said before training starts."""

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


def needs_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer's plain texts begin with BOS (Gemma and Llama: yes; Qwen and SmolLM: no)."""
    return find_start(tokenizer)[:1] == [tokenizer.bos_token_id]


def find_start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a plain text: BOS for most, nothing for some.

    A chat template writes its own.
    """
    whole, (bare,) = list(tokenizer("a").input_ids), encode_texts(tokenizer, ["a"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without any special token of the tokenizer's own accord."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.padding or backend.truncation:
        return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    # The same ids without the offsets of every piece, which nobody here asks for: a fifth of the time less.
    return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def find_convention(tokenizer: Any) -> Convention | None:
    """How the tokenizer's chat template writes turns; None without one. Raises InputError where it cannot write any."""
    if not tokenizer.chat_template:
        return None
    convention = learn(_make_renderer(tokenizer), _name_template(tokenizer))
    if convention.closes:
        _log_once(
            f"{_name_template(tokenizer)} leaves reasoning open where an answer begins: it is closed there with "
            f"{convention.closes.strip()}, so that answers are trained and scored outside of it"
        )
    return convention


def _make_renderer(tokenizer: Any) -> Render:
    dated = fix_date(tokenizer.chat_template)
    return lambda messages, **options: str(
        tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False, **OPTIONS, **options)
    )


def _name_template(tokenizer: Any) -> str:
    return f"base.model: the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


@cache
def _log_once(text: str) -> None:
    log.warning(text)


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """Ids of each prompt as the model sees it: the user's turn of the chat template, else plain.

    A chat prompt begins as the template writes it, plain text as the tokenizer begins it; BOS stands there at most once.
    Shots are turns before it; without a template they stand above the prompt, a blank line behind each.
    Raises InputError for a chat template that raises, or leaves out what is asked.
    """
    chat = any(example.chat for example in examples)
    convention = find_convention(tokenizer) if chat else None
    render, name, bos = _make_renderer(tokenizer), _name_template(tokenizer), tokenizer.bos_token_id
    texts = []
    for example in examples:
        if not example.chat:
            texts.append(example.prompt)
        elif convention:
            turns = []
            for prompt, completion in example.shots:
                turns += [("user", prompt), ("assistant", completion)]
            texts.append(write_prompt(render, convention, [*turns, ("user", example.prompt)], name))
        else:
            shots = "".join(f"{prompt}\n{completion}\n\n" for prompt, completion in example.shots)
            texts.append(f"{shots}{example.prompt}\n")
    start, made = find_start(tokenizer), []
    for example, ids in zip(examples, encode_texts(tokenizer, texts), strict=True):
        if not (example.chat and convention):
            ids = [*start, *(ids[1:] if bos in start and ids[:1] == [bos] else ids)]
        made.append(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids)
    return made


def find_end_tokens(tokenizer: Any, chat: bool = True) -> list[int]:
    """The tokens that close a completion: what the chat template writes behind an assistant's turn, up to the token that stops it.

    EOS for plain text, and where the template writes no token of its own there.
    """
    convention = find_convention(tokenizer) if chat else None
    eos = tokenizer.eos_token_id
    if convention is None:
        return [eos]
    if convention.end is None:
        known = tokenizer.get_vocab().get("<end_of_turn>")
        return [eos if known is None else known]
    ids, between = encode_texts(tokenizer, [convention.end.strip(), convention.between.lstrip()])
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = next((i for i, token in enumerate(ids) if token in marks or len(ids) == 1), None)
    if first is None:
        return [eos]
    # What stands behind the last answer alone ends the whole talk, not a turn: Phi-3 writes EOS there.
    shared = next(
        (i for i, (a, b) in enumerate(zip(ids, between, strict=False)) if a != b), min(len(ids), len(between))
    )
    ids = ids[: max(shared, first + 1)]
    return ids[first : ids.index(eos, first) + 1] if eos in ids[first:] else [ids[first]]


def tokenise(tokenizer: Any, examples: Sequence[Example]) -> list[Tokens]:
    """Each example as ids, of whatever length."""
    prompts = encode_prompts(tokenizer, examples)
    completions = encode_texts(tokenizer, [example.completion for example in examples])
    ends = {chat: find_end_tokens(tokenizer, chat) for chat in {example.chat for example in examples}}
    return [
        Tokens([*prompt, *completion, *ends[example.chat]], len(prompt), not example.prompt)
        for example, prompt, completion in zip(examples, prompts, completions, strict=True)
    ]


class Rows(Sequence[Row]):
    """Tokens of examples as training rows, put together when they are asked for.

    `lengths`, `prompts` and `texts` are arrays over all of `tokens`; `order` says which of them, and in which order.
    Prompted examples: loss on completion and end token; one that is too long is dropped whole and counted. Plain text:
    loss on every token but a document's first; a document that is too long goes on in further rows. With `packing`
    documents share rows, filled one after another.
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


def encode(tokenizer: Any, examples: Sequence[Example], max_tokens: int, packing: bool) -> tuple[list[Row], Lengths]:
    """Rows of at most `max_tokens` tokens, in the order of the examples, and what became of the examples."""
    rows = arrange(tokenise(tokenizer, examples), max_tokens, packing)
    return list(rows), rows.lengths


def find_supervised(labels: torch.Tensor) -> torch.Tensor:
    """The positions of the flattened `labels` [rows, length] whose next label carries a loss.

    Found where batches are made, so that a GPU need not be waited for to know how many there are.
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch padded on the right to its longest row.

    There is no attention mask: padding stands behind everything that carries loss, and restarting positions keep packed
    documents apart (transformers builds the block-diagonal mask from them). Where any row of a batch is packed, padding
    is a document of its own; else positions just go on, so that attention stays plainly causal.
    """

    pad_id: int
    token_type_ids: bool = False
    """Multimodal Gemma 3 wants them in training: all 0, for text."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """LongTensors `input_ids`, `labels`, `position_ids` [rows, longest], and `supervised` (see `find_supervised`)."""
        longest = max(len(row.input_ids) for row in rows)
        packed = any(0 in row.position_ids[1:] for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            n = len(row.input_ids)
            ids.append(row.input_ids + [self.pad_id] * (longest - n))
            labels.append(row.labels + [IGNORED] * (longest - n))
            positions.append(row.position_ids + list(range(longest - n) if packed else range(n, longest)))
        batch = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
        }
        batch["supervised"] = find_supervised(batch["labels"])
        if self.token_type_ids:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch
