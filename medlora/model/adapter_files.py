"""Saved LoRA adapters as PEFT folders: read one, read a chain by layer, write one. No model is needed here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from medlora.artifacts.adapter_checks import ROWS, Targets, check_adapter, find_row_ids
from medlora.artifacts.adapters import read_adapter_json
from medlora.artifacts.headers import CONFIG, WEIGHTS
from medlora.errors import InputError

PREFIX = "base_model.model."
"""How the names of PEFT's tensors begin."""


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to the weight of one layer."""

    a: torch.Tensor
    b: torch.Tensor
    """With the adapter's scaling folded in."""
    magnitude: torch.Tensor | None = None
    """DoRA's length of every output's weights."""


@dataclass(frozen=True)
class ChainTensors:
    """All that a chain of adapters changes of its base, in float32."""

    layers: dict[str, list[LowRank]] = field(default_factory=dict)
    """By layer, oldest adapter first."""
    rows: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    """Vocabulary rows by embeddings and token id; of several adapters the last one's."""


def read_chain_tensors(folders: Sequence[Path]) -> ChainTensors:
    """Read the adapters of a chain; raises InputError for aLoRA, and for tensors beside (Do)LoRA and vocabulary rows."""
    found = ChainTensors()
    for folder in folders:
        targets, config = check_adapter(folder).targets, read_config(folder)
        if config.alora_invocation_tokens:
            raise InputError(
                f"{folder}: aLoRA acts only behind its invocation tokens; it cannot become part of one LoRA adapter or of "
                "the base's weights"
            )
        _collect(folder, config, targets, found)
    return found


def _collect(folder: Path, config: LoraConfig, targets: Targets, found: ChainTensors) -> None:
    tensors = read_tensors(folder)
    for name in sorted(tensors):
        path = name.removeprefix(PREFIX)
        if path.endswith(".lora_A.weight"):
            layer = path.removesuffix(".lora_A.weight")
            a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
            scaling = targets.find_alpha(layer) / (math.sqrt(len(a)) if config.use_rslora else len(a))
            magnitude = tensors.get(f"{PREFIX}{layer}.lora_magnitude_vector")
            length = None if magnitude is None else magnitude.float()
            found.layers.setdefault(layer, []).append(LowRank(a, b * scaling, length))
        elif path.endswith(f".{ROWS}"):
            layer = path.removesuffix(f".{ROWS}")
            found.rows.setdefault(layer, {}).update(zip(row_ids(config, layer), tensors[name].float(), strict=True))
        elif not path.endswith((".lora_B.weight", ".lora_magnitude_vector")):
            raise InputError(
                f"{folder}: holds {name}, neither LoRA nor vocabulary rows; it cannot become part of one LoRA adapter or of "
                "the base's weights"
            )


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
