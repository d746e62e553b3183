"""McqAnswerer: built once on a model, answers batches of questions by letter log-likelihood or reasoning, then letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from medlora.config import McqStyle, Scoring
from medlora.encoding import encode_prompts, encode_texts
from medlora.errors import InputError
from medlora.models import letter_token_ids, stop_token_ids
from medlora.prompts import ANSWER_FIELD, render_mcq
from medlora.records import McqRecord

_ANSWER_MARK = ANSWER_FIELD.strip()


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice, the normalised probabilities of the question's letters in order, and the text that led to it."""

    choice: str
    probabilities: tuple[float, ...]
    text: str = ""


class _SoonAfterMark(StoppingCriteria):
    """Finishes a row a few tokens after it spelled a mark: enough to see whether one letter and nothing else follows."""

    tokens_after = 8

    def __init__(self, tokenizer: Any, mark: str, prompt_length: int) -> None:
        self.tokenizer, self.mark, self.prompt_length = tokenizer, mark, prompt_length
        # A token holds at least one byte of the mark; a few more leave room for what stands around it.
        self.window = len(mark.encode()) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        end = input_ids.shape[1] - self.tokens_after
        start = max(self.prompt_length, end - self.window)
        if end <= start:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(input_ids[:, start:end], skip_special_tokens=True)
        return torch.tensor([self.mark in text for text in texts], device=input_ids.device)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` of shape [rows, longest], padding in front."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def get_pad_id(tokenizer: Any) -> int:
    """The padding token, or EOS for tokenizers without one."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int, batch_size: int, until: str | None = None
) -> list[str]:
    """Greedy continuations of the prompts as text, without special tokens; each ends at a stop token or soon after `until`.

    Prompts of like length share a batch. Tokens that the tokenizer does not know (padding of the vocabulary, words that
    only a later stage added) are never chosen.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=get_pad_id(tokenizer),
        suppress_tokens=list(range(len(tokenizer), rows)) or None,
    )
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_left([prompts[i] for i in chosen], get_pad_id(tokenizer), model.device)
        batch.pop("position_ids")  # generate derives them from the mask at every step
        stopping = StoppingCriteriaList(
            [_SoonAfterMark(tokenizer, until, batch["input_ids"].shape[1])] if until else []
        )
        made = model.generate(**batch, generation_config=config, stopping_criteria=stopping)
        new = made[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


class McqAnswerer:
    """Answers questions with the stage that is active in its model.

    `worked` is the solved example of style `reasoning_full`. Raises InputError when the tokenizer cannot answer with the
    letters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        scoring: Scoring = "letter",
        style: McqStyle = "reasoning",
        max_tokens: int = 256,
        batch_size: int = 32,
        worked: McqRecord | None = None,
    ) -> None:
        if scoring == "reason" and style == "answer":
            raise InputError(
                "scoring `reason` needs a reasoning style; style `answer` has no reasoning before its letter"
            )
        self.model, self.tokenizer = model, tokenizer
        self.scoring, self.style, self.worked = scoring, style, worked
        self.max_tokens, self.batch_size = max_tokens, batch_size

    def answer(self, records: Sequence[McqRecord]) -> list[Answer]:
        """One Answer a question, in the order of the questions."""
        if not records:
            return []
        was_training = self.model.training
        self.model.eval()
        try:
            prompts = encode_prompts(
                self.tokenizer, [render_mcq(record, self.style, self.worked) for record in records]
            )
            texts = [""] * len(records)
            if self.scoring == "reason":
                texts = generate(
                    self.model, self.tokenizer, prompts, self.max_tokens, self.batch_size, until=_ANSWER_MARK
                )
            if self.style == "answer":
                contexts = prompts
            else:
                leads = encode_texts(self.tokenizer, [_lead_to_answer(text) for text in texts])
                contexts = [prompt + lead for prompt, lead in zip(prompts, leads, strict=True)]
            return self._choose(records, contexts, texts)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _choose(self, records: Sequence[McqRecord], contexts: list[list[int]], texts: list[str]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(records)
        ids = {record.letters: self._letter_ids(record.letters) for record in records}
        order = sorted(range(len(records)), key=lambda i: len(contexts[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = pad_left([contexts[i] for i in chosen], get_pad_id(self.tokenizer), self.model.device)
            logits = self.model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            for i, row in zip(chosen, logits, strict=True):
                letters = records[i].letters
                probabilities = row[ids[letters]].softmax(-1).tolist()
                best = max(range(len(letters)), key=probabilities.__getitem__)
                answers[i] = Answer(letters[best], tuple(probabilities), texts[i])
        return [answer for answer in answers if answer is not None]

    def _letter_ids(self, letters: str) -> list[int]:
        return letter_token_ids(self.tokenizer, letters, "" if self.style == "answer" else ANSWER_FIELD)


def _lead_to_answer(text: str) -> str:
    """What was reasoned, then the answer field: where the letter stands next. Cut-off reasoning gets the field too."""
    reasoning = text.split(_ANSWER_MARK)[0].strip()
    return f"{reasoning}\n{ANSWER_FIELD}" if reasoning else ANSWER_FIELD
