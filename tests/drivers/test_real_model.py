"""Real weights: a stage's merged model writes in plain transformers what the stage writes here.

Needs the environment variable MEDLORA_REAL_MODEL, a model's folder with safetensors (`make real-model`); skips without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medlora.answering.generation import generate
from medlora.curriculum.chains import Link
from medlora.drivers.export import Export, write_export
from medlora.model.base import load_base
from medlora.model.chain import activate, load_chain
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import Example
from medlora.tokens.encode import encode_prompts
from tests.support.tiny_run import configure, run_all

PROMPTS = ["What is insulin?", "한국어로 번역:\nWash your hands.", "Name two causes of fever."]
WRITTEN = 16


def write_plainly(folder: Path, prompt: str) -> str:
    """What the exported folder writes, asked through its own chat template with transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_merged_model_writes_the_stage_s_text(real_model: str, data: Path, tmp_path: Path) -> None:
    config = configure(real_model, data, p00={"max_steps": 2, "train_extra_tokens": False}, p02={"max_steps": 2})
    base = config.base.model_copy(update={"extra_tokens": ()})
    first, _, last = config.phases
    phases = (first, last.model_copy(update={"validation": None}))
    config = config.model_copy(update={"base": base, "phases": phases})
    run_all(config, tmp_path / "run", ("00", "02"))
    chain = [Link(name=name, folder=str(tmp_path / "run" / "phases" / name / "adapter")) for name in ("00", "02")]
    out = tmp_path / "out"
    out.mkdir()
    write_export(Export(base=base, chain=chain, kind="merged", dtype="float32"), out)

    tokenizer = load_tokenizer(base)
    model: Any = load_chain(load_base(base, tokenizer), [(link.name, link.folder) for link in chain])
    prompts = encode_prompts(tokenizer, [Example(prompt, "") for prompt in PROMPTS])
    written = {}
    for stage, names in (("base", []), ("02", ["00", "02"])):
        activate(model, names)
        with torch.no_grad():
            written[stage] = [made.text for made in generate(model, tokenizer, prompts, WRITTEN)]
    assert written["base"] != written["02"]
    assert [write_plainly(out, prompt) for prompt in PROMPTS] == written["02"]
