"""Answering on a GPU: letters, generation and reasoning beside lm-evaluation-harness and `generate` of transformers.

    python benchmarks/evaluation.py --cuda --data ../shared/data/kormedmcqa --seconds 200 --quantization none nf4

Run by evaluation.py. Checks come first, what decides comes before what is nice to know, and what the budget has no room for
is said. Every measurement is a JSON line as soon as it is made; the table is last. `DEV=cpu` runs all of it on a tiny model.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from evaluation import Bench, choose_evenly, configure
from harness import LETTERS, ask, read_log_likelihoods
from transformers import Gemma3ForCausalLM

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.generation import Kept, generate, get_pad_id
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.model.base import dequantize_base, load_base
from medlora.model.chain import activate, add_adapter
from medlora.prompts import render_mcq
from medlora.tokens.encode import encode_prompts

DEVICE = os.environ.get("DEV", "cuda")
GEMMA_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 10_240,
    "sliding_window": 1024,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "sliding_window": 64,
}
STAGES = {"no adapter": [], "one": ["a"], "a stack of two": ["a", "b"]}


class Kit:
    """The measurements of one budget of seconds, each printed as it is made."""

    def __init__(self, seconds: float) -> None:
        self.begun, self.seconds = time.perf_counter(), seconds
        self.rows: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self.seconds - (time.perf_counter() - self.begun)

    def say(self, **row: Any) -> None:
        """Print a row, and remember it for the table."""
        self.rows.append({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
        print(json.dumps(self.rows[-1], ensure_ascii=False), flush=True)

    def measure(self, what: str, least_s: float, work: Callable[[], dict[str, Any]], **about: Any) -> None:
        """Print what `work` measures, or why it was not: no time, or what was raised."""
        if self.left() < least_s:
            self.say(what=what, **about, skipped=f"{self.left():.0f} s are left")
            return
        try:
            self.say(what=what, **about, **work())
        except Exception as error:  # the other measurements go on
            self.say(what=what, **about, error=f"{type(error).__name__}: {str(error)[:200]}")
            clear()


def load_model(tokenizer: Any, quantization: Any) -> tuple[Any, str]:
    """A random base, made on the device and loaded from a folder as every base is, and two adapters that do something."""
    torch.manual_seed(0)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        with torch.device(DEVICE):
            made = Gemma3ForCausalLM(configure(GEMMA_4B if DEVICE == "cuda" else TINY)).to(torch.bfloat16)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del made
        clear()
        model: Any = load_base(BaseModelConfig(model=folder, quantization=quantization), tokenizer, DEVICE)
    weights = dequantize_base(model, "auto") if quantization != "none" else ""
    for n, name in enumerate(("a", "b")):
        model = add_adapter(model, name, LoraSettings(r=16, alpha=32), [], seed=n)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.01)
    return model.eval().requires_grad_(False), weights


def clear() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a piece of work, the device's included, and what it gives."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    made = work()
    wait()
    return time.perf_counter() - begun, made


@contextmanager
def plainly() -> Iterator[None]:
    """Answering as it is without fast paths: growing caches, PEFT's layers, padded batches."""
    with (
        mock.patch("medlora.answering.answerer.using_fast_paths", lambda *arguments: nullcontext()),
        mock.patch("medlora.answering.generation.using_fast_paths", lambda *arguments: nullcontext()),
    ):
        yield


