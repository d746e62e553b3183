"""Saved LoRA adapters as PEFT folders: find, read, write, and join a chain into one. No model is needed here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from medlora.artifacts.adapter_checks import find_row_ids
from medlora.artifacts.adapters import read_adapter_json
from medlora.artifacts.headers import CONFIG, WEIGHTS
from medlora.errors import InputError


def read_config(folder: Path) -> LoraConfig:
    """The adapter's config as PEFT knows it; raises InputError when it is not valid."""
    values = read_adapter_json(folder)
    try:
        config: LoraConfig = LoraConfig.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: is no valid LoRA config: {error}") from None
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names, without an adapter name; raises InputError when the file is damaged."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from None


def find_non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or an infinite value; one fused pass where all of them are sound."""
    filled = {
        name: tensor.detach() for name, tensor in tensors.items() if tensor.numel() and tensor.is_floating_point()
    }
    # NaN and infinity spread into the norm. A sum of squares may overflow on its own, so what it finds is looked up.
    if not filled or torch.isfinite(torch.nn.utils.get_total_norm(filled.values())):
        return []
    return [name for name, tensor in filled.items() if not torch.isfinite(tensor).all()]


def row_ids(config: LoraConfig, embeddings: str) -> list[int]:
    """The token ids of the vocabulary rows that an adapter trains in the embeddings of that name."""
    return find_row_ids(config.trainable_token_indices, embeddings)


def write_adapter(
    folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor], base_model_name: str | None
) -> None:
    """Write an ordinary PEFT folder; equal adapters give equal bytes.

    Raises FloatingPointError, before anything is written, where a tensor holds a value that is not finite.
    """
    if bad := find_non_finite(tensors):
        raise FloatingPointError(
            f"{len(bad)} of {len(tensors)} trained tensors hold values that are not finite, {bad[0]} among them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors' own save_file leaves a file that nobody else may read, against the umask.
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(data)
    # LoraConfig.save_pretrained writes its sets in hash order, another one in each process.
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values |= {"base_model_name_or_path": base_model_name, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
