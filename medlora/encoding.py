"""Examples -> token ids and labels; packing of plain text; collation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medlora.prompts import Example

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


def needs_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer's texts begin with BOS (Gemma and Llama: yes; Qwen: no)."""
    bos = tokenizer.bos_token_id
    return bos is not None and (
        tokenizer("a").input_ids[0] == bos or (tokenizer.bos_token or "\0") in (tokenizer.chat_template or "")
    )


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without any special token of the tokenizer's own accord."""
    return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """Ids of each prompt as the model sees it: the user's turn of the chat template, else plain; BOS exactly once.

    Shots are turns before it; without a template they stand above the prompt, a blank line behind each.
    """
    texts = []
    for example in examples:
        if not example.chat:
            texts.append(example.prompt)
        elif tokenizer.chat_template:
            turns = []
            for prompt, completion in example.shots:
                turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            turns.append({"role": "user", "content": example.prompt})
            texts.append(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            )
        else:
            shots = "".join(f"{prompt}\n{completion}\n\n" for prompt, completion in example.shots)
            texts.append(f"{shots}{example.prompt}\n")
    bos = [tokenizer.bos_token_id] if needs_bos(tokenizer) else []
    return [bos + (ids[1:] if ids[:1] == bos else ids) for ids in encode_texts(tokenizer, texts)]


def find_end_token(tokenizer: Any, example: Example) -> int:
    """The token that closes a completion: the end of the turn where chat turns have one of their own, else EOS."""
    if example.chat and tokenizer.chat_template:
        turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
        if turn_end is not None and turn_end != tokenizer.unk_token_id:
            return turn_end
    return tokenizer.eos_token_id


def encode(tokenizer: Any, examples: Sequence[Example], max_tokens: int, packing: bool) -> tuple[list[Row], Lengths]:
    """Rows of at most `max_tokens` tokens, in the order of the examples, and what became of the examples.

    Prompted examples: loss on completion and end token; one that is too long is dropped whole and counted. Plain text:
    loss on every token but a document's first; a document that is too long goes on in further rows. With `packing`
    documents share rows, filled one after another.
    """
    prompts = encode_prompts(tokenizer, examples)
    completions = encode_texts(tokenizer, [example.completion for example in examples])
    rows: list[Row] = []
    open_row: Row | None = None
    dropped = split = longest = 0
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        ids = [*prompt, *completion, find_end_token(tokenizer, example)]
        longest = max(longest, len(ids))
        if example.prompt:
            if len(ids) > max_tokens:
                dropped += 1
                continue
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            rows.append(Row(ids, _hide_first(labels), list(range(len(ids)))))
            continue
        pieces = list(_split(ids, max_tokens, prompt))
        split += len(pieces) > 1
        for piece in pieces:
            document = Row(piece, _hide_first(piece), list(range(len(piece))))
            if packing and open_row and len(open_row.input_ids) + len(piece) <= max_tokens:
                for name in Row.__slots__:
                    getattr(open_row, name).extend(getattr(document, name))
            else:
                rows.append(document)
                open_row = document
    tokens = sum(len(row.input_ids) for row in rows)
    supervised = sum(label != IGNORED for row in rows for label in row.labels)
    return rows, Lengths(len(examples), len(rows), dropped, split, tokens, supervised, longest)


def _hide_first(labels: list[int]) -> list[int]:
    """Without a label on the first token: nothing before it in its document predicts it."""
    return [IGNORED, *labels[1:]]


def _split(ids: list[int], max_tokens: int, bos: list[int]) -> Iterable[list[int]]:
    """A document in pieces of at most `max_tokens`, each beginning with BOS where the tokenizer has one."""
    yield ids[:max_tokens]
    step = max_tokens - len(bos)
    for start in range(max_tokens, len(ids), step):
        yield bos + ids[start : start + step]


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

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """LongTensors `input_ids`, `labels`, `position_ids` of shape [rows, longest]."""
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
        if self.token_type_ids:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch
