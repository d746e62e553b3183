"""Questions per second of medlora, of lm-evaluation-harness, and of one-at-a-time generation, on the same questions.

    python benchmarks/evaluation.py --data ../shared/data/kormedmcqa            # CPU, one thread, under 8 minutes
    python benchmarks/evaluation.py --data ../shared/data/kormedmcqa --cuda --seconds 200 --quantization none nf4 int8

One random model, one tokenizer, one prompt (the harness's `kormedmcqa`), one process; `pip install -e '.[eval-parity]'`.
Writes evaluation.json and evaluation.md beside this file; --cuda is evaluation_cuda.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from harness import LETTERS, ask, load_extraction, read_log_likelihoods, write_tasks
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.prompts import render_mcq
from medlora.records import McqRecord
from medlora.tokens.encode import encode_prompts

VOCABULARY, SHOTS, WRITTEN = 8_400 if os.environ.get("DEV") == "cpu" else 262_144, 5, 16
"""Rows of Gemma's embedding, of a tiny model's where a GPU's script runs on CPU; solved examples of the 5-shot rows; tokens
that generating rows write per question."""

CPU_SHAPE = {
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 2048,
    "sliding_window": 512,
}


@dataclass
class Row:
    """One measurement; `same` counts results equal to ours. `timed_s` is what rates rest on: CPU seconds of the one
    thread on CPU, where other processes may share the machine, wall seconds on CUDA."""

    who: str
    mode: str
    shots: int
    questions: int
    seconds: float
    cpu_seconds: float
    timed_s: float
    note: str = ""
    same: str = ""

    @property
    def rate(self) -> float:
        return self.questions / self.timed_s


def build_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """BPE with byte fallback learned on the training questions, filled up to Gemma's number of tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"] | {f"<unused{i}>": i for i in range(len(model["vocab"]), VOCABULARY)}
    tokenizer.model = models.BPE(
        vocabulary, [tuple(merge) for merge in model["merges"]], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def configure(shape: dict[str, int]) -> Gemma3TextConfig:
    """The config of a Gemma 3 of that shape."""
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        head_dim=256,
        query_pre_attn_scalar=256,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **shape,
    )


