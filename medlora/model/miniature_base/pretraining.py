"""Pre-training of the miniature base model, on one thread of a CPU."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

from medlora.miniature.settings import (
    BATCH,
    COMPLETION_WEIGHT,
    DECAY_STEPS,
    DRILL_ACCURACY,
    DRILL_STEPS_AT_MOST,
    DRILL_WINDOW,
    LEARNING_RATE,
    LESSON_STEPS,
    LETTER_WEIGHT,
    WARMUP_STEPS,
    WEIGHT_NOISE,
)
from medlora.model.miniature_base.lessons import draw_lessons, drill
from medlora.prompts import Example
from medlora.records import LETTERS

REPORT_EVERY = 20


class Progress(TypedDict):
    """How far a build is."""

    what: str
    step: int
    total: int
    loss: float
    letters: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class LessonBatch:
    """Token ids (batch, length), the loss weight of each as a target, and which targets are answer letters."""

    ids: torch.Tensor
    weights: torch.Tensor
    letters: torch.Tensor


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float], list[bool]]:
    """Token ids, loss weights and letter marks of one lesson, put together as phases put their examples together."""
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    if not example.chat:
        ids = [tokenizer.bos_token_id, *completion, tokenizer.eos_token_id]
        return ids, [COMPLETION_WEIGHT] * len(ids), [False] * len(ids)
    turn = [{"role": "user", "content": example.prompt}]
    shown = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
    completion.append(tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    letter_ids, stop = (
        {tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS},
        tokenizer.convert_tokens_to_ids("."),
    )
    # "B" is an answer, the "B" of "B. option" is not.
    letters = [token in letter_ids and after != stop for token, after in zip(completion, completion[1:], strict=False)]
    letters.append(False)
    weights = [0.0] * len(prompt) + [LETTER_WEIGHT if letter else COMPLETION_WEIGHT for letter in letters]
    return prompt + completion, weights, [False] * len(prompt) + letters


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> LessonBatch:
    """Lessons as one right-padded batch; padding weighs nothing, and causal attention never looks at it."""
    rows = [encode(example, tokenizer) for example in examples]
    length = max(len(ids) for ids, _, _ in rows)
    pad = tokenizer.pad_token_id
    return LessonBatch(
        ids=torch.tensor([ids + [pad] * (length - len(ids)) for ids, _, _ in rows]),
        weights=torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights, _ in rows]),
        letters=torch.tensor([letters + [False] * (length - len(letters)) for _, _, letters in rows]),
    )


def pretrain(
    model: Gemma3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    on_progress: OnProgress | None = None,
) -> None:
    """Trains `model` in place: matching drills until they are mastered, then LESSON_STEPS of mixed lessons.

    Lessons are taken with WEIGHT_NOISE on the layers' matrices (after Fan et al. 2021, "Training with Quantization
    Noise for Extreme Model Compression"). So small a model otherwise loses its matching when its base is rounded to nf4
    or when plain text is trained into it.

    The switch waits for DRILL_ACCURACY over DRILL_WINDOW steps, because how long matching takes varies with the seed.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    drills: Iterator[Example] = iter(lambda: drill(rng), None)
    lessons = draw_lessons(rng)
    recent: deque[float] = deque(maxlen=DRILL_WINDOW)
    step, drilled = 0, None
    while drilled is None or step < drilled + LESSON_STEPS:
        source = drills if drilled is None else lessons
        batch = collate([next(source) for _ in range(BATCH)], tokenizer)
        left = LESSON_STEPS if drilled is None else drilled + LESSON_STEPS - step
        scale = min(1.0, (step + 1) / WARMUP_STEPS, left / DECAY_STEPS)
        noise = 0.0 if drilled is None else WEIGHT_NOISE
        loss, accuracy = _train_step(model, optimizer, batch, LEARNING_RATE * scale, noise)
        step += 1
        if drilled is None:
            recent.append(accuracy)
            mastered = len(recent) == DRILL_WINDOW and sum(recent) / DRILL_WINDOW >= DRILL_ACCURACY
            if mastered or step == DRILL_STEPS_AT_MOST:
                drilled = step
        if on_progress is not None and step % REPORT_EVERY == 0:
            total = LESSON_STEPS + (DRILL_STEPS_AT_MOST if drilled is None else drilled)
            on_progress({"what": "miniature base", "step": step, "total": total, "loss": loss, "letters": accuracy})


def _add_noise(model: Gemma3ForCausalLM, noise: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Moves the layers' matrices at random by `noise` times the deviation of each; returns each with its exact values."""
    if not noise:
        return []
    matrices = [part.weight for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    with torch.no_grad():
        exact = [(weight, weight.clone()) for weight in matrices]
        for weight in matrices:
            weight.add_(torch.randn_like(weight), alpha=noise * weight.std().item())
    return exact


def _train_step(
    model: Gemma3ForCausalLM, optimizer: torch.optim.Optimizer, batch: LessonBatch, learning_rate: float, noise: float
) -> tuple[float, float]:
    """One step of AdamW; returns the weighted loss and the share of answer letters predicted right."""
    exact = _add_noise(model, noise)
    # The head over the vocabulary costs as much as the layers: it runs only where a target weighs something.
    weighed = batch.weights[:, 1:] > 0
    targets, weights, letters = (t[:, 1:][weighed] for t in (batch.ids, batch.weights, batch.letters))
    hidden = model.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[weighed])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():
        for weight, value in exact:
            weight.copy_(value)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = logits.detach().argmax(-1)[letters] == targets[letters]
    return loss.item(), right.float().mean().item() if right.numel() else 0.0
