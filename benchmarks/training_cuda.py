"""Training steps on a GPU in one process and one time budget: medlora, TRL and a loop by hand on the same rows.

    python benchmarks/training.py --cuda --seconds 150 --data ../shared/data                  # Gemma-3-4B shape, bfloat16
    python benchmarks/training.py --cuda --seconds 300 --data ... --model 27b --quantization nf4
    DEV=cpu python benchmarks/training.py --cuda --seconds 60 --data ...                      # the same script, a tiny shape

A JSON line for each measurement as it is made, the table last. What has no time left, is not installed or runs out of memory
is a line, too. Random weights: honest in speed and memory, they say nothing about accuracy.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from evaluation import VOCABULARY, build_tokenizer, describe_hardware
from training import Peak, count_products, find_forwards, make_batches
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, TrainingArguments
from transformers.models.gemma3 import modeling_gemma3

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import PhaseConfig
from medlora.kernels.memory import clear_memory, keep_freed_memory
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.runs.environment import get_versions
from medlora.tokens.rows import IGNORED, Row
from medlora.training.batches import Collator, FlatCollator, find_flat_obstacle
from medlora.training.memory_fit import fit_batch
from medlora.training.trainer import _AdapterTrainer

SHAPES = {
    "4b": {
        **{"hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 10_240, "sliding_window": 1024, "head_dim": 256, "query_pre_attn_scalar": 256},
    },
    "27b": {
        **{"hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16},
        **{"intermediate_size": 21_504, "sliding_window": 1024, "head_dim": 128, "query_pre_attn_scalar": 168},
    },
    "tiny": {
        **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"intermediate_size": 128, "sliding_window": 512, "head_dim": 16, "query_pre_attn_scalar": 16},
    },
}
STEPS, RESERVE_S = 3, 4
"""Steps of each measurement behind one of warm-up; seconds that are left for the table."""

Step = Callable[[list[Row]], float]


@dataclass
class Clock:
    """The time budget, and the lines that were printed."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def say(self, **line: Any) -> None:
        """Print a JSON line at once."""
        self.lines.append(line)
        print(json.dumps(line, ensure_ascii=False), flush=True)


def build(shape: dict[str, int], tokenizer: Any, device: str, quantization: str) -> Any:
    """A random Gemma 3 of a shape, loaded from a folder as a base is; tied."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=2, **shape
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        with torch.device(device):
            made = Gemma3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del made
        clear_memory()
        return load_base(BaseModelConfig(model=folder, quantization=quantization), tokenizer, device)  # type: ignore[arg-type]


def measure_matrix_rate(model: Any, cuda: bool, repeats: int = 12) -> float:
    """Multiply-adds per second of the model's own products at 2,048 tokens, the median of `repeats` rounds."""
    c, tokens, dtype = model.config, 2048, torch.bfloat16 if cuda else torch.float32
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(c.hidden_size, heads), (heads, c.hidden_size), *[(c.hidden_size, c.intermediate_size)] * 2]
    shapes += [(c.intermediate_size, c.hidden_size), *[(c.hidden_size, keys)] * 2]
    pairs = [
        [torch.randn(*size, device=model.device, dtype=dtype) for size in ((tokens, i), (o, i))] for i, o in shapes
    ]
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return tokens * sum(i * o for i, o in shapes) / statistics.median(seconds)


