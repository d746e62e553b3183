"""Decoding over lanes writes what decoding over a growing cache writes, and its steps could be CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.cuda import decoder as decoder_module
from medlora.answering.cuda import lane_writer
from medlora.answering.cuda.decoder import round_down_to_power, round_up_to_power
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.generation import Generated, Kept, Sampling, Stops, generate, get_pad_id
from medlora.answering.prefix_cache import compute_prefix
from medlora.answering.token_budget import Batcher
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter
from medlora.model.tokenizer import load_tokenizer
from tests.answering.test_answerer import QUESTIONS, SHOTS
from tests.support.captures import Frozen, Recorder
from tests.support.tiny import FAMILIES

WRITTEN = 11


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes of few columns and rows, so that short texts meet several shapes."""
    monkeypatch.setattr(decoder_module, "COLUMNS", 8)
    monkeypatch.setattr(decoder_module, "LEAST_ROWS", 1)
    monkeypatch.setattr(lane_writer, "LEAST_ROWS", 1)


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    """A base with two adapters that do something; the second one trains rows of the vocabulary, too."""
    base = BaseModelConfig(model=folder, **options)
    tokenizer = load_tokenizer(base)
    model: Any = load_base(base, tokenizer)
    for name in ("a", "b"):
        model = add_adapter(model, name, LoraSettings(r=4, alpha=8), [10, 40, 41] if name == "b" else [], len(name))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval().requires_grad_(False), tokenizer


def make_prompts(tokenizer: Any, shared: int, n: int = 5) -> list[list[int]]:
    dice = random.Random(7)
    words = range(6, len(tokenizer))
    start = [dice.choice(words) for _ in range(shared)]
    return [start + [dice.choice(words) for _ in range(dice.randint(1, 20))] for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_write_what_a_growing_cache_writes(bases: dict[str, str], family: str) -> None:
    """Stages that switch, a prefix within and beyond the window of 8, stop words, sampling."""
    model, tokenizer = load(bases[family])
    fast = FastPaths(model, Frozen())
    assert fast.decoder
    for stage in (["a"], ["a", "b"], []):
        activate(model, stage)
        for shared in (0, 5, 24):
            prompts = make_prompts(tokenizer, shared)
            prefix = compute_prefix(model, prompts[0][:shared]) if shared else None
            for stops, sampling in (
                (Stops(), None),
                (Stops(("A", "t", "은"), tokens_after=3), Sampling(0.9, range(len(prompts)))),
            ):
                options: dict[str, Any] = {"stops": stops, "sampling": sampling}
                expected = generate(model, tokenizer, prompts, WRITTEN, kept=Kept(prefix), **options)
                assert generate(model, tokenizer, prompts, WRITTEN, kept=Kept(prefix, fast=fast), **options) == expected
    assert fast.decoder.capture and fast.decoder.captured > 10 and fast.decoder.replayed > fast.decoder.ordinary


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_every_scoring_answers_over_lanes_as_without(bases: dict[str, str], family: str) -> None:
    model, tokenizer = load(bases[family])
    fast = FastPaths(model, Frozen())
    for scoring, style, more in (
        ("reason", "reasoning", {}),
        ("generate", "kormedmcqa", {"samples": 2, "temperature": 0.8}),
        ("option_text", "answer", {}),
        ("option_text", "kormedmcqa", {"shots": ()}),
    ):
        settings: Any = {"scoring": scoring, "style": style, "shots": SHOTS, "max_tokens": 12, **more}
        plain = McqAnswerer(model, tokenizer, AnswerSettings(**settings)).answer(QUESTIONS)
        found = McqAnswerer(model, tokenizer, AnswerSettings(**settings), fast).answer(QUESTIONS)
        assert [(a.choice, a.text, a.tokens, a.samples) for a in found] == [
            (a.choice, a.text, a.tokens, a.samples) for a in plain
        ]
        for a, b in zip(found, plain, strict=True):
            assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma", {"compute_dtype": "bfloat16"}),  # LoRA in float32 over bfloat16, as PEFT has it on a GPU
        ("medgemma", {"compute_dtype": "bfloat16", "quantization": "nf4"}),
        ("llama", {}),
    ],
)
def test_two_steps_of_a_shape_are_the_same_work_on_the_same_memory(
    bases: dict[str, str], family: str, options: dict[str, Any]
) -> None:
    """What a CUDA graph needs; and no operation asks the device for a value."""
    model, tokenizer = load(bases[family], **options)
    decoder = FastPaths(model).decoder
    assert decoder
    for stage in ([], ["a"], ["a", "b"]):
        activate(model, stage)
        prompts = [[7, 8, 9], [10, 11], [12] * 9]
        with decoder.adapters.find().installed(), torch.no_grad():
            logits = decoder.prefill(prompts, get_pad_id(tokenizer), None, 20, 0.0)
            decoder.token[:3] = decoder.choose(logits)
            records = []
            for _ in range(3):
                with Recorder() as recorder:
                    decoder.step()
                records.append(recorder)
        assert records[1].lines == records[2].lines
        assert records[1].list_asking() == []


def wrap_head(model: Any, ask: Any) -> None:
    """Let the head do something before its work."""
    head = model.get_output_embeddings()
    forward = head.forward

    def asking(x: torch.Tensor) -> torch.Tensor:
        ask(x)
        return forward(x)

    head.forward = asking


