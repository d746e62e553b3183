"""What the base and the last stage of a run write to held-out prompts, and whether a merged export writes the same.

python benchmarks/written.py runs/smollm2-medical data/smollm2 merged

The prompts are held-out lines to translate and held-out questions to reason about. The folder `merged` comes from
`medlora export runs/smollm2-medical:02 merged --as merged --dtype f32`; it is asked with transformers alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medlora.answering.generation import generate
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
from medlora.prompts import Example, render
from medlora.runs.folders import RunFolder
from medlora.tokens.encode import encode_prompts

WRITTEN = 96
"""Most tokens of an answer."""


def choose_prompts(data: Path, n: int) -> list[str]:
    """The prompts of the first `n` held-out pairs, both ways, and of as many held-out questions."""
    pairs = f"{data / 'guidance_dev.en'}|{data / 'guidance_dev.ko'}"
    return [
        example.prompt
        for source in (pairs, str(data / "medmcqa_dev_explained.jsonl"))
        for record in read(SourceConfig(source=source))[:n]
        for example in render(record)
    ]


def write_here(base: BaseModelConfig, chain: Sequence[Link], prompts: Sequence[str], written: int) -> list[list[str]]:
    """What the base and the whole chain write, each of all prompts at once."""
    tokenizer = load_tokenizer(base)
    model: Any = load_chain(load_base(base, tokenizer), [(link.name, link.folder) for link in chain])
    encoded = encode_prompts(tokenizer, [Example(prompt, "") for prompt in prompts])
    texts = []
    for names in ([], [link.name for link in chain]):
        activate(model, names)
        texts.append([made.text for made in generate(model, tokenizer, encoded, written)])
    return texts


def write_plainly(folder: Path, prompts: Sequence[str], written: int) -> list[str]:
    """What a model's folder writes with transformers alone, one prompt at a time in its own chat template."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=written, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return texts


def main() -> int:
    """Print every prompt with both texts, and how many of the merged model's texts are the stage's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("merged", type=Path, nargs="?")
    parser.add_argument("--prompts", type=int, default=4, help="pairs, and questions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        run = RunFolder(arguments.run)
        config = load(run.config)
        *_, (stage, chain) = find_trained(run, config).items()
        prompts = choose_prompts(arguments.data, arguments.prompts)
        before, after = write_here(config.base, chain, prompts, WRITTEN)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"--- prompt\n{prompt}\n--- base\n{old}\n--- {stage}\n{new}\n")
    if arguments.merged:
        texts = write_plainly(arguments.merged, prompts, WRITTEN)
        same = sum(a == b for a, b in zip(texts, after, strict=True))
        print(f"{same} of {len(prompts)} texts of {arguments.merged} are those of stage {stage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
