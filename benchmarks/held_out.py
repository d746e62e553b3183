"""Perplexity of held-out lines under every stage of a run, and how much it fell since the base.

python benchmarks/held_out.py runs/smollm2-medical data/smollm2/guidance_dev.ko data/smollm2/guidance_dev.en

Perplexity is per token, exp of the mean negative log-likelihood. Intervals are 95 %, by bootstrap over the lines; the ratio to
the base is of the same lines. Prints a table; `--quantization int8` loads the run's base otherwise than it was trained on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import torch

from medlora.config.loading.files import load
from medlora.config.model import BaseModelConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.chains import Link
from medlora.data.sources import read
from medlora.errors import InputError
from medlora.evaluation.stages import find_trained
from medlora.model.base import load_base
from medlora.model.chain import activate, load_chain
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import render
from medlora.records import TextRecord
from medlora.runs.folders import RunFolder
from medlora.tokens.rows import Row, encode
from medlora.tokens.tokenizer import Tokenizer
from medlora.training.batches import Collator
from medlora.training.validation import compute_perplexity

LONGEST, RESAMPLES = 2048, 10_000
"""Most tokens of a line; resamples of the bootstrap."""


def read_rows(file: str, tokenizer: Tokenizer, limit: int | None) -> list[Row]:
    """The lines of a file, each a row of its own."""
    records = [
        each for each in read(SourceConfig(source=file, kind="text", limit=limit)) if isinstance(each, TextRecord)
    ]
    rows, _ = encode(tokenizer, [example for record in records for example in render(record)], LONGEST, packing=False)
    return rows


def score(
    base: BaseModelConfig,
    stages: Mapping[str, Sequence[Link]],
    files: Mapping[str, Sequence[Row]],
    tokenizer: Tokenizer,
) -> dict[tuple[str, str], numpy.ndarray]:
    """For each file and stage the negative log-likelihood of every line, summed over its tokens."""
    links = {link.name: link.folder for chain in stages.values() for link in chain}
    model = load_chain(load_base(base, tokenizer, "cuda" if torch.cuda.is_available() else "cpu"), list(links.items()))
    collator = Collator(tokenizer.eos_token_id)
    scored = {}
    for stage, chain in stages.items():
        activate(model, [link.name for link in chain])
        for file, rows in files.items():
            means = [numpy.log(compute_perplexity(model, [row], collator, 1)) for row in rows]
            scored[file, stage] = numpy.array(means) * count_scored(rows)
            print(f"{stage} {file}", file=sys.stderr)
    return scored


def choose_stages(found: dict[str, tuple[Link, ...]], named: str | None) -> dict[str, tuple[Link, ...]]:
    """The base and the named stages; raises InputError for one that is not there."""
    if named is None:
        return found
    if missing := [name for name in named.split(",") if name not in found]:
        raise InputError(f"--stages: there is no stage {missing[0]}; stages: {', '.join(found)}")
    return {name: chain for name, chain in found.items() if name in ("base", *named.split(","))}


def count_scored(rows: Sequence[Row]) -> numpy.ndarray:
    """How many tokens of each line have a likelihood: all but the first."""
    return numpy.array([len(row.input_ids) - 1 for row in rows])


def bound(
    sums: numpy.ndarray, before: numpy.ndarray, counts: numpy.ndarray
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The 95 % intervals of the perplexity, and of its ratio to the one before on the same lines."""
    drawn = numpy.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    tokens = counts[drawn].sum(1)
    perplexity = numpy.exp(sums[drawn].sum(1) / tokens)
    ratio = numpy.exp((sums - before)[drawn].sum(1) / tokens)
    low_high = [tuple(float(x) for x in numpy.percentile(values, (2.5, 97.5))) for values in (perplexity, ratio)]
    return low_high[0], low_high[1]  # type: ignore[return-value]


def main() -> int:
    """Print the table of every file and stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--quantization", choices=("none", "int8", "nf4"))
    parser.add_argument("--limit", type=int, help="the first so many lines of each file")
    parser.add_argument("--stages", help="these alone, and the base: 01,02; unset = all")
    arguments = parser.parse_args()
    try:
        run = RunFolder(arguments.run)
        config = load(run.config)
        base = config.base
        if arguments.quantization:
            base = base.model_copy(update={"quantization": arguments.quantization})
        tokenizer = load_tokenizer(base)
        files = {file: read_rows(file, tokenizer, arguments.limit) for file in arguments.files}
        stages = choose_stages(find_trained(run, config), arguments.stages)
        scored = score(base, stages, files, tokenizer)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print("| lines | n | tokens | stage | perplexity | 95 % interval | times the base's | 95 % interval |")
    print("|---|---|---|---|---|---|---|---|")
    for file, rows in files.items():
        counts, before = count_scored(rows), scored[file, "base"]
        for stage in stages:
            sums = scored[file, stage]
            (low, high), (least, most) = bound(sums, before, counts)
            ratio = numpy.exp((sums - before).sum() / counts.sum())
            change = f"{ratio:.3f} | {least:.3f} to {most:.3f}" if stage != "base" else "1 | "
            print(
                f"| {Path(file).name} | {len(rows)} | {counts.sum():,} | {stage} | "
                f"{numpy.exp(sums.sum() / counts.sum()):.2f} | {low:.2f} to {high:.2f} | {change} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
