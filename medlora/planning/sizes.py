"""The sizes of a base and how many parameters it and its adapters have, from headers or a config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.artifacts.base_checks import read_base_tensors
from medlora.artifacts.headers import FLOATS, WEIGHTS, TensorInfo, read_header, read_mapping
from medlora.config.model import LoraSettings

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(?P<number>\d+)\.(?P<rest>.+)\.weight$")
_NOT_TEXT = re.compile(r"vision|visual|audio|image|encoder|speech|projector|mtp|experts|embed|norm")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|wpe)\.weight$")
_HEADS = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base that a plan needs."""

    linear: Mapping[str, tuple[int, int]]
    """Inputs and outputs of every linear layer in the decoder's layers, by name."""
    vocabulary: int
    hidden: int
    layers: int
    is_tied: bool
    """Whether input and output embeddings are one matrix."""
    parameters: int
    basis: str
    heads: int = 0
    """Of the queries; 0 where the config does not say it."""
    norms: int = 2
    """Of a layer, over the hidden size; Gemma 2 and 3 have four."""
    head_norms: bool = False
    """Whether queries and keys are normalised, too, as in Gemma 3 and Qwen3."""
    rotations: int = 1
    """Kinds of rotary positions; Gemma 3 has one for layers with a window and one for the others."""

    def choose(self, targets: str | Sequence[str]) -> list[tuple[int, int]]:
        """The sizes of the layers that an adapter with these targets sits on."""
        if targets == "all-linear":
            return list(self.linear.values())
        if targets == "attention":
            wanted = {name for name in self.linear if re.search("attn|attention", name.rpartition(".")[0])}
        else:
            wanted = {name for name in self.linear if name.rpartition(".")[2] in targets}
        return [size for name, size in self.linear.items() if name in wanted]


def read_shape(folder: Path | None, miniature: Mapping[str, Any], vocabulary: int) -> BaseShape | None:
    """The shape of a base in a folder, from the headers of its weights, else from its config; None where neither says it.

    `miniature` and `vocabulary` are the built-in base's, for a folder that is not built yet.
    """
    if folder is None:
        return _read_config({**miniature, "vocab_size": vocabulary}, "the miniature's settings")
    tensors = read_base_tensors(folder)
    config = read_mapping(folder / "config.json", _CONFIG_BYTES)
    if tensors is None or "quantization_config" in config:
        return _read_config(config, "config.json")
    return _read_headers(tensors, _text_config(config))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def _read_headers(tensors: Mapping[str, TensorInfo], text: Mapping[str, Any]) -> BaseShape | None:
    linear, numbers, norms = {}, set(), set[str]()
    for name, tensor in tensors.items():
        found = _LAYER.search(name)
        if found and len(tensor.shape) == 2 and tensor.dtype in FLOATS and not _NOT_TEXT.search(name):
            outputs, inputs = tensor.shape
            linear[name.removesuffix(".weight")] = (inputs, outputs)
            numbers.add(found["number"])
        elif found and len(tensor.shape) == 1 and not re.search("vision|visual|audio|encoder", name):
            norms.add(found["rest"])
    table = next((tensor.shape for name, tensor in tensors.items() if _EMBEDDINGS.search(name)), None)
    if not linear or table is None:
        return None
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    is_tied = not any(_HEADS.search(name) for name in tensors)
    heads = text.get("num_attention_heads")
    return BaseShape(
        linear=linear,
        vocabulary=table[0],
        hidden=table[1],
        layers=len(numbers),
        is_tied=is_tied,
        parameters=parameters,
        basis="the headers of its weights",
        heads=heads if type(heads) is int else 0,
        norms=sum("norm" in name and "attn." not in name for name in norms) or 2,
        head_norms=any(name.endswith(("q_norm", "k_norm")) for name in norms),
        rotations=_count_rotations(text),
    )


def _read_config(config: Mapping[str, Any], basis: str) -> BaseShape | None:
    """The shape of a decoder with q, k, v, o and a gated MLP, as most families have it."""
    text = _text_config(config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not all(type(text.get(name)) is int for name in names) or any("expert" in name for name in text):
        return None
    hidden, inner, layers, heads, vocabulary = (text[name] for name in names)
    size = text.get("head_dim") or hidden // heads
    queries, keys = heads * size, (text.get("num_key_value_heads") or heads) * size
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
    }
    sizes |= {"self_attn.o_proj": (queries, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    sizes |= {"mlp.down_proj": (inner, hidden)}
    linear = {f"layers.{i}.{name}": pair for i in range(layers) for name, pair in sizes.items()}
    is_tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    parameters = sum(a * b for a, b in linear.values()) + vocabulary * hidden * (1 if is_tied else 2)
    kind = str(text.get("model_type", ""))
    return BaseShape(
        linear=linear,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        is_tied=is_tied,
        parameters=parameters,
        basis=basis,
        heads=heads,
        norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        head_norms=kind.startswith(("gemma3", "qwen3")),
        rotations=_count_rotations(text),
    )


def _count_rotations(text: Mapping[str, Any]) -> int:
    return 2 if str(text.get("model_type", "")).startswith("gemma3") else 1


def count_lora(shape: BaseShape, lora: LoraSettings) -> int:
    """Parameters of a LoRA adapter: r x (inputs + outputs) of every layer it sits on, and a magnitude an output with DoRA."""
    return sum(lora.r * (inputs + outputs) + lora.dora * outputs for inputs, outputs in shape.choose(lora.targets))


def count_rows(shape: BaseShape, rows: int) -> int:
    """Parameters of trained vocabulary rows, in both embeddings where they are two."""
    return rows * shape.hidden * (1 if shape.is_tied else 2)


def count_adapter(folder: Path) -> int:
    """Parameters of an adapter that exists, from its header."""
    return sum(math.prod(tensor.shape) for tensor in read_header(folder / WEIGHTS).values())