class Runner:
    """One model with one LoRA adapter, which all train in turn; each as it leaves the model, the others' parts taken off."""

    def __init__(self, model: Any, tokenizer: Any, cuda: bool, clock: Clock, rate: float) -> None:
        self.tokenizer, self.cuda, self.clock, self.rate = tokenizer, cuda, clock, rate
        self.model = add_adapter(model, "a", LoraSettings(r=16, alpha=32, dropout=0.05), [], seed=0).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=cuda)
        self.lean, self.rotate = find_forwards(self.model), modeling_gemma3.apply_rotary_pos_emb
        self.peers_rotate = getattr(self.rotate, "own", self.rotate)
        self.folder = tempfile.mkdtemp()
        self.common = {
            **{"output_dir": self.folder, "per_device_train_batch_size": 64, "max_steps": 1, "use_cpu": not cuda},
            **{"bf16": cuda, "report_to": "none", "disable_tqdm": True, "log_level": "error"},
            **{"gradient_checkpointing": False, "dataloader_pin_memory": False},
        }
        arguments = TrainingArguments(**self.common)
        watch: Any = SimpleNamespace(add=lambda loss: None)
        self.ours = _AdapterTrainer("a", self.model, watch, args=arguments, train_dataset=[0])
        self.is_flat = not cuda or find_flat_obstacle(self.model) is None

    def set_parts(self, forwards: dict[Any, Any], dropout: float) -> None:
        """Put these forward passes into the model, and this dropout into its adapter."""
        for module in self.model.modules():
            vars(module).pop("forward", None)
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        for module, forward in forwards.items():
            module.forward = forward
        modeling_gemma3.apply_rotary_pos_emb = self.rotate if forwards is self.lean else self.peers_rotate

    def take_steps(self, gradients: Step, batches: Sequence[list[Row]]) -> tuple[list[float], float]:
        """Seconds of each step behind the first, and the first loss."""
        seconds, first = list[float](), 0.0
        for n, rows in enumerate(batches):
            self.synchronise()
            began = time.perf_counter()
            loss = gradients(rows)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.synchronise()
            seconds.append(time.perf_counter() - began)
            first = first if n else loss
        return seconds[1:], first

    def synchronise(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, who: str, works: dict[str, list[list[Row]]], make: Callable[[list[list[Row]]], Step], **more: Any) -> None:  # fmt: skip
        """Each workload by one contestant; a line each."""
        for work, batches in works.items():
            if self.clock.left() < RESERVE_S:
                self.clock.say(who=who, work=work, skipped="no time left")
                continue
            try:
                with Peak(self.cuda) as peak:
                    step = make(batches)
                    seconds, first = self.take_steps(step, batches)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
                self.clock.say(who=who, work=work, error=reason)
                self.optimizer.zero_grad(set_to_none=True)
                clear_memory()
                continue
            floors = [count_products(self.model, rows) / self.rate for rows in batches[1:]]
            median = statistics.median(seconds)
            self.clock.say(
                who=who,
                work=work,
                seconds=round(median, 4),
                spread=[round(min(seconds), 4), round(max(seconds), 4)],
                records_per_s=round(len(batches[0]) / median, 2),
                share=round(statistics.median(f / s for f, s in zip(floors, seconds, strict=True)), 4),
                peak_gib=round(peak.mib / 2**10, 2),
                first_loss=round(first, 5),
                **more,
            )

    def run_trainer(self, trainer: Any, batch: dict[str, Any], total: int) -> float:
        """Forward and backward pass of a batch by a Trainer."""
        return float(trainer.training_step(self.model, batch, num_items_in_batch=torch.tensor(total)))

    def make_ours(self, dropout: float, size: int | None = None, flat: bool | None = None) -> Any:
        """medlora's step, with as many rows a pass as its dry run says fit unless `size` says otherwise."""
        is_flat = self.is_flat if flat is None else flat
        collator: Any = FlatCollator() if is_flat else Collator(self.tokenizer.pad_token_id)

        def make(batches: list[list[Row]]) -> Step:
            self.set_parts(self.lean, dropout)
            rows = size or self.fit(batches[0], collator)
            return lambda batch: self.run_passes(
                batch, rows, lambda part, total: self.run_trainer(self.ours, collator(part), total)
            )

        return make

    def fit(self, rows: list[Row], collator: Any) -> int:
        """Rows of a pass as `batch_size: auto` chooses them."""
        plain = {"name": "p", "chain": "new", "sources": [{"source": "miniature:text"}], "global_batch": len(rows)}
        phase = PhaseConfig.model_validate(plain).settle(1)
        if not self.cuda:
            return len(rows)
        longest = sorted(rows, key=lambda row: -len(row.input_ids))
        fitted = fit_batch(
            self.model, longest, phase, collator, lambda text, *_: self.clock.say(note=text.partition(" of ")[0])
        )
        return fitted.batch_size

    def run_passes(self, rows: list[Row], size: int, run: Callable[[list[Row], int], float]) -> float:
        """A step in passes of `size` rows; the loss."""
        total = sum(label != IGNORED for row in rows for label in row.labels[1:])
        return sum(run(rows[i : i + size], total) for i in range(0, len(rows), size))

    def make_trl(self, trainer: Any, size: int, forwards: dict[Any, Any]) -> Any:
        """TRL's step in passes of `size` rows."""

        def run(part: list[Row], total: int) -> float:
            batch = trainer.data_collator([{"input_ids": row.input_ids, "labels": row.labels} for row in part])
            return self.run_trainer(trainer, dict(batch), total)

        def make(batches: list[list[Row]]) -> Step:
            self.set_parts(forwards, 0.0)
            return lambda batch: self.run_passes(batch, size, run)

        return make

    def make_loop(self, batches: list[list[Row]]) -> Step:
        """By hand: a record at a time, no padding, logits where a label is."""
        self.set_parts({}, 0.0)
        inner, device = self.model.base_model.model, self.model.device

        def run(rows: list[Row]) -> float:
            count = sum(label != IGNORED for row in rows for label in row.labels[1:])
            total = 0.0
            for row in rows:
                labels = torch.tensor(row.labels[1:], device=device)
                keep = labels != IGNORED
                with torch.autocast(device.type, torch.bfloat16, enabled=self.cuda):
                    ids = torch.tensor([row.input_ids], device=device)
                    places = torch.tensor([row.position_ids], device=device)  # by which documents are kept apart
                    outputs = inner.model(input_ids=ids, position_ids=places, use_cache=False)
                    hidden = outputs.last_hidden_state[0, :-1][keep]
                    logits = inner.lm_head(hidden).float()
                loss = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum") / count
                loss.backward()
                total += loss.item()
            return total

        return run