def write(model: Any, tokenizer: Any, fast: FastPaths | None, batcher: Batcher | None = None) -> list[Generated]:
    return generate(model, tokenizer, make_prompts(tokenizer, 0), WRITTEN, kept=Kept(None, batcher, fast))


def test_a_step_that_asks_the_device_goes_on_without_graphs_and_says_so_once(
    bases: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """LLM.int8 does so at every layer on CUDA."""
    model, tokenizer = load(bases["llama"])
    expected = write(model, tokenizer, None)
    wrap_head(model, lambda x: bool(x.any()))
    fast = FastPaths(model, Frozen())
    assert fast.decoder
    for _ in range(2):
        assert write(model, tokenizer, fast) == expected
    assert fast.decoder.capture is None and fast.decoder.captured == fast.decoder.replayed == 0
    assert [r.message.split(":")[0] for r in caplog.records] == ["generation goes on without CUDA graphs"]


def test_a_wait_that_does_not_come_again_is_no_reason_to_go_without_graphs(
    bases: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that is compiled at its first use, say: the first and the third watched step wait."""
    model, tokenizer = load(bases["llama"])
    expected = write(model, tokenizer, None)

    class Counting(Frozen):
        watched = 0

        @contextmanager
        def watching(self) -> Iterator[None]:
            self.watched += 1
            with super().watching():
                yield

    capture = Counting()
    wrap_head(model, lambda x: capture.watched in (1, 3) and bool(x.any()))
    fast = FastPaths(model, capture)
    assert write(model, tokenizer, fast) == expected and capture.watched > 3
    assert fast.decoder and fast.decoder.capture and fast.decoder.captured > 1 and not caplog.records


def test_a_first_replay_that_differs_ends_the_graphs(bases: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load(bases["llama"])
    expected = write(model, tokenizer, None)

    class Wrong(Frozen):
        def record(self, decoder: Any) -> Any:
            return lambda: decoder.token.add_(1)

    fast = FastPaths(model, Wrong())
    assert write(model, tokenizer, fast) == expected
    assert "a replay does not give what the model gives" in caplog.text


def test_a_capture_that_fails_ends_the_graphs(bases: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load(bases["llama"])
    expected = write(model, tokenizer, None)

    class Failing(Frozen):
        def record(self, decoder: Any) -> Any:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    assert write(model, tokenizer, FastPaths(model, Failing())) == expected
    assert caplog.messages == [
        "generation goes on without CUDA graphs: CUDA error: operation not permitted when stream is capturing"
    ]


def test_a_weight_that_changes_drops_what_was_prepared_and_captured(bases: dict[str, str]) -> None:
    """Validation inside training: the next one sees the trained weights."""
    model, tokenizer = load(bases["gemma"])
    activate(model, ["a"])
    fast = FastPaths(model, Frozen())
    before = write(model, tokenizer, fast)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    after = write(model, tokenizer, fast)
    assert after == write(model, tokenizer, None) != before
    assert fast.decoder and all(shape[0] in fast.adapters.stages.values() for shape in fast.decoder.graphs)


def test_out_of_memory_frees_the_lanes_and_halves_the_batch(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(bases["llama"])
    expected = write(model, tokenizer, None)
    fast = FastPaths(model, Frozen())
    assert fast.decoder
    prefill, sizes = fast.decoder.prefill, []

    def limited(prompts: Any, *arguments: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            assert fast.decoder
            fast.decoder._reserve(len(prompts), 16)
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert fast.decoder and (fast.decoder.lanes is None or fast.decoder.lanes.places.most_rows <= 2)
        return prefill(prompts, *arguments)

    monkeypatch.setattr(fast.decoder, "prefill", limited)
    assert write(model, tokenizer, fast, batcher=Batcher(10_000, most_rows=8)) == expected
    assert sizes[:3] == [5, 2, 2] and max(sizes[1:]) == 2
    assert len([r for r in caplog.records if "out of memory" in r.message]) == 1


def test_a_model_that_lanes_do_not_suit_generates_as_before_and_says_so(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(bases["gemma"])
    expected = write(model, tokenizer, None)
    monkeypatch.setattr(model.config.get_text_config(), "layer_types", ["linear_attention", "full_attention"])
    assert FastPaths(model).decoder is None
    monkeypatch.undo()
    assert "layers of other kinds (linear_attention)" in caplog.text
    monkeypatch.setattr(decoder_module.Decoder, "compute_logits", lambda self: torch.zeros(2, len(tokenizer)))
    other = FastPaths(model)
    assert other.decoder is None and "the logits differ" in caplog.text
    assert write(model, tokenizer, other) == expected


def test_released_fast_paths_hold_nothing(bases: dict[str, str]) -> None:
    model, tokenizer = load(bases["gemma"])
    forwards = [vars(module).get("forward") for module in model.modules()]
    fast = FastPaths(model, Frozen())
    write(model, tokenizer, fast)
    assert fast.decoder and fast.decoder.lanes and fast.decoder.graphs and fast.adapters.stages
    fast.release()
    assert not (fast.decoder.lanes or fast.decoder.graphs or fast.decoder.stage or fast.adapters.stages)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_powers_of_two() -> None:
    assert [round_up_to_power(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert [round_down_to_power(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 2, 4, 4, 64, 64]
