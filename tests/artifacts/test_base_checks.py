"""A base's folder: what makes it unusable is found from headers, index and JSON alone, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.artifacts.base_checks import check_base, check_layers, read_base_tensors, sample_weights
from medlora.artifacts.bases import check_base_files
from medlora.artifacts.chat_templates import check_template
from medlora.artifacts.headers import TensorInfo
from medlora.config.model import BaseModelConfig
from medlora.config.run import RunConfig
from medlora.curriculum.checks import check_inputs
from medlora.errors import InputError
from tests.support import ROOT
from tests.support.artifacts import tensor, write_tensors

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 2}
TENSORS = {
    "model.embed_tokens.weight": tensor(30, 16, dtype="BF16"),
    **{f"model.layers.{i}.self_attn.q_proj.weight": tensor(8, 16, dtype="BF16") for i in range(2)},
    "model.norm.weight": tensor(16, dtype="BF16"),
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def write_base(folder: Path, sharded: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    names = sorted(TENSORS)
    if not sharded:
        write_tensors(folder / "model.safetensors", TENSORS)
        return folder
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        write_tensors(folder / shard, {name: TENSORS[name] for name in names if places[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_base_is_let_through(tmp_path: Path, sharded: bool) -> None:
    folder = write_base(tmp_path / "base", sharded)
    check_base(folder)
    assert sorted(read_base_tensors(folder) or {}) == sorted(TENSORS)


def edit(name: str, **changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(
        json.dumps({**json.loads((folder / name).read_text() if (folder / name).exists() else "{}"), **changes})
    )


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
BROKEN = [
    (put("config.json", "{"), "config.json: cannot be read"),
    (put("config.json", "[]"), "config.json: must be a mapping"),
    (put("config.json", "[" * 100_000), "config.json: cannot be read: its JSON is nested too deeply"),
    (put("config.json", "{}"), "has neither model_type nor architectures"),
    (remove(SHARD), f"names {SHARD} of 2 files, which the folder does not have"),
    (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 1), "00002-of-00002.safetensors: is cut short"),
    (lambda d: os.truncate(d / SHARD, 40), "00002-of-00002.safetensors: cannot be read: .*it is cut short"),
    (put(SHARD, ""), "00002-of-00002.safetensors: cannot be read"),
    (put(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "it is no safetensors file"),
    (put(INDEX, "{}"), "has no weight_map"),
    (put(INDEX, "["), "index.json: cannot be read"),
    (
        edit(INDEX, weight_map={"x": "../../secret.safetensors"}),
        "names '../../secret.safetensors', which is no safetensors",
    ),
    (edit(INDEX, weight_map={"lm_head.weight": SHARD}), f"names lm_head.weight in {SHARD}, which does not hold it"),
    (remove(INDEX), "has no weights"),
    (
        edit("config.json", hidden_size=32),
        r"q_proj.weight has shape \[8, 16\], and config.json says hidden_size 32|embed",
    ),
    (edit("config.json", num_hidden_layers=3), "have no layer 2, and config.json says num_hidden_layers 3"),
    (remove("tokenizer.json"), "has no tokenizer"),
    (put("tokenizer.json", "[" * 1_000_000), "tokenizer.json: cannot be read: its JSON is nested too deeply"),
    (put("tokenizer.json", "{"), "tokenizer.json: cannot be read"),
    (put("tokenizer.json", '{"model": {"vocab": {}}}'), "tokenizer.json: has no vocabulary"),
    (put("tokenizer_config.json", "nothing"), "tokenizer_config.json: cannot be read"),
    (put("generation_config.json", "["), "generation_config.json: cannot be read"),
    (
        put("chat_template.jinja", "{% for i in range(10 ** 9) %}{% endfor %}"),
        "chat_template.jinja: failed .Range too big",
    ),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN)
def test_a_broken_base_is_named_at_once(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = write_base(tmp_path / "base", sharded=True)
    spoil(folder)
    started = time.process_time()
    with pytest.raises(InputError, match=f"^base.model: .*({said})") as caught:
        check_base_files(BaseModelConfig(model=str(folder)))
    assert time.process_time() - started < 2 and len(str(caught.value)) < 600


def test_a_pickle_is_named_where_weights_are_looked_for(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle"):
        check_base(folder)


def test_what_a_hubs_cache_lacks_is_left_to_the_hub(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    check_base(folder, complete=False)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: cannot be read"):
        check_base(folder, complete=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}", ""),
        ("{{ raise_exception('roles must alternate') }}", ""),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end in"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "out of memory",
        ),
        ("{{ 'a' * 10 ** 10 }}", "out of memory"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_that_never_ends_is_refused(template: str, said: str) -> None:
    if not said:
        check_template("here", template)
        return
    with pytest.raises(InputError, match=f"^here: .*{said}"):
        check_template("here", template)


def test_the_driver_says_it_without_torch(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", sharded=True)
    os.truncate(folder / SHARD, 100)
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n')
    config = {
        "name": "x",
        "base": {"model": str(folder)},
        "phases": [{"name": "00", "chain": "new", "sources": [{"source": str(tmp_path / "rows.jsonl")}]}],
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    with pytest.raises(InputError, match="^base.model: "):
        check_inputs(RunConfig.model_validate(config))
    code = f"""
import sys
from functools import partial
from medlora.cli.train import main
from medlora.endings import run_job
code = run_job(partial(main, ["--config", {str(tmp_path / "c.yaml")!r}, "--run-dir", {str(tmp_path / "run")!r}]))
print(code, sorted({{"torch", "peft", "transformers", "ray"}} & set(sys.modules)))
"""
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n" and done.stderr.count("\n") == 1 and SHARD in done.stderr
    assert not (tmp_path / "run").exists()


BASE = {
    **{f"language_model.model.layers.{i}.self_attn.q_proj.weight": TensorInfo("BF16", (8, 16), 0) for i in range(2)},
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": TensorInfo("BF16", (6, 6), 0),
    "transformer.h.0.attn.c_attn.weight": TensorInfo("F32", (16, 48), 0),
    "model.layers.0.mlp.up_proj.weight": TensorInfo("U8", (64, 1), 0),
}


@pytest.mark.parametrize(
    ("module", "sizes", "said"),
    [
        ("model.language_model.layers.1.self_attn.q_proj", (16, 8), ""),
        ("vision_tower.encoder.layers.0.self_attn.q_proj", (6, 6), ""),
        ("transformer.h.0.attn.c_attn", (16, 48), ""),
        ("model.layers.0.mlp.up_proj", (16, 32), ""),
        ("model.layers.1.self_attn.q_proj", (16, 9), "it has 16 inputs and 9 outputs there"),
        ("model.layers.7.self_attn.q_proj", (16, 8), "layers.7.self_attn.q_proj, which the base does not have"),
        ("model.layers.0.self_attn.w_nowhere", (16, 8), "w_nowhere, which the base does not have"),
    ],
)
def test_an_adapters_layers_are_compared_with_the_bases(module: str, sizes: tuple[int, int], said: str) -> None:
    if not said:
        check_layers(Path("a"), {module: sizes}, BASE)
        return
    with pytest.raises(InputError, match=f"this adapter does not fit the base: .*{said}"):
        check_layers(Path("a"), {module: sizes}, BASE)


def test_weights_of_one_shape_are_told_apart(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    first = sample_weights(folder)
    assert first == sample_weights(write_base(tmp_path / "same"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert first != sample_weights(folder) is not None
    assert sample_weights(tmp_path) is None
