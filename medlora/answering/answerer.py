"""Ask a model multiple-choice questions: by log-likelihood, by generation, or by reasoning and then the letter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from medlora.answering.cuda.fast_paths import FastPaths, using_fast_paths
from medlora.answering.generation import Kept, Sampling, generate, get_pad_id, make_batcher
from medlora.answering.likelihoods.flat_letters import FlatScorer
from medlora.answering.likelihoods.letters import score_letters
from medlora.answering.likelihoods.option_lanes import score_over_lanes
from medlora.answering.likelihoods.options import score_continuations
from medlora.answering.prefix_cache import Prefix, can_reuse, compute_prefix, identify_weights, share_prefix
from medlora.answering.stops import Generated, Stops
from medlora.answering.token_budget import Batcher
from medlora.config.base import McqStyle, Scoring
from medlora.config.evaluation import Normalisation
from medlora.errors import InputError
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.kernels.modes import in_eval_mode
from medlora.model.tokenizer import letter_token_ids
from medlora.prompts import ANSWER_FIELD, KORMEDMCQA_FIELD, KORMEDMCQA_STOPS, render_mcq
from medlora.records import McqRecord
from medlora.seeds import derive_seed
from medlora.tokens.encode import encode_prompts, encode_texts
from medlora.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANSWER_MARK = ANSWER_FIELD.strip()


_REASONING_STYLES = ("reasoning", "reasoning_full")


# Two questions with nothing in common: what their prompts share, all prompts of a stage share.
_UNLIKE = (McqRecord("-", "가", ("가", "나"), "A"), McqRecord("-", "1", ("x", "y"), "B"))


_SHORTEST_PREFIX = 16
"""Tokens from which on a KV cache is cheaper than computing them again."""

_STREAMED = 64
"""Questions that are rendered and tokenised together."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice, or None where no letter could be read, and the numbers behind it.

    `probabilities` are over the question's letters in order and sum to 1; `margin` is the best one minus the next.
    `log_likelihoods` are those of the letters (or of the options' whole texts). All are empty or None for `generate`.
    `text` is what the model itself wrote, `tokens` how many tokens that were. `samples` are the letters read from each
    of several samples, whose majority the choice is.
    """

    choice: str | None
    probabilities: tuple[float, ...] = ()
    margin: float | None = None
    text: str = ""
    tokens: int = 0
    log_likelihoods: tuple[float, ...] = ()
    samples: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How questions are asked and answers are read; the keys of an evaluation's config, with the solved examples.

    Raises InputError for a scoring that the style has no place for.
    """

    scoring: Scoring = "letter"
    style: McqStyle = "reasoning"
    worked: McqRecord | None = None
    """The solved example that prompts of style `reasoning_full` show."""
    shots: Sequence[McqRecord] = ()
    """Solved examples before every question."""
    max_tokens: int = 256
    token_budget: int | None = None
    """Most tokens of a forward pass; None finds it, on CUDA from free memory."""
    normalisation: Normalisation = "character"
    """How `option_text` compares options: by the `sum` of their tokens' log-likelihoods (`acc` of lm-evaluation-harness),
    per `token`, or per `character` (its `acc_norm`)."""
    samples: int = 1
    """Answers of `generate` per question; the majority wins, and of a tie the letter that came first."""
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scoring == "reason" and self.style not in _REASONING_STYLES:
            raise InputError(
                f"scoring `reason` needs a reasoning style; style `{self.style}` has no reasoning before its letter"
            )
        if self.samples > 1 and self.temperature <= 0:
            raise InputError("samples above 1 need a temperature above 0; greedy samples are all the same")


class McqAnswerer:
    """Answers questions with the stage that is active in its model; batches do not change an answer.

    What all prompts begin with is computed once and cached until another stage is active or a weight changes. `answer`
    raises InputError when the tokenizer cannot answer with the letters. `fast` is what the answerers of one model keep on
    a GPU between calls; without it, each call on a GPU gives its memory back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        settings: AnswerSettings = AnswerSettings(),
        fast: FastPaths | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.fast = model, tokenizer, settings, fast
        self.scoring, self.style = settings.scoring, settings.style
        self._batchers: dict[str, Batcher] = {}
        self._flat: FlatScorer | None = None
        self._prefix: Prefix | None = None
        self._weights: tuple[Any, ...] | None = None

    def answer(self, records: Sequence[McqRecord]) -> list[Answer]:
        """One Answer a question, in the order of the questions."""
        if not records:
            return []
        with in_eval_mode(self.model), using_fast_paths(self.model, self.fast) as fast:
            if self.scoring == "letter" and self.style not in _REASONING_STYLES:
                return self._score_letters(records, self._stream(records), fast)
            prompts = self._encode(records)
            if self.scoring == "generate":
                return self._generate(records, prompts, fast)
            if self.scoring == "option_text":
                return self._score_options(records, prompts, fast)
            written = [Generated("", 0)] * len(records)
            if self.scoring == "reason":
                written = self._write(prompts, fast, Stops((_ANSWER_MARK,), tokens_after=8))
            contexts = self._lead_on(prompts, [made.text for made in written])
            return [
                replace(answer, text=made.text, tokens=made.tokens)
                for answer, made in zip(self._score_letters(records, contexts, fast), written, strict=True)
            ]

    def _stream(self, records: Sequence[McqRecord]) -> Iterator[list[int]]:
        """The context before each letter, a few questions at a time: a GPU works while the next ones are tokenised."""
        lead = _split_off_space(self.tokenizer, self.style)
        for start in range(0, len(records), _STREAMED):
            for prompt in self._encode(records[start : start + _STREAMED]):
                yield prompt + lead

    def _encode(self, records: Sequence[McqRecord]) -> list[list[int]]:
        return encode_prompts(
            self.tokenizer,
            [render_mcq(record, self.style, self.settings.worked, self.settings.shots) for record in records],
        )

    def _reuse_prefix(self) -> Prefix | None:
        weights = identify_weights(self.model)
        if weights != self._weights:
            ids = share_prefix(self._encode(_UNLIKE))
            reusable = len(ids) >= _SHORTEST_PREFIX and can_reuse(self.model)
            self._prefix = None  # free the old one first
            self._prefix = compute_prefix(self.model, ids) if reusable else None
            self._weights = weights
        return self._prefix

    def _batcher(self, budget: int) -> Batcher:
        """The batcher of scoring, made of a budget; it remembers which batch size fitted."""
        if "score" not in self._batchers:
            is_gpu = torch.device(self.model.device).type == "cuda"
            self._batchers["score"] = Batcher(self.settings.token_budget or budget, cuts=is_gpu)
        return self._batchers["score"]

    def _lead_on(self, prompts: list[list[int]], texts: Sequence[str]) -> list[list[int]]:
        """Prompts followed by the reasoning and the answer field, so that the next token is the letter."""
        leads = encode_texts(self.tokenizer, [_lead_to_answer(text) for text in texts])
        return [prompt + lead for prompt, lead in zip(prompts, leads, strict=True)]

    def _write(
        self, prompts: list[list[int]], fast: FastPaths | None, stops: Stops, seeds: Sequence[int] = ()
    ) -> list[Generated]:
        prefix, max_tokens, longest = self._reuse_prefix(), self.settings.max_tokens, max(map(len, prompts))
        if "generate" not in self._batchers:
            budget, skipped = self.settings.token_budget, len(prefix.ids) if prefix else 0
            self._batchers["generate"] = make_batcher(self.model, longest, max_tokens, fast, skipped, budget)
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_tokens,
            stops=stops,
            sampling=Sampling(self.settings.temperature, seeds) if seeds else None,
            kept=Kept(prefix, self._batchers["generate"], fast),
        )

    def _generate(self, records: Sequence[McqRecord], prompts: list[list[int]], fast: FastPaths | None) -> list[Answer]:
        n, sampled = self.settings.samples, self.settings.temperature > 0
        places = [i for i in range(len(records)) for _ in range(n)]
        seeds = [derive_seed(self.settings.seed, "sample", records[i].id, str(k % n)) for k, i in enumerate(places)]
        stops = Stops(KORMEDMCQA_STOPS if self.style == "kormedmcqa" else ())
        made = self._write([prompts[i] for i in places], fast, stops, seeds if sampled else ())
        return [
            _vote(made[start : start + n], record.letters)
            for start, record in zip(range(0, len(made), n), records, strict=True)
        ]

    def _score_letters(
        self, records: Sequence[McqRecord], contexts: Iterable[list[int]], fast: FastPaths | None
    ) -> list[Answer]:
        ids = {letters: self._letter_ids(letters) for letters in {record.letters for record in records}}
        letters = [ids[record.letters] for record in records]
        if fast and fast.is_flat:
            self._flat = self._flat or FlatScorer(self.model, self.settings.token_budget)
            scored = self._flat.score(contexts, letters)
        else:
            prefix, pad_id = self._reuse_prefix(), get_pad_id(self.tokenizer)
            scored = score_letters(self.model, [*contexts], letters, pad_id, prefix, self._batcher)
        return [_choose(record.letters, row, row) for record, row in zip(records, scored, strict=True)]

    def _score_options(
        self, records: Sequence[McqRecord], prompts: list[list[int]], fast: FastPaths | None
    ) -> list[Answer]:
        contexts = self._lead_on(prompts, [""] * len(prompts)) if self.style in _REASONING_STYLES else prompts
        before, space = _locate_letter(self.style)
        head = len(encode_texts(self.tokenizer, [before])[0]) if before else 0
        options = [
            [
                ids[head:]
                for ids in encode_texts(self.tokenizer, [f"{before}{space}{option}" for option in record.options])
            ]
            for record in records
        ]
        pad_id, prefix = get_pad_id(self.tokenizer), self._reuse_prefix()
        if fast and fast.decoder:
            scored = score_over_lanes(self.model, fast.decoder, contexts, options, pad_id, prefix)
        else:
            scored = score_continuations(self.model, contexts, options, pad_id, prefix, self._batcher)
        answers = []
        for record, sums, ids in zip(records, scored, options, strict=True):
            lengths = {
                "sum": [1] * len(sums),
                "token": [len(option) for option in ids],
                "character": [len(option) for option in record.options],
            }[self.settings.normalisation]
            answers.append(_choose(record.letters, [s / n for s, n in zip(sums, lengths, strict=True)], sums))
        return answers

    def _letter_ids(self, letters: str) -> list[int]:
        return find_letter_ids(self.tokenizer, self.style, letters)


def find_letter_ids(tokenizer: Tokenizer, style: McqStyle, letters: str) -> list[int]:
    """The token of each letter where a prompt of that style is answered; raises InputError when one has none."""
    before, space = _locate_letter(style)
    if _split_off_space(tokenizer, style):
        before, space = before + space, ""
    return letter_token_ids(tokenizer, [space + letter for letter in letters], before)


def _locate_letter(style: McqStyle) -> tuple[str, str]:
    """How the context ends, as far as it can change the letter's token, and what precedes the letter."""
    if style == "kormedmcqa":
        return KORMEDMCQA_FIELD, " "
    return (ANSWER_FIELD if style in _REASONING_STYLES else ""), ""


def _split_off_space(tokenizer: Tokenizer, style: McqStyle) -> list[int]:
    """The tokens of the space before a letter where the tokenizer separates it; none where ` A` is one token."""
    before, space = _locate_letter(style)
    plain, spaced, whole = encode_texts(tokenizer, [before, before + space, f"{before}{space}A"])
    return spaced[len(plain) :] if whole[:-1] == spaced else []


def _choose(letters: str, scores: Sequence[float], log_likelihoods: Sequence[float]) -> Answer:
    """The letter of the highest score (the first of equals), probabilities by softmax of the scores.

    Raises FloatingPointError where the model overflowed: a choice among NaN would be a guess.
    """
    if not all(map(math.isfinite, scores)):
        raise FloatingPointError(
            f"the model's log-likelihoods of {letters} are {[round(score, 3) for score in scores]}"
        )
    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(-1).tolist()
    best = max(range(len(letters)), key=scores.__getitem__)
    first, second = sorted(probabilities, reverse=True)[:2]
    return Answer(letters[best], tuple(probabilities), first - second, log_likelihoods=tuple(log_likelihoods))


def _vote(made: Sequence[Generated], letters: str) -> Answer:
    """The letter read from most of the samples, with the text of the first that gave it; unreadable ones do not vote."""
    read = [extract_answer_letter(sample.text, letters) for sample in made]
    votes = Counter(letter for letter in read if letter)
    choice = max(votes, key=votes.__getitem__) if votes else None
    return Answer(
        choice,
        text=made[read.index(choice)].text,
        tokens=sum(sample.tokens for sample in made),
        samples=tuple(read) if len(read) > 1 else (),
    )


def _lead_to_answer(text: str) -> str:
    """The reasoning, then the answer field, so that the next token is the letter; also for reasoning that was cut off."""
    reasoning = text.split(_ANSWER_MARK)[0].strip()
    return f"{reasoning}\n{ANSWER_FIELD}" if reasoning else ANSWER_FIELD
