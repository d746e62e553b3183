"""Real weights: what the model writes is what plain transformers writes on the ids of lm-evaluation-harness.

Needs the environment variable MEDLORA_REAL_MODEL, a model's folder with safetensors, and the real questions; skips without them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.config.model import BaseModelConfig
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import KORMEDMCQA_STOPS, render_mcq
from medlora.records import McqRecord

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder() -> str:
    """The real model's folder; the test skips where none is named."""
    if not (named := os.environ.get("MEDLORA_REAL_MODEL")):
        pytest.skip("MEDLORA_REAL_MODEL names no folder of a real model")
    return named


def write_plainly(model: Any, tokenizer: Any, prompt: str) -> str:
    """What `generate` of transformers writes on `tokenizer(prompt)`, cut where the harness's task cuts it."""
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    for word in KORMEDMCQA_STOPS:
        text = text.split(word)[0]
    return text


def test_ten_generated_texts_are_those_of_transformers_on_the_harness_s_ids(folder: str, real_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = SourceConfig(source=str(real_data / "kormedmcqa" / "test.jsonl"))
    records = [record for record in read(source) if isinstance(record, McqRecord)][::29][:10]
    base = BaseModelConfig(model=folder)
    tokenizer = load_tokenizer(base)
    answerer = McqAnswerer(
        load_base(base, tokenizer),
        tokenizer,
        AnswerSettings(scoring="generate", style="kormedmcqa", max_tokens=MAX_TOKENS),
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    own = AutoTokenizer.from_pretrained(folder)
    expected = [write_plainly(plain, own, render_mcq(record, "kormedmcqa").prompt) for record in records]
    assert len(expected) == 10
    assert [answer.text for answer in answerer.answer(records)] == expected
