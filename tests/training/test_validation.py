"""Dev scores are those of the records, whatever stands beside them in a batch."""

from __future__ import annotations

import math

import pytest
import torch

from medlora.config.model import BaseModelConfig
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import render
from medlora.records import TextRecord
from medlora.tokens.rows import encode
from medlora.training.batches import Collator
from medlora.training.validation import compute_perplexity


def test_perplexity_is_that_of_each_document_alone(bases: dict[str, str]) -> None:
    config = BaseModelConfig(model=bases["llama"])
    tokenizer = load_tokenizer(config)
    model = load_base(config, tokenizer).eval()
    texts = ["열이 난다", "인슐린 은 췌장 에서 나온다 " * 9, "aspirin", "해열 " * 5]
    examples = [example for i, text in enumerate(texts) for example in render(TextRecord(str(i), text))]
    rows, _ = encode(tokenizer, examples, 256, packing=False)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= scores.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    found = compute_perplexity(model, rows, Collator(tokenizer.pad_token_id), 3)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