def measure_memory_rate(repeats: int = 5) -> float:
    """Bytes a second that the device reads, from summing 1 GiB (64 MiB on CPU)."""
    numbers = torch.ones(2**29 if DEVICE == "cuda" else 2**25, dtype=torch.bfloat16, device=DEVICE)
    seconds = sorted(clock(numbers.sum)[0] for _ in range(repeats))
    return numbers.numel() * 2 / seconds[repeats // 2]


class Answering:
    """One model with its questions, measured in every way."""

    def __init__(self, kit: Kit, bench: Bench, model: Any, quantization: str) -> None:
        self.kit, self.bench, self.model, self.quantization = kit, bench, model, quantization
        self.matrix_rate, self.memory_rate = bench.measure_matrix_rate(5), measure_memory_rate()
        self.fast = FastPaths(model)
        self.weight_bytes = sum(w.numel() * w.element_size() for n, w in model.named_parameters() if "lora_" not in n)
        kit.say(what="device", matrix_tflops=2 * self.matrix_rate / 1e12, memory_gb_s=self.memory_rate / 1e9)

    def answer(self, records: Any, scoring: Any, shots: int, max_tokens: int = 16) -> Any:
        style: Any = "reasoning" if scoring == "reason" else "kormedmcqa"
        settings = AnswerSettings(style=style, scoring=scoring, shots=self.bench.shots[:shots], max_tokens=max_tokens)
        return McqAnswerer(self.model, self.bench.tokenizer, settings, self.fast).answer(records)

    def letters(self, shots: int) -> dict[str, Any]:
        """The better of two tries, so that what is tried and allocated once is not counted."""
        records = self.bench.many
        tries = [clock(lambda: self.answer(records, "letter", shots)) for _ in range(2)]
        seconds, answers = min(tries, key=lambda each: each[0])
        with plainly():
            plain = self.answer(records, "letter", shots)
        products, tokens = self.bench.count_products(shots)
        same = sum(a.choice == b.choice for a, b in zip(answers, plain, strict=True))
        off = max(
            abs(x - y)
            for a, b in zip(answers, plain, strict=True)
            for x, y in zip(a.log_likelihoods, b.log_likelihoods, strict=True)
        )
        self.by_id = {record.id: answer.choice for record, answer in zip(records, answers, strict=True)}
        return {
            "per_s": len(records) / seconds,
            "seconds": seconds,
            "tokens": tokens,
            "share_of_matrix_rate": products / self.matrix_rate / seconds,
            "flat": self.fast.is_flat,
            "same": f"{same} of {len(records)} choices as in padded batches, at most {off:.3f} off",
        }

    def prompts(self, rows: int) -> list[list[int]]:
        records = (self.bench.many * -(-rows // len(self.bench.many)))[:rows]
        return encode_prompts(self.bench.tokenizer, [render_mcq(record, "kormedmcqa") for record in records])

    def steps(self, rows: int, tokens: int) -> dict[str, Any]:
        """Milliseconds a step from the difference of two lengths, the second time, when graphs are there."""
        prompts, times = self.prompts(rows), {}
        for n in (2, tokens, 2, tokens):
            times[n], made = clock(
                lambda n=n: generate(self.model, self.bench.tokenizer, prompts, n, kept=Kept(fast=self.fast))
            )
        step_s = (times[tokens] - times[2]) / (tokens - 2)
        config = self.model.config.get_text_config()
        of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        read = self.weight_bytes + rows * of_a_token * (max(map(len, prompts)) + tokens / 2)
        decoder = self.fast.decoder
        found = {
            "ms_a_step": 1000 * step_s,
            "tokens_per_s": rows / step_s,
            "share_of_memory_rate": read / self.memory_rate / step_s,
            "graphs": bool(decoder and decoder.captured),
        }
        if rows <= 64:
            with plainly():
                seconds, plain = clock(lambda: generate(self.model, self.bench.tokenizer, prompts, tokens))
            same = sum(a.text == b.text for a, b in zip(made, plain, strict=True))
            found |= {"times_plain": seconds / times[tokens], "same": f"{same} of {rows} texts as in ordinary steps"}
        return found

    def reason(self, rows: int, tokens: int) -> dict[str, Any]:
        """Questions a second of the curriculum's own scoring; the first call records the graphs."""
        records = (self.bench.many * -(-rows // len(self.bench.many)))[:rows]
        if self.kit.left() > 60:
            self.answer(records, "reason", 0, tokens)
        seconds, answers = clock(lambda: self.answer(records, "reason", 0, tokens))
        return {"per_s": rows / seconds, "seconds": seconds, "written": sum(a.tokens for a in answers)}

    def harness(self, task: str, shots: int, size: int) -> dict[str, Any]:
        """lm-evaluation-harness on the same questions; only its own two methods are timed."""
        spent: list[float] = []

        def timed(work: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                seconds, made = clock(lambda: work(*arguments, **options))
                spent.append(sign * seconds)
                return made

            return run

        samples = ask(self.bench.tasks, self.model, self.bench.tokenizer, task, shots, size, 2048, timed, 64)
        found: dict[str, Any] = {"per_s": len(samples) / sum(spent), "seconds": sum(spent)}
        if task == "local_letters" and shots == 0:
            best = [LETTERS[s.index(max(s))] for s in map(read_log_likelihoods, samples)]
            same = sum(a == self.by_id[r.id] for a, r in zip(best, self.bench.few, strict=True))
            found["same"] = f"{same} of {len(best)} choices as ours"
        return found

    @torch.no_grad()
    def transformers_generate(self, rows: int, tokens: int) -> dict[str, Any]:
        """`generate` of transformers on one padded batch."""
        prompts, pad = self.prompts(rows), get_pad_id(self.bench.tokenizer)
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.model.device)
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": pad, "eos_token_id": None}
        times = {}
        for n in (2, 2, tokens):
            times[n], _ = clock(
                lambda n=n: self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **options
                )
            )
        step_s = (times[tokens] - times[2]) / (tokens - 2)
        return {"ms_a_step": 1000 * step_s, "tokens_per_s": rows / step_s}

    def run(self, rows: Sequence[int], written: Sequence[int], sizes: Sequence[int]) -> None:
        """Everything, what decides first."""
        small, least = rows[0], 8.0 if DEVICE == "cuda" else 0.0
        about = {"quantization": self.quantization}
        for stage, names in STAGES.items():
            activate(self.model, names)
            for shots in (0, 5):
                self.kit.measure("letters", least, partial(self.letters, shots), shots=shots, adapters=stage, **about)
            for n in rows:
                self.kit.measure("generate", least, partial(self.steps, n, written[0]), rows=n, adapters=stage, **about)
            if stage == "one":
                for tokens in written[1:]:
                    for n in rows:
                        work = partial(self.reason, n, tokens)
                        self.kit.measure("reason", 2 * least, work, rows=n, tokens=tokens, adapters=stage, **about)
                self.peers(small, written[0], sizes, least, {"adapters": stage, **about})
        self.fast.release()

    def peers(self, rows: int, tokens: int, sizes: Sequence[int], least: float, about: dict[str, Any]) -> None:
        """The same by others."""
        self.kit.measure(
            "generate, transformers", least, lambda: self.transformers_generate(rows, tokens), rows=rows, **about
        )
        if importlib.util.find_spec("lm_eval") is None:
            self.kit.say(what="lm-eval", **about, skipped="lm_eval is not installed")
            return
        for task, shots in (("local_letters", 0), ("local_letters", 5), ("local_generate", 0)):
            for size in sizes:
                work = partial(self.harness, task, shots, size)
                self.kit.measure(f"lm-eval {task}", 1.5 * least, work, shots=shots, batch=size, **about)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as a Markdown table; empty cells were not measured."""
    first = ["what", "quantization", "adapters", "shots", "rows", "tokens", "batch"]
    names = first + sorted({name for row in rows for name in row} - {*first, "same", "error", "skipped"})
    names += ["same", "error", "skipped"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def run(
    seconds: float, quantizations: Sequence[str], tokenizer: Any, test: Sequence[str], shots: Sequence[str], out: Path
) -> None:
    """Measure every quantization within the budget, and write evaluation-cuda.md and .json into `out`."""
    kit, on_gpu = Kit(seconds), DEVICE == "cuda"
    many = choose_evenly(test, 295 if on_gpu else 4)
    few = choose_evenly(many, 64 if on_gpu else 2)
    rows, written, sizes = ((64, 256), (32, 128, 512), (16, 32, 64)) if on_gpu else ((2, 4), (4, 6), (2,))
    for quantization in quantizations:
        if kit.left() < (25 if on_gpu else 0):
            kit.say(what="model", quantization=quantization, skipped=f"{kit.left():.0f} s are left")
            continue
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            model, weights = load_model(tokenizer, quantization)
            kit.say(what="model", quantization=quantization, weights=weights, seconds=time.perf_counter() - begun)
            bench = Bench(model, tokenizer, Path(folder), few, many, shots)
            Answering(kit, bench, model, quantization).run(rows, written, sizes)
            del model, bench
            clear()
    name = torch.cuda.get_device_name() if on_gpu else "CPU, a tiny model: nothing to compare"
    kit.say(what="end", device_name=name, torch=torch.__version__, seconds=time.perf_counter() - kit.begun)
    table = render(kit.rows)
    out.joinpath("evaluation-cuda.json").write_text(json.dumps(kit.rows, indent=1, ensure_ascii=False) + "\n")
    out.joinpath("evaluation-cuda.md").write_text(f"# Answering on a GPU\n\n`{' '.join(sys.argv)}`\n\n{table}\n")
    print(table)
