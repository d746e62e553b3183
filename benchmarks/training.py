"""Steps of our phases beside TRL's SFTTrainer, a hand-written loop, and what the replaced scripts did; one run, interleaved.

    pip install -c constraints.txt -e '.[training-peers]'
    python benchmarks/training.py --data ../shared/data          # Gemma-3-270M shape, CPU, one thread
    python benchmarks/training.py --data ../shared/data --cuda --seconds 150   # Gemma-3-4B shape: training_cuda.py

One random model with one LoRA adapter (r 16, all-linear) is trained by all in turn, on the same rows of token ids:

- medlora: its collator, layers, loss and Trainer as a phase uses them;
- TRL: SFTTrainer on the same ids and labels, its own collator, padded and padding-free, and its chunked loss;
- loop: by hand, one record at a time without padding, logits at supervised positions alone, gradients accumulated;
- scripts: rows padded to the longest, loss on every token, logits everywhere.

The others have PEFT's own layers; freed memory is kept in the process for all of them alike. A step is forward, backward and AdamW
over --rows rows. Prints its tables, of which training.md is made by hand, and writes training.json beside this file; with --phases, into
what earlier runs of the same day left there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
from evaluation import CPU_SHAPE, Bench, build_model, build_tokenizer, describe_hardware
from transformers import TrainingArguments
from transformers.models.gemma3 import modeling_gemma3

from medlora.config.model import LoraSettings
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.kernels import attention
from medlora.kernels.elementwise_cpu import lighten_elementwise
from medlora.kernels.memory import keep_freed_memory
from medlora.model.chain import add_adapter
from medlora.prompts import render
from medlora.records import McqRecord, Record, TextRecord
from medlora.runs.environment import get_versions
from medlora.tokens.rows import IGNORED, Row, encode
from medlora.training.batches import Collator, FlatCollator, flatten
from medlora.training.trainer import _AdapterTrainer

Step = Callable[[list[Row]], float]

MOST_APART = 2.5e-3
"""Of first losses: each of a phase's ways makes a real step before the next one's."""


def make_batches(folder: Path, tokenizer: Any, rows: int, steps: int) -> dict[str, list[list[Row]]]:
    """Batches of every phase: real questions and texts; reasoning, which the questions lack, is one line of real text."""
    draw = random.Random(0)

    def load(name: str, **more: Any) -> list[Record]:
        return read(SourceConfig(source=name, **more))

    questions = [r for r in load(str(folder / "kormedmcqa/train.jsonl")) if isinstance(r, McqRecord)]
    texts = load(str(folder / "covid19_cdc.ko"), kind="text")
    pairs = load(f"{folder / 'covid19_cdc.en'}|{folder / 'covid19_cdc.ko'}")
    draw.shuffle(questions)
    draw.shuffle(pairs)
    lines = [text.text for text in texts if isinstance(text, TextRecord)]
    reasoned = [
        McqRecord(q.id, q.question, q.options, q.answer, rationale={"analysis": draw.choice(lines)}) for q in questions
    ]
    mixed = [record for both in zip(pairs, questions, strict=False) for record in both]
    worked, short = reasoned[-1], questions[-1]

    def encode_all(records: list[Record], style: str = "reasoning", shown: McqRecord | None = None) -> list[Row]:
        examples = [render(record, style, shown)[0] for record in records]
        return encode(tokenizer, examples, 1024 if style == "reasoning_full" else 512, packing=True)[0]

    sizes = {"00 plain text, packed": max(1, rows // 4)}  # rows of 512 tokens, every one of them supervised
    made = {
        "00 plain text, packed": encode_all(texts * 4),
        "01 translation and questions": encode_all(mixed),
        "02 full, short answers": encode_all(questions, "reasoning_full", short),
        "02 full, with reasoning": encode_all(reasoned, "reasoning_full", worked),
        "02 normal, with reasoning": encode_all(reasoned),
    }
    batches = {}
    for name, found in made.items():
        size = sizes.get(name, rows)
        if len(found) < size * steps:
            sys.exit(f"{name}: {len(found)} rows, {size * steps} are needed")
        batches[name] = [found[i : i + size] for i in range(0, size * steps, size)]
    return batches


class Peak:
    """The most memory of this process while inside, in MiB: resident on CPU, allocated on CUDA."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.mib, self.ended = cuda, 0.0, threading.Event()

    def __enter__(self) -> Peak:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            self.ended.set()
            self.thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.ended.wait(0.01):
            self.mib = max(self.mib, process.memory_info().rss / 2**20)