def build_model(shape: dict[str, int]) -> Any:
    """A random Gemma 3 of that shape, tied."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(configure(shape)).eval().requires_grad_(False)


def choose_evenly(lines: Sequence[str], n: int) -> list[str]:
    """`n` rows whose lengths are spread as those of all rows are, in the order of the file."""
    by_length = sorted(range(len(lines)), key=lambda i: (len(lines[i]), i))
    n = min(n, len(lines))
    return [lines[i] for i in sorted(by_length[(2 * k + 1) * len(lines) // (2 * n)] for k in range(n))]


class Bench:
    """The model with its questions; `measure` runs and times one way of answering them."""

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, few: Sequence[str], many: Sequence[str], shots: Any
    ) -> None:
        self.model, self.tokenizer, self.cuda = model, tokenizer, model.device.type == "cuda"
        self.few, self.many = (self._read(folder, name, rows) for name, rows in (("few", few), ("many", many)))
        self.shots = self._read(folder, "shots", shots)
        has_harness = importlib.util.find_spec("lm_eval") is not None  # a GPU's host may lack it
        self.tasks = write_tasks(folder, few, shots, WRITTEN) if has_harness else None
        self.rows: list[Row] = []

    def _read(self, folder: Path, name: str, lines: Sequence[str]) -> list[McqRecord]:
        (folder / f"{name}-rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return [r for r in read(SourceConfig(source=str(folder / f"{name}-rows.jsonl"))) if isinstance(r, McqRecord)]

    def measure(
        self, who: str, mode: str, shots: int, questions: int, work: Callable[[Any], Any], note: str = ""
    ) -> Any:
        """Time what `work` hands to the clock it is given; a note in place of a rate where memory runs out."""
        print(f"{who}, {mode}, {shots}-shot ...", end=" ", file=sys.stderr, flush=True)
        spent: list[tuple[float, float]] = []

        def clock(timed: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                wall, cpu = time.perf_counter(), time.process_time()
                made = timed(*args, **kwargs)
                if self.cuda:
                    torch.cuda.synchronize()
                spent.append((sign * (time.perf_counter() - wall), sign * (time.process_time() - cpu)))
                return made

            return run

        try:
            result = work(clock)
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            result, questions, note = None, 0, "out of memory"
        wall, cpu = (sum(times) for times in zip(*spent or [(0.0, 0.0)], strict=True))
        row = Row(who, mode, shots, questions, wall, cpu, wall if self.cuda else cpu, note)
        self.rows.append(row)
        print(f"{row.rate:.2f} questions/s" if questions else note, file=sys.stderr)
        return result

    def run(self, shots: int, batch_sizes: Sequence[int | str], max_length: int = 2048) -> None:
        """All rows of one number of shots: likelihood against likelihood, generation against generation."""
        few, shown = len(self.few), self.shots[:shots]

        # A search from 64 down takes a quarter of an hour on one thread, to find that memory bears a few.
        most = 64 if self.cuda else 8

        def harness(task: str, size: int | str) -> Any:
            return lambda clock: ask(self.tasks, self.model, self.tokenizer, task, shots, size, max_length, clock, most)

        def ours(records: Sequence[McqRecord], scoring: Any) -> Any:
            # A new answerer each time: the prefix is computed within what is measured.
            return lambda clock: clock(
                McqAnswerer(
                    self.model,
                    self.tokenizer,
                    AnswerSettings(style="kormedmcqa", scoring=scoring, shots=shown, max_tokens=WRITTEN),
                ).answer
            )(records)

        ours(self.many[:2], "letter")(lambda work, sign=1: work)  # what is compiled or allocated once
        letters = self.measure("medlora", "letter", shots, len(self.many), ours(self.many, "letter"))
        by_id = {record.id: answer.choice for record, answer in zip(self.many, letters, strict=True)}
        for size in batch_sizes:
            samples = self.measure(f"lm-eval, batch {size}", "letter", shots, few, harness("local_letters", size))
            if samples:
                scores = [read_log_likelihoods(sample) for sample in samples]
                self._compare(
                    [LETTERS[s.index(max(s))] for s in scores], [by_id[record.id] for record in self.few], "choices"
                )
        written = self.measure("medlora", "generate", shots, few, ours(self.few, "generate"))
        texts = [answer.text for answer in written]
        for size in batch_sizes:
            samples = self.measure(f"lm-eval, batch {size}", "generate", shots, few, harness("local_generate", size))
            if samples:
                self._compare([sample["resps"][0][0] for sample in samples], texts, "texts")
        alone = self.measure(
            "one at a time", "generate", shots, few, lambda clock: clock(lambda: list(self.write_alone(shown)))()
        )
        self._compare(alone, texts, "texts")
        extract = load_extraction()
        letters = [extract(text) or None for text in texts]
        self._compare(
            letters, [answer.choice for answer in written], "texts; letters read from them: harness's as ours"
        )

    def _compare(self, theirs: Sequence[Any], ours: Sequence[Any], what: str) -> None:
        row = self.rows[-1]
        same = f"{sum(a == b for a, b in zip(theirs, ours, strict=True))} of {len(ours)} {what}"
        row.same = f"{row.same}; {same}" if row.same else same

    def write_alone(self, shots: Sequence[McqRecord]) -> Iterator[str]:
        """As the replaced scripts did: model.generate on one question, the text after it decoded."""
        for record in self.few:
            (ids,) = encode_prompts(self.tokenizer, [render_mcq(record, "kormedmcqa", shots=shots)])
            batch = torch.tensor([ids], device=self.model.device)
            with torch.no_grad():
                made = self.model.generate(
                    input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=WRITTEN, do_sample=False
                )
            text = self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
            for stop in ("Q:", "</s>", "<|im_end|>", ".", "\n\n"):
                text = text.split(stop)[0]
            yield text

    def count_products(self, shots: int) -> tuple[float, int]:
        """Multiply-adds over unique tokens for the letters of `many` (prefix once, head at one position), and tokens."""
        c = self.model.config
        shown = self.shots[:shots]
        rows = encode_prompts(self.tokenizer, [render_mcq(r, "kormedmcqa", shots=shown) for r in self.many])
        shared = len(os.path.commonprefix(rows))
        heads = c.num_attention_heads * c.head_dim
        linear = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)

        def attend(start: int, end: int) -> int:
            windows = [c.sliding_window if t == "sliding_attention" else end for t in c.layer_types]
            return sum(2 * heads * min(i + 1, window) for window in windows for i in range(start, end))

        spans = [(0, shared), *((shared, len(row)) for row in rows)]
        tokens = sum(end - start for start, end in spans)
        products = linear * c.num_hidden_layers * tokens + sum(attend(*span) for span in spans)
        return float(products + len(rows) * c.hidden_size * c.vocab_size), tokens

    def measure_matrix_rate(self, repeats: int = 12) -> float:
        """Multiply-adds per second of the model's own products at 2,048 tokens, the median of `repeats` rounds."""
        c, tokens = self.model.config, 2048
        heads = c.num_attention_heads * c.head_dim
        shapes = [(c.hidden_size, heads), (heads, c.hidden_size), *[(c.hidden_size, c.intermediate_size)] * 2]
        shapes += [(c.intermediate_size, c.hidden_size), *[(c.hidden_size, c.num_key_value_heads * c.head_dim)] * 2]
        dtype = torch.bfloat16 if self.cuda else torch.float32
        pairs = [
            (torch.randn(tokens, i, device=self.model.device, dtype=dtype), torch.randn(o, i, device=self.model.device, dtype=dtype))
            for i, o in shapes
        ]  # fmt: skip
        seconds = []
        now = time.perf_counter if self.cuda else time.process_time
        for _ in range(repeats):
            start = now()
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(now() - start)
        return tokens * sum(i * o for i, o in shapes) / sorted(seconds)[repeats // 2]


def learn_tokenizer(train: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of the rows of train.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.jsonl").write_text("\n".join(train), encoding="utf-8")
        learned = [r for r in read(SourceConfig(source=f"{folder}/train.jsonl")) if isinstance(r, McqRecord)]
    examples = [render_mcq(record, "kormedmcqa") for record in learned]
    return build_tokenizer([example.prompt + example.completion for example in examples])


def describe_hardware() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used"
    )


def render(about: dict[str, Any], rows: Sequence[Row], floors: Sequence[dict[str, Any]]) -> str:
    """The measurements as Markdown."""
    mine = {(row.note, row.mode, row.shots): row for row in rows if row.who == "medlora"}
    lines = ["# Evaluation: questions per second, beside the peers", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [
        "",
        "`letter`: log-likelihood of the five letters, one forward pass (lm-eval: `multiple_choice` on the same prompt).",
        f"`generate`: greedy, at most {WRITTEN} tokens, the harness's stop words (lm-eval: its own task `kormedmcqa` otherwise as it is).",
        "`ours is faster` compares a peer with our row of the same mode, `our letter is faster` with the fastest way to the",
        "same published number, which lm-eval takes by generating. On CPU, rates are per CPU second of the one thread: wall time",
        "on a shared machine counts what others took. Of lm-eval, only its `loglikelihood` and `generate_until` are timed.",
        "",
        "| who | mode | shots | questions | questions/s | wall s per question | ours is faster (same mode) | our letter is faster | same results |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row.who} {row.note}".strip()
        if not row.questions:
            lines.append(f"| {name} | {row.mode} | {row.shots} | | | | | | |")
            continue
        key = row.note if row.who == "medlora" or (row.note, row.mode, row.shots) in mine else ""
        same, letter = mine[key, row.mode, row.shots], mine[key, "letter", row.shots]
        faster = [f"{other.rate / row.rate:.1f}x" if other is not row else "" for other in (same, letter)]
        lines.append(
            f"| {name} | {row.mode} | {row.shots} | {row.questions} | {row.rate:.2f} | "
            f"{row.seconds / row.questions:.2f} | {faster[0]} | {faster[1]} | {row.same} |"
        )
    lines += [
        "",
        "Floor of `letter`: the model's multiply-adds over unique tokens at the machine's measured matrix rate.",
        "",
    ]
    lines += [
        "| shots | unique tokens | 10^9 multiply-adds | 10^9 per second | floor s | measured s | times the floor |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for f in floors:
        lines.append(
            f"| {f['shots']} {f['note']} | {f['tokens']} | {f['products'] / 1e9:.0f} | {f['rate'] / 1e9:.1f} | "
            f"{f['floor_s']:.2f} | {f['measured_s']:.2f} | {f['measured_s'] / f['floor_s']:.2f} |"
        )
    lines += [
        "",
        "All rows are of a CPU. What is measured on a GPU, and what is not: [evaluation-cuda.md](evaluation-cuda.md).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.jsonl, dev.jsonl and test.jsonl of KorMedMCQA"
    )
    parser.add_argument("--limit", type=int, default=32, help="questions that ours answers by letter")
    parser.add_argument("--peer-limit", type=int, default=6, help="questions of all other rows, spread like the first")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, SHOTS])
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "auto"], help="of lm-eval")
    parser.add_argument("--memory-gib", type=float, default=10.0, help="most memory on CPU; what needs more is noted")
    parser.add_argument("--cuda", action="store_true", help="Gemma-3-4B shape on a GPU, see evaluation_cuda.py")
    parser.add_argument("--seconds", type=float, default=200.0, help="of --cuda: the budget of all measurements")
    parser.add_argument(
        "--quantization", nargs="+", choices=("none", "int8", "nf4"), default=["none"], help="of --cuda: bases"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not arguments.cuda:
        limit = int(arguments.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    train, dev, test = (
        (arguments.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "dev", "test")
    )
    many = choose_evenly(test, arguments.limit)
    few, shots = choose_evenly(many, arguments.peer_limit), dev[:SHOTS]
    if arguments.cuda:
        from evaluation_cuda import run

        run(arguments.seconds, arguments.quantization, learn_tokenizer(train), test, shots, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = learn_tokenizer(train)
        floors: list[dict[str, Any]] = []
        started = time.perf_counter()
        bench = Bench(build_model(CPU_SHAPE), tokenizer, Path(folder), few, many, shots)
        for k in arguments.shots:
            rate = bench.measure_matrix_rate()
            first = len(bench.rows)
            bench.run(k, [int(size) if size.isdigit() else size for size in arguments.batch_sizes])
            rate = (rate + bench.measure_matrix_rate()) / 2
            products, tokens = bench.count_products(k)
            floor = {"shots": k, "note": "", "tokens": tokens, "products": products, "rate": rate}
            floors.append(floor | {"floor_s": products / rate, "measured_s": bench.rows[first].timed_s})
        rows = bench.rows
        took = time.perf_counter() - started
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "lm_eval")]
    about = {
        "Date": date.today().isoformat(),
        "Command": " ".join(["python", *sys.argv]),
        "Hardware": f"{describe_hardware()}; load average {os.getloadavg()[0]:.1f} at the end, {took:.0f} s in all",
        "Versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "Model": f"random, Gemma-3-270M shape: {VOCABULARY} tokens, {CPU_SHAPE}, float32",
        "Questions": f"KorMedMCQA test, {len(many)} (peers and generation: {len(few)} of them), lengths spread as in the whole file; "
        f"shots: the first {SHOTS} of dev",
        "Memory": f"at most {arguments.memory_gib:g} GiB for the process",
    }
    name = "evaluation"
    report = render(about, rows, floors)
    (arguments.out / f"{name}.md").write_text(report, encoding="utf-8")
    made = {"about": about, "rows": [asdict(row) for row in rows], "floors": floors}
    (arguments.out / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
