"""How fast text becomes tokens: ours with Ray Data beside datasets.map(num_proc=2), the same text and tokenizer, in one run.

    python benchmarks/preparation.py --records 100000 --processes 2

The text is made of the words of Korean lines under --text (any UTF-8 file; the miniature's corpus where none is given);
the tokenizer is a byte-level BPE of 16,000 pieces trained on a part of it. Both sides read the same .jsonl, tokenise one
example a record and write Arrow. Ours is timed twice: cold, where Ray's workers have to import what they need, and warm, as
in every later phase of a run; its scan (schema, bad rows, hash) is timed apart, since datasets has no such thing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil


class Peak:
    """The most memory that this process and its children, or Ray's workers, held at one time, each for itself."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.2):
            for process in psutil.process_iter(["pid", "cmdline", "memory_full_info"]):
                line = " ".join(process.info["cmdline"] or [])
                full = process.info["memory_full_info"]
                if full is None or not (process.pid == os.getpid() or "ray::" in line):
                    continue
                kind = "driver" if process.pid == os.getpid() else "worker"
                self.mib[kind] = max(self.mib.get(kind, 0), full.uss / 2**20)


def make_text(path: Path, records: int, words: list[str]) -> None:
    """Documents of 20 to 120 words in random order, a JSON object a line."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(records):
            text = " ".join(draw.choices(words, k=draw.randint(20, 120)))
            file.write(json.dumps({"id": f"d{i}", "text": text}, ensure_ascii=False) + "\n")


def make_base(folder: Path, lines: list[str]) -> Path:
    """A folder with a tokenizer and the smallest model that it fits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_ours(path: Path, base: Path, cache: Path, records: int) -> tuple[float, float]:
    """Seconds of `prepare_on_ray`, cold and warm."""
    from medlora.config.run import RunConfig
    from medlora.curriculum.jobs import make_job
    from medlora.data.sources import scan
    from medlora.on_ray.cluster import connect
    from medlora.on_ray.tokenise import prepare_on_ray

    config = RunConfig.model_validate(
        {
            "name": "b",
            "base": {"model": str(base)},
            "storage": {"cache": str(cache)},
            "phases": [{"name": "00", "chain": "new", "sources": [{"source": str(path)}]}],
        }
    )
    began = time.monotonic()
    assert scan(config.phases[0].sources[0]).records == records
    print(f"scan of the rows (schema, bad rows, hash): {time.monotonic() - began:.1f} s")
    job = make_job(config, config.phases[0], ())
    seconds = []
    with connect() as cluster, Peak() as peak:
        for _ in ("cold", "warm"):
            shutil.rmtree(cache, ignore_errors=True)
            began = time.monotonic()
            prepare_on_ray(job, cluster, lambda event: None)
            seconds.append(time.monotonic() - began)
        began = time.monotonic()
        prepare_on_ray(job, cluster, lambda event: None)
        print(f"second use (hashes checked, nothing tokenised): {time.monotonic() - began:.2f} s")
    print("peak memory (USS): " + ", ".join(f"{kind} {mib:,.0f} MiB" for kind, mib in sorted(peak.mib.items())))
    return seconds[0], seconds[1]


def run_datasets(path: Path, base: Path, cache: Path, processes: int) -> float:
    """Seconds of load_dataset and map with as many processes, the same ids as ours."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        found = tokenizer(batch["text"], add_special_tokens=False).input_ids
        return {"ids": [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in found]}

    began = time.monotonic()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    rows.map(tokenise, batched=True, num_proc=processes, remove_columns=rows.column_names)
    return time.monotonic() - began


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from medlora.miniature import corpus
    from medlora.records import TextRecord

    if arguments.text:
        lines = arguments.text.read_text(encoding="utf-8").splitlines()
    else:
        lines = [record.text for record in corpus.load("text") if isinstance(record, TextRecord)]
    words = [word for line in lines for word in line.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "text.jsonl"
        make_text(path, arguments.records, words)
        base = make_base(folder / "base", lines)
        print(
            f"{arguments.records:,} records, {path.stat().st_size / 2**20:.0f} MiB, {multiprocessing.cpu_count()} cores"
        )
        cold, warm = run_ours(path, base, folder / "ours", arguments.records)
        theirs = run_datasets(path, base, folder / "theirs", arguments.processes)
        for label, seconds in (
            ("medlora, Ray Data, cold", cold),
            ("medlora, Ray Data, warm", warm),
            (f"datasets.map(num_proc={arguments.processes})", theirs),
        ):
            rate = f"{arguments.records / seconds:,.0f} records/s, {theirs / seconds:.2f} x datasets.map"
            print(f"{label}: {seconds:.1f} s, {rate}")


if __name__ == "__main__":
    main()