def make_steps(model: Any, tokenizer: Any, folder: Path) -> dict[str, Step]:
    """One optimisation step of each, on the same model and adapter."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def optimise(gradients: Callable[[], float]) -> float:
        loss = gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 64,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }
    padded = Collator(tokenizer.pad_token_id)
    watch: Any = SimpleNamespace(add=lambda loss: None)
    ours = _AdapterTrainer("a", model, watch, args=TrainingArguments(**common), train_dataset=[0])
    rows = [{"input_ids": [2, 5, 6], "labels": [-100, 5, 6]}]

    def make_trl(padding_free: bool) -> Any:
        config = SFTConfig(
            **common,
            padding_free=padding_free,
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    # Who replaces forward passes, and by which: each trains the model as it leaves it, the others' taken off.
    lean = find_forwards(model)
    trl, trl_free = make_trl(False), make_trl(True)
    fused = {module: forward for module, forward in find_forwards(model).items() if module not in lean}

    rotate = modeling_gemma3.apply_rotary_pos_emb

    def optimise_with(forwards: dict[Any, Any], gradients: Callable[[], float]) -> float:
        modeling_gemma3.apply_rotary_pos_emb = rotate if forwards is lean else getattr(rotate, "own", rotate)
        for module in (*lean, *fused):
            vars(module).pop("forward", None)
        for module, forward in forwards.items():
            module.forward = forward
        return optimise(gradients)

    def run_trainer(trainer: Any, batch: dict[str, Any]) -> float:
        count = torch.tensor(int((batch["labels"][:, 1:] != IGNORED).sum()))
        return float(trainer.training_step(model, batch, num_items_in_batch=count))

    def run_loop(rows: list[Row]) -> float:
        count = sum(label != IGNORED for row in rows for label in row.labels[1:])
        total = 0.0
        for row in rows:
            ids = torch.tensor([row.input_ids], device=model.device)
            labels = torch.tensor(row.labels[1:], device=model.device)
            keep = labels != IGNORED
            inner = model.base_model.model
            hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][keep]
            logits = inner.lm_head(hidden).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="sum") / count
            loss.backward()
            total += loss.item()
        return total

    def run_scripts(rows: list[Row]) -> float:
        batch = padded([Row(row.input_ids, list(row.input_ids), list(range(len(row.input_ids)))) for row in rows])
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "labels")}
        longest = batch["input_ids"].shape[1]
        sizes = torch.tensor([len(row.input_ids) for row in rows], device=model.device)
        mask = torch.arange(longest, device=model.device) < sizes[:, None]
        loss = model(**batch, attention_mask=mask.long(), use_cache=False).loss
        loss.backward()
        return loss.item()

    def run_trl(trainer: Any, rows: list[Row]) -> float:
        batch = trainer.data_collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
        return run_trainer(trainer, dict(batch))

    def run_ours(rows: list[Row], share_prefix: bool = True) -> float:
        return run_trainer(ours, FlatCollator(share_prefix)(rows))

    return {
        "medlora": lambda rows: optimise_with(lean, lambda: run_ours(rows)),
        "medlora, prefix not shared": lambda rows: optimise_with(lean, lambda: run_ours(rows, False)),
        "TRL SFTTrainer, padded": lambda rows: optimise_with(fused, lambda: run_trl(trl, rows)),
        "TRL SFTTrainer, padding-free": lambda rows: optimise_with(fused, lambda: run_trl(trl_free, rows)),
        "loop by hand": lambda rows: optimise_with({}, lambda: run_loop(rows)),
        "replaced scripts": lambda rows: optimise_with({}, lambda: run_scripts(rows)),
    }


def find_forwards(model: Any) -> dict[Any, Any]:
    """The modules whose forward pass somebody has replaced, and by what."""
    return {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}


def count_products(model: Any, rows: list[Row]) -> float:
    """Multiply-adds of a step over unique tokens: the frozen base forward and for the gradient of its inputs, LoRA
    forward, for its inputs and its weights, attention likewise, the head at supervised positions."""
    c = model.config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flat, segments = flatten(rows)
    supervised = sum(label != IGNORED for label in flat.labels)
    seen = 0
    for start, stop, shared in segments:
        for kind in c.layer_types:
            window = c.sliding_window if kind == "sliding_attention" else 10**9
            seen += sum(min(shared + i + 1, window) for i in range(stop - start))
    attention = 2 * heads * seen * 3  # forward, and the gradients of both its products
    tokens = len(flat.input_ids)
    return float(
        tokens * (2 * linear * c.num_hidden_layers + 3 * lora)
        + attention
        + 2 * supervised * c.hidden_size * c.vocab_size
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cuda", action="store_true", help="the table of a GPU, within --seconds (training_cuda.py)")
    parser.add_argument(
        "--seconds", type=float, default=150, help="with --cuda: of everything, from the model to the table"
    )
    parser.add_argument("--model", choices=["4b", "27b"], default="4b", help="with --cuda")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none", help="with --cuda")
    parser.add_argument("--profile", action="store_true", help="where the time of one step of each phase goes")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out; all are measured without")
    parser.add_argument("--phases", nargs="*", default=[], help="those whose name begins so; all without")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder of training.json")
    arguments = parser.parse_args()
    if arguments.cuda:
        import training_cuda

        sys.exit(training_cuda.main(arguments.data, arguments.seconds, arguments.model, arguments.quantization))
    torch.set_num_threads(1)
    keep_freed_memory()  # for all of them alike
    questions = (arguments.data / "kormedmcqa/train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer([line for line in questions])
    model = build_model(CPU_SHAPE)
    bench = Bench.__new__(Bench)
    bench.model, bench.cuda = model, False
    rate = bench.measure_matrix_rate()
    attention.install()  # as `load_base` does; without it a flat batch's documents would see one another
    lighten_elementwise(model)
    model = add_adapter(model, "a", LoraSettings(r=16, alpha=32), [], seed=0).train()
    batches = make_batches(arguments.data, tokenizer, arguments.rows, arguments.steps + 1)
    about = {
        "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "hardware": describe_hardware(),
        "matrix rate": f"{rate / 1e9:.1f} billion multiply-adds/s",
        "versions": {**get_versions(), "trl": __import__("importlib.metadata").metadata.version("trl")},
    }
    store = arguments.out / "training.json"
    known = json.loads(store.read_text()) if arguments.phases and store.is_file() else {}
    kept = known if known.get("about", {}).get("date") == about["date"] else {"results": [], "profiles": {}}
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steps(model, tokenizer, Path(folder))
        steps = {who: step for who, step in steps.items() if who not in arguments.without}
        for phase, rows in batches.items():
            if arguments.phases and not phase.startswith(tuple(arguments.phases)):
                continue
            results = measure(phase, rows, steps, model, rate)
            if arguments.profile:
                kept["profiles"][phase] = profile_step(steps["medlora"], rows[-1], model.config.hidden_size)
            kept = {**kept, "about": about, "results": [r for r in kept["results"] if r["phase"] != phase] + results}
            # After every phase: what was measured is kept when the time runs out.
            kept["results"].sort(key=lambda row: row["phase"])
            store.write_text(json.dumps(kept, indent=1) + "\n")
        print(write_table(kept))


def measure(phase: str, rows: list[list[Row]], steps: dict[str, Step], model: Any, rate: float) -> list[dict[str, Any]]:
    """Each batch by all in turn, the first not counted: medians, spread, share of the floor, ratio to ours."""
    if "full" not in phase:
        steps = {name: step for name, step in steps.items() if "not shared" not in name}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0.0)
    losses: dict[str, float] = {}
    for n, batch in enumerate(rows):
        for name, step in steps.items():
            began = time.perf_counter()
            with Peak(False) as peak:
                loss = step(batch)
            if n:
                seconds[name].append(time.perf_counter() - began)
            else:
                losses[name] = loss
            peaks[name] = max(peaks[name], peak.mib)
    if (loop := losses.get("loop by hand")) and abs(losses["medlora"] - loop) > MOST_APART * loop:
        sys.exit(f"{phase}: the first losses are {losses}: medlora computes something else than the loop")
    floors = [count_products(model, batch) / rate for batch in rows[1:]]
    supervised = statistics.mean(sum(x != IGNORED for row in batch for x in row.labels) for batch in rows[1:])
    results: list[dict[str, Any]] = []
    for name in steps:
        median = statistics.median(seconds[name])
        results.append(
            {
                "phase": phase,
                "who": name,
                "seconds": round(median, 3),
                "spread": [round(min(seconds[name]), 3), round(max(seconds[name]), 3)],
                "records_per_s": round(len(rows[0]) / median, 3),
                "supervised_tokens_per_s": round(supervised / median, 1),
                "floor": round(statistics.median(f / s for f, s in zip(floors, seconds[name], strict=True)), 3),
                "peak_mib": round(peaks[name]),
                "first_loss": round(losses[name], 5),
                "ours_is_faster": round(median / statistics.median(seconds["medlora"]), 2),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def profile_step(step: Step, rows: list[Row], hidden_size: int) -> dict[str, float]:
    """Seconds of one step by what they went into, from torch's profiler, by operator and shapes.

    Every product of a layer has the hidden size among its sizes, those of attention have not.
    """
    with torch.profiler.profile(record_shapes=True) as profiler:
        step(rows)
    spent: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        operator, sizes = event.key.removeprefix("aten::"), [n for shape in event.input_shapes for n in shape]
        if 262_144 in sizes:
            kind = "head"
        elif operator in ("mm", "addmm", "addmm_"):
            kind = "LoRA products" if 16 in sizes else "base products" if hidden_size in sizes else "attention"
        elif operator in ("_softmax", "_softmax_backward_data") or "attention" in operator.lower():
            kind = "attention"
        elif "Optimizer" in operator or "_foreach" in operator:
            kind = "optimizer"
        elif operator in ("cat", "copy_", "fill_", "split_with_sizes", "index", "index_select"):
            kind = "copies"
        else:
            kind = "norms, rotations, activations, sums"
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return {kind: round(seconds, 3) for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def write_table(kept: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = ["# Training steps, beside the peers", ""]
    lines += [*(f"- {name}: {value}" for name, value in kept["about"].items()), ""]
    lines += [
        "| phase | who | s a step (least, most) | records/s | supervised tokens/s | share of the floor | peak MiB | first loss | medlora is faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in kept["results"]:
        least, most = row["spread"]
        lines.append(
            f"| {row['phase']} | {row['who']} | {row['seconds']:.2f} ({least:.2f}, {most:.2f}) | {row['records_per_s']:.2f} | "
            f"{row['supervised_tokens_per_s']:.0f} | {row['floor']:.0%} | {row['peak_mib']:,} | {row['first_loss']:.4f} | "
            f"{row['ours_is_faster']:.2f}x |"
        )
    for phase, spent in kept["profiles"].items():
        total = sum(spent.values())
        parts = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in spent.items())
        lines += ["", f"One step of {phase}, {total:.2f} s under the profiler: {parts}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
