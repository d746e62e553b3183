"""An adapter touches only itself: from config and header alone, whatever it holds, in no time and in one message."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.artifacts.adapter_checks import check_adapter
from medlora.errors import InputError
from tests.support.artifacts import LAYERS, Tensors, make_tensors, tensor, write

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def refuse(folder: Path, said: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError, match=said) as caught:
        check_adapter(folder)
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": r"model\.layers\..*\.(q_proj|v_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", "gate_proj"], "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {
            "use_rslora": True,
            "init_lora_weights": "gaussian",
            "alpha_pattern": {"q_.*": 3, r"layers\.1\.self_attn\.v_proj": 9},
        },
        {"r": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4}},
        {"r": 8, "rank_pattern": {r".*": 4}},
        {"alora_invocation_tokens": [5, 6]},
        {"ensure_weight_tying": False, "a_key_of_a_later_peft": None},
    ],
)
def test_an_ordinary_adapter_is_let_through(tmp_path: Path, changes: dict[str, Any]) -> None:
    checked = check_adapter(write(tmp_path / "a", **changes))
    assert checked.sizes == dict.fromkeys(LAYERS, (16, 8))
    patterns = changes.get("alpha_pattern")
    assert [checked.targets.find_alpha(layer) for layer in LAYERS] == ([3, 8, 3, 9] if patterns else [8] * 4)


def test_rows_dora_and_whole_embeddings_are_let_through(tmp_path: Path) -> None:
    magnitudes = {f"base_model.model.{layer}.lora_magnitude_vector": tensor(8) for layer in LAYERS}
    check_adapter(write(tmp_path / "dora", {**make_tensors(), **magnitudes}, use_dora=True))
    check_adapter(write(tmp_path / "rows", {**make_tensors(), ROWS: tensor(2, 16)}, trainable_token_indices=[7, 9]))
    rows = {"embed_tokens": [7, 9]}
    check_adapter(write(tmp_path / "by name", {**make_tensors(), ROWS: tensor(2, 16)}, trainable_token_indices=rows))
    whole = {"base_model.model.lm_head.weight": tensor(30, 16, dtype="BF16")}
    check_adapter(write(tmp_path / "whole", {**make_tensors(), **whole}, modules_to_save=["lm_head"]))
    embedded = {
        "base_model.model.model.embed_tokens.lora_embedding_A": tensor(4, 30),
        "base_model.model.model.embed_tokens.lora_embedding_B": tensor(16, 4),
    }
    targets = ["q_proj", "v_proj", "embed_tokens"]
    assert check_adapter(write(tmp_path / "embedded", {**make_tensors(), **embedded}, target_modules=targets)).sizes[
        "model.embed_tokens"
    ] == (30, 16)


@pytest.mark.parametrize(
    "start",
    ["pissa", "pissa_niter_16", "PISSA", "olora", "corda", "loftq", "lora_ga", "eva", "mica", "x", 7, ["pissa"], {}],
)
def test_a_start_that_changes_the_base_is_refused_with_pefts_own_way_out(tmp_path: Path, start: Any) -> None:
    refuse(
        write(tmp_path / "a", init_lora_weights=start),
        "init_lora_weights is .*path_initial_model_for_weight_conversion",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "r must be a whole number from 1 to 65,536"),
        ({"r": 10**400}, "r must be a whole number"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": "8; rm -rf"}, "r must be a whole number"),
        ({"r": float("nan")}, "r must be a whole number"),
        ({"r": 8}, "do not fit the config's rank 8"),
        ({"rank_pattern": {".*": 10**9}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj has A of shape .* do not fit the config's rank 8"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern.q_proj must be a finite number"),
        ({"lora_dropout": 5}, "lora_dropout must be a number"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"use_dora": True}, "lacks lora magnitude"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save replaces \['norm'\]"),
        ({"modules_to_save": ["(a+)+$"]}, "modules_to_save replaces"),
        ({"modules_to_save": ["lm_head"]}, "holds no embeddings, which modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "holds no embeddings, which trainable_token_indices"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be token ids"),
        ({"trainable_token_indices": [5, 5]}, "trainable_token_indices must be token ids"),
        ({"trainable_token_indices": [True]}, "trainable_token_indices must be token ids"),
        ({"trainable_token_indices": {"embed_tokens": [10**12]}}, "trainable_token_indices must be token ids"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices must be token ids"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform must be numbers"),
        ({"layers_to_transform": [1]}, "holds tensors of model.layers.0"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "(a+)+$"}, "layers_pattern must be plain names"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set, which is not supported"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"megatron_config": {"a": 1}}, "megatron_config is set"),
        ({"eva_config": {"rho": 2.0}}, "eva_config is set"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config is set"),
        ({"x" * 100: 1}, "x{60} is set"),
        ({"target_modules": None}, "target_modules must be a list of plain names"),
        ({"target_modules": []}, "target_modules must be a list of plain names"),
        ({"target_modules": ["q_proj|v_proj"]}, "target_modules must be a list of plain names"),
        ({"target_modules": ["q_proj"]}, "v_proj, which target_modules of the config does not name"),
        ({"target_modules": "^(([a-z_0-9])+.?)+Z$"}, "which target_modules of the config does not name"),
        ({"target_modules": r"(.)\1*"}, "groupref is not supported"),
        ({"target_modules": "("}, "target_modules: '\\(' is no regular expression"),
        ({"exclude_modules": ["q_proj"]}, "which target_modules of the config does not name"),
        ({"alpha_pattern": {"(?<=a)b": 1}}, "alpha_pattern: .*looking behind"),
        ({"base_model_name_or_path": "\ud800\x1b[2J"}, "base_model_name_or_path must be a line of text"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a line of text"),
        ({f"k{i}": None for i in range(600)}, "keys; a LoRA config has some dozens"),
        ({"junk": "a" * 5_000_000}, "at most 4,194,304 are read"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refuse(write(tmp_path / "a", **changes), said)


def change(**tensors: Any) -> Tensors:
    return {**make_tensors(), **{name.replace("__", "."): value for name, value in tensors.items()}}


FIRST = f"base_model.model.{LAYERS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no LoRA tensors"),
        (
            change(base_model__model__model__norm__weight=tensor(16)),
            "holds model.norm.weight, which is no part of a LoRA",
        ),
        (
            {**make_tensors(), f"base_model.model.{LAYERS[0]}.base_layer.weight": tensor(8, 16)},
            "base_layer.weight, which is no part of a LoRA adapter but a weight of the base",
        ),
        (change(base_model__model__evil__lora_A__weight=tensor(4, 4)), "holds tensors of evil"),
        ({**make_tensors(), "../../../etc/passwd": tensor(2)}, "holds '../../../etc/passwd', which is no tensor"),
        ({**make_tensors(), "model.norm.weight": tensor(2)}, "is no tensor of a LoRA adapter"),
        ({**make_tensors(), FIRST: tensor(5, 16)}, "do not fit the config's rank 4"),
        ({**make_tensors(), FIRST: tensor(4, 16, 1)}, "do not fit the config's rank 4"),
        ({**make_tensors(), FIRST: tensor(4, 16, dtype="I8")}, "is of type I8"),
        ({**make_tensors(), FIRST: tensor(4, 16, dtype="BOOL")}, "is of type BOOL"),
        ({k: v for k, v in make_tensors().items() if k != FIRST}, "q_proj lacks lora A"),
        ({**make_tensors(), ROWS: tensor(2, 16)}, "trainable_token_indices name 0 rows"),
        ({**make_tensors(), f"base_model.model.{LAYERS[0]}.lora_magnitude_vector": tensor(8)}, "holds lora magnitude"),
        ({**make_tensors(), f"base_model.model.{LAYERS[0]}.lora_B.bias": tensor(8)}, "lora_B.bias, which is no part"),
    ],
)
def test_a_tensor_that_is_not_the_adapters_own_is_refused(tmp_path: Path, tensors: Tensors, said: str) -> None:
    refuse(write(tmp_path / "a", tensors), said)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        *(("F32", struct.pack("<f", x)) for x in (math.nan, math.inf, -math.inf)),
        *(("F16", struct.pack("<e", x)) for x in (math.nan, math.inf)),
        *(("F64", struct.pack("<d", x)) for x in (math.nan, -math.inf)),
        *(("BF16", struct.pack("<f", x)[2:]) for x in (math.nan, math.inf)),
    ],
)
@pytest.mark.parametrize("place", [0, 63])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, dtype: str, number: bytes, place: int) -> None:
    largest = {"F32": b"\xff\xff\x7f\x7f", "F16": b"\xff\x7b", "F64": b"\xff" * 6 + b"\xef\x7f", "BF16": b"\x7f\x7f"}[
        dtype
    ]
    good = tensor(4, 16, dtype=dtype, data=largest * 64)
    check_adapter(write(tmp_path / "a", {**make_tensors(), FIRST: good}))
    data = b"".join(number if i == place else largest for i in range(64))
    folder = write(tmp_path / "a", {**make_tensors(), FIRST: tensor(4, 16, dtype=dtype, data=data)})
    refuse(folder, "lora_A.weight holds NaN or infinity")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def describe(header: Any, path: Path, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "is cut short"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is longer than its header says"),
        (lambda p: p.write_bytes(b""), "is no safetensors file, or it is cut short"),
        (lambda p: describe(b"{}", p, length=2**62), "is no safetensors file, or it is cut short"),
        (lambda p: describe(b"[" * 100_000, p), "nested too deeply"),
        (lambda p: describe([1], p), "its header is no mapping"),
        (lambda p: describe({"a": 1}, p), "entry for 'a' is damaged"),
        (lambda p: describe({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, p, bytes(4)), "is damaged"),
        (lambda p: describe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, p, bytes(4)), "has 4 bytes"),
        (lambda p: describe({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, p), "is cut short"),
        (
            lambda p: describe({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, p, bytes(4)),
            "overlap or leave a gap",
        ),
        (
            lambda p: describe(
                {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(250_000)}, p
            ),
            "names 250,000 tensors",
        ),
        (lambda p: describe(b"[" * 60_000_000, p), "its header has 60,000,000 bytes"),
        (lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "is no regular file"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_file_of_weights_that_is_damaged_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = write(tmp_path / "a")
    spoil(folder / "adapter_model.safetensors")
    refuse(folder, said)


def test_the_check_needs_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", init_lora_weights="pissa")
    code = f"""
import sys, time
from pathlib import Path
from medlora.artifacts.adapter_checks import check_adapter
from medlora.errors import InputError
try:
    check_adapter(Path({str(folder)!r}))
except InputError:
    print(sorted({{"torch", "peft", "transformers", "ray"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
