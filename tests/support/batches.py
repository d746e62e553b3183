"""Batches and small models with adapters, for the tests of kernels and collators."""

from __future__ import annotations

from typing import Any

import torch

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.kernels.supervised_head import SupervisedHead
from medlora.kernels.varlen import using
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import added_token_ids, load_tokenizer
from medlora.tokens.rows import IGNORED, Row
from tests.support.tiny import EXTRA


def make_row(*lengths: int, prompt: int = 0, start: int = 10, prefix: list[int] | None = None) -> Row:
    """A row of documents of these lengths; with `prompt`, one whose first tokens carry no loss."""
    row = Row([], [], [])
    for n, length in enumerate(lengths):
        ids = [*(prefix or []), *((start + 7 * n + 3 * i) % 40 + 40 for i in range(length))]
        hidden = max(prompt + len(prefix or []), 1)
        row.input_ids.extend(ids)
        row.labels.extend([IGNORED] * hidden + ids[hidden:])
        row.position_ids.extend(range(len(ids)))
    return row


PREFIX = [41 + i % 37 for i in range(21)]


BATCHES = {
    "uneven questions": [make_row(9, prompt=5), make_row(30, prompt=2, start=3), make_row(14, prompt=13, start=9)],
    "packed text": [make_row(12, 5, 20), make_row(3, start=4), make_row(25, 2, start=8)],
    "text beside questions": [make_row(6, 7, 8), make_row(22, prompt=9, start=2)],
    "shared prefix": [make_row(n, prompt=n - 2, prefix=PREFIX, start=n) for n in (6, 11, 4, 30)],
    "one row": [make_row(13, prompt=4)],
}
"""The tiny Gemma's window is 8 tokens, so that every prefix and most rows are longer."""


def measure(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    labels, head = batch.pop("labels"), SupervisedHead(model)
    with head.at(batch.pop("supervised")), using(batch.pop("plan", None)):
        loss = head.compute_loss(model(**batch, use_cache=False), labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def build(base: str, shapes: list[LoraSettings], quantization: Any = "none", rows: bool = False, **more: Any) -> Any:
    """The base with these adapters on top of each other, all of which do something; the last one is trained."""
    config = BaseModelConfig(model=base, quantization=quantization, **more)
    tokenizer = load_tokenizer(config, extra_tokens=EXTRA)
    model: Any = load_base(config, tokenizer)
    ids = added_token_ids(tokenizer, EXTRA) if rows else []
    for n, shape in enumerate(shapes):
        model = add_adapter(model, f"0{n}", shape, ids if n == 0 else [], seed=n)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.3)
    return model.train(), ids
