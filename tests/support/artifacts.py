"""Headers and tensors of adapters, as files hold them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

LAYERS = [f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(2) for leaf in "qv"]


CONFIG: dict[str, Any] = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none"},
    **{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True, "base_model_name_or_path": "org/base"},
    **{"modules_to_save": None, "loftq_config": {}, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}},
    **{"megatron_core": "megatron.core", "trainable_token_indices": None, "auto_mapping": {"unsloth_fixed": True}},
}


Tensors = dict[str, tuple[str, list[int], bytes]]


def tensor(*shape: int, dtype: str = "F32", data: bytes = b"") -> tuple[str, list[int], bytes]:
    width = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
    return dtype, list(shape), data or bytes(width * math.prod(shape))


def make_tensors(rank: int = 4, layers: list[str] = LAYERS) -> Tensors:
    found = {}
    for layer in layers:
        found[f"base_model.model.{layer}.lora_A.weight"] = tensor(rank, 16)
        found[f"base_model.model.{layer}.lora_B.weight"] = tensor(8, rank)
    return found


def write_tensors(path: Path, tensors: Tensors) -> None:
    header, place = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", make_tensors() if tensors is None else tensors)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder
