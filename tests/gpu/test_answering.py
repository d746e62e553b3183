"""Answering on a CUDA GPU: `python -m pytest --run-gpu tests/gpu/test_answering.py`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.generation import Kept, Sampling, Stops, generate, get_pad_id
from medlora.answering.stage_model import StageModel
from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.evaluation.predictions import read_predictions
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter
from medlora.model.tokenizer import load_tokenizer
from tests.answering.test_answerer import QUESTIONS, SHOTS
from tests.answering.test_decoder import make_prompts
from tests.support import ROOT
from tests.support.tiny import FAMILIES

pytestmark = pytest.mark.gpu

WRITTEN = 300
"""Tokens: more than the width of two graphs."""


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    base = BaseModelConfig(model=folder, **options)
    tokenizer = load_tokenizer(base)
    model: Any = load_base(base, tokenizer, "cuda")
    for name in ("a", "b"):
        model = add_adapter(model, name, LoraSettings(r=4, alpha=8), [10, 40, 41] if name == "b" else [], len(name))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def plainly() -> Iterator[None]:
    """Growing caches, PEFT's layers, padded batches."""
    with (
        mock.patch("medlora.answering.answerer.using_fast_paths", lambda *arguments: nullcontext()),
        mock.patch("medlora.answering.generation.using_fast_paths", lambda *arguments: nullcontext()),
    ):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_write_the_tokens_of_ordinary_steps_in_float32(bases: dict[str, str], family: str) -> None:
    model, tokenizer = load(bases[family], compute_dtype="float32")
    fast = FastPaths(model)
    prompts = make_prompts(tokenizer, 0, n=40)
    for stage in ([], ["a"], ["a", "b"], []):
        activate(model, stage)
        for stops, sampling in (
            (Stops(), None),
            (Stops(("A", "은"), tokens_after=3), Sampling(0.9, range(len(prompts)))),
        ):
            options: Any = {"stops": stops, "sampling": sampling}
            with plainly():
                expected = generate(model, tokenizer, prompts, WRITTEN, **options)
            assert generate(model, tokenizer, prompts, WRITTEN, kept=Kept(fast=fast), **options) == expected
    assert fast.decoder and fast.decoder.capture
    assert fast.decoder.captured > 3 and fast.decoder.replayed > fast.decoder.ordinary


@pytest.mark.parametrize("options", [{}, {"quantization": "nf4"}])
def test_a_step_is_one_launch_that_nobody_waits_for(bases: dict[str, str], options: dict[str, Any]) -> None:
    model, tokenizer = load(bases["gemma"], **options)
    activate(model, ["a", "b"])
    fast = FastPaths(model)
    decoder = fast.decoder
    assert decoder
    with fast.prepared(), torch.no_grad():
        logits = decoder.prefill(make_prompts(tokenizer, 0), get_pad_id(tokenizer), None, 60, 0.0)
        decoder.token[: len(logits)] = decoder.choose(logits)
        decoder.step()
        assert decoder.captured == 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert decoder.replayed == 20 and decoder.capture


def test_int8_generates_without_graphs_and_says_so_once(
    bases: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(bases["gemma"], quantization="int8")
    fast, prompts = FastPaths(model), make_prompts(tokenizer, 0)
    for _ in range(2):
        assert len(generate(model, tokenizer, prompts, 20, kept=Kept(fast=fast))) == len(prompts)
    assert len([r for r in caplog.records if "without" in r.message]) == 1
    assert fast.decoder is None or fast.decoder.captured == 0


def test_letters_of_flat_batches_are_those_of_padded_ones(bases: dict[str, str]) -> None:
    """In bfloat16, where a GPU has varlen attention; rounding may differ."""
    model, tokenizer = load(bases["gemma"])
    questions = [question for question in QUESTIONS if len(question.options) <= 5]
    fast = FastPaths(model)
    for stage in ([], ["a", "b"]):
        activate(model, stage)
        answerer = McqAnswerer(model, tokenizer, AnswerSettings(style="kormedmcqa", shots=SHOTS), fast)
        found = answerer.answer(questions)
        with plainly():
            plain = McqAnswerer(model, tokenizer, AnswerSettings(style="kormedmcqa", shots=SHOTS)).answer(questions)
        for a, b in zip(found, plain, strict=True):
            assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=0.3)
    assert fast.is_flat or torch.cuda.get_device_capability() < (8, 0)


def test_memory_is_given_back(bases: dict[str, str]) -> None:
    """What validation inside training relies on: a call that is given no fast paths leaves nothing behind."""
    model, tokenizer = load(bases["gemma"])
    prompts = make_prompts(tokenizer, 0, n=40)
    generate(model, tokenizer, prompts, 5)  # libraries allocate what they keep
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    generate(model, tokenizer, prompts, WRITTEN)
    McqAnswerer(model, tokenizer, AnswerSettings(scoring="reason", shots=SHOTS, max_tokens=40)).answer(QUESTIONS)
    gc.collect()
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] == before[0] and after[1] <= before[1] + 2**21


def test_nf4_is_dequantized_where_there_is_room(bases: dict[str, str]) -> None:
    base = BaseModelConfig(model=bases["gemma"], quantization="nf4")
    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "t.jsonl"}]})
    model = StageModel(base, {"base": ()}, config, device="cuda")
    assert model.weights == "nf4 weights, dequantized once to bfloat16"
    assert len(model.answer(["t"] * len(QUESTIONS), QUESTIONS)) == len(QUESTIONS)


def test_two_actors_share_the_gpu(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    """On Ray, each with 0.4 of it; every question is answered once."""
    pytest.importorskip("ray")
    config = {
        "name": "shared",
        "base": {"model": bases["gemma"], "quantization": "nf4"},
        "stages": [{"name": "base"}],
        "evaluation": {
            "tests": [{"name": "t", "source": str(data / "mcq.jsonl")}],
            "scoring": "reason",
            "max_tokens": 40,
            "batch_size": 4,
        },
        "placement": {"workers": 2, "gpus_per_worker": 0.4},
    }
    path, out = tmp_path / "shared.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "medlora", "evaluate", "--config", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read_predictions(out / "predictions.parquet")
    asked = (data / "mcq.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(p.id for p in found) == sorted(json.loads(line)["id"] for line in asked)
    assert not any(p.error for p in found)
    assert "the first answers came after" in "".join(log.read_text() for log in out.glob("*.log"))