def run_trl(runner: Runner, works: dict[str, list[list[Row]]], sizes: Iterable[int]) -> None:
    """TRL's SFTTrainer: padded and padding-free at each size of a pass, then with Liger, which changes the model for good."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        runner.clock.say(who="TRL", error=f"not installed: {error}")
        return
    before = find_forwards(runner.model)
    own = Dataset.from_list([{"input_ids": [2, 5, 6], "labels": [-100, 5, 6]}])

    def make(**options: Any) -> Any:
        config = SFTConfig(
            **runner.common,
            **{"max_length": None, "packing": False, "remove_unused_columns": False, **options},
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return SFTTrainer(model=runner.model, args=config, train_dataset=own, processing_class=runner.tokenizer)

    for name, options in (("padded", {}), ("padding-free", {"padding_free": True}), ("padded, Liger", {"use_liger_kernel": True})):  # fmt: skip
        if runner.clock.left() < RESERVE_S:
            runner.clock.say(who=f"TRL {name}", skipped="no time left")
            continue
        try:
            runner.set_parts({}, 0.0)
            trainer = make(**options)
        except Exception as error:
            runner.clock.say(who=f"TRL {name}", error=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        runner.peers_rotate = modeling_gemma3.apply_rotary_pos_emb  # Liger puts its own there
        added = {m: f for m, f in find_forwards(runner.model).items() if m not in before}
        for size in sizes:
            runner.measure(f"TRL {name}, {size} a pass", works, runner.make_trl(trainer, size, added), pass_rows=size)


def main(data: Path, seconds: float, model: str, quantization: str) -> int:
    """Measure within the budget, print the table."""
    device = os.environ.get("DEV", "cuda")
    cuda, clock = device == "cuda", Clock(seconds)
    if cuda and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is here; DEV=cpu runs the same script with a tiny shape")
    logging.getLogger("medlora").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows, name = (64, model) if cuda else (8, "tiny")
    tokenizer = build_tokenizer((data / "kormedmcqa/train.jsonl").read_text(encoding="utf-8").splitlines())
    loaded = build(SHAPES[name], tokenizer, device, quantization)
    rate = measure_matrix_rate(loaded, cuda)
    about = {
        "shape": name,
        "quantization": quantization,
        "hardware": torch.cuda.get_device_name() if cuda else describe_hardware(),
        "rows": rows,
    }
    clock.say(**about, matrix_rate_tflops=round(2 * rate / 1e12, 2), versions=get_versions())
    runner = Runner(loaded, tokenizer, cuda, clock, rate)
    works = make_batches(data, tokenizer, rows, STEPS + 1)
    clock.say(ready_after_s=round(clock.seconds - clock.left(), 1), flat=runner.is_flat)
    runner.measure("medlora, default", works, runner.make_ours(0.0))
    runner.measure("medlora, shipped config (dropout 0.05)", works, runner.make_ours(0.05))
    sizes = (16, 32, 64) if cuda else (4,)
    run_trl(runner, works, sizes)
    runner.measure("loop by hand", works, runner.make_loop)
    last = {key: batches[:2] for key, batches in works.items() if key.startswith("02 normal")}
    runner.measure("medlora, padded, 2 rows a pass", last, runner.make_ours(0.0, 2, flat=False), pass_rows=2)
    clock.say(total_s=round(clock.seconds - clock.left(), 1))
    print(write_table(clock.lines))
    return 0


def write_table(lines: Sequence[dict[str, Any]]) -> str:
    """The measurements as Markdown, a row each, workload by workload."""
    table = [
        "| work | who | s a step (least, most) | records/s | share of the matrix rate | peak GiB | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = [line for line in lines if "work" in line]
    for work in dict.fromkeys(line["work"] for line in measured):
        for line in (each for each in measured if each["work"] == work):
            if "seconds" not in line:
                why = line.get("error") or line.get("skipped")
                table.append(f"| {work} | {line['who']} | {why} | | | | |")
                continue
            least, most = line["spread"]
            table.append(
                f"| {work} | {line['who']} | {line['seconds']:.3f} ({least:.3f}, {most:.3f}) | {line['records_per_s']:.1f} | "
                f"{line['share']:.0%} | {line['peak_gib']:.1f} | {line['first_loss']:.4f} |"
            )
    return "\n".join(table)
