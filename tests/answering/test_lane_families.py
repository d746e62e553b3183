"""Every family decodes over lanes as it does otherwise, or is found not to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from medlora.answering.cuda import decoder as decoder_module
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.generation import Kept, generate
from medlora.config.model import BaseModelConfig
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from tests.support.captures import Frozen
from tests.support.families import FAMILIES, build_family

QUICK = ("Gemma 2", "Qwen3 MoE", "Qwen3.5", "gpt-oss")
"""Soft caps, experts that are chosen, layers of another kind, attention sinks."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_writes_the_same_over_lanes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoder_module, "COLUMNS", 16)
    base = BaseModelConfig(model=build_family(FAMILIES[name], tmp_path / "base"))
    tokenizer: Any = load_tokenizer(base)
    model = load_base(base, tokenizer)
    dice = random.Random(0)
    prompts = [[dice.randrange(8, len(tokenizer)) for _ in range(n)] for n in (3, 9, 24, 40)]
    fast = FastPaths(model, Frozen())
    assert generate(model, tokenizer, prompts, 20, kept=Kept(fast=fast)) == generate(model, tokenizer, prompts, 20)
    if fast.decoder is None:
        assert "generates without static lanes" in caplog.text
