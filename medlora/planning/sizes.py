"""How many parameters a base and its adapters have, from headers or a config, and the memory and disk that they take."""

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
from medlora.config.phase import PhaseConfig

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(?P<number>\d+)\.(?P<rest>.+)\.weight$")
_NOT_TEXT = re.compile(r"vision|visual|audio|image|encoder|speech|projector|mtp|experts|embed|norm")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|wpe)\.weight$")
_HEADS = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
_CONFIG_BYTES = 16 * 2**20

HEAD_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Most memory of the head's logits at a time, as `kernels.supervised_head` has it."""


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
    return _read_headers(tensors)


def _read_headers(tensors: Mapping[str, TensorInfo]) -> BaseShape | None:
    linear, numbers = {}, set()
    for name, tensor in tensors.items():
        found = _LAYER.search(name)
        if found and len(tensor.shape) == 2 and tensor.dtype in FLOATS and not _NOT_TEXT.search(name):
            outputs, inputs = tensor.shape
            linear[name.removesuffix(".weight")] = (inputs, outputs)
            numbers.add(found["number"])
    table = next((tensor.shape for name, tensor in tensors.items() if _EMBEDDINGS.search(name)), None)
    if not linear or table is None:
        return None
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    is_tied = not any(_HEADS.search(name) for name in tensors)
    return BaseShape(linear, table[0], table[1], len(numbers), is_tied, parameters, "the headers of its weights")


def _read_config(config: Mapping[str, Any], basis: str) -> BaseShape | None:
    """The shape of a decoder with q, k, v, o and a gated MLP, as most families have it."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
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
    return BaseShape(linear, vocabulary, hidden, layers, is_tied, parameters, basis)


def count_lora(shape: BaseShape, lora: LoraSettings) -> int:
    """Parameters of a LoRA adapter: r x (inputs + outputs) of every layer it sits on, and a magnitude an output with DoRA."""
    return sum(lora.r * (inputs + outputs) + lora.dora * outputs for inputs, outputs in shape.choose(lora.targets))


def count_rows(shape: BaseShape, rows: int) -> int:
    """Parameters of trained vocabulary rows, in both embeddings where they are two."""
    return rows * shape.hidden * (1 if shape.is_tied else 2)


def count_adapter(folder: Path) -> int:
    """Parameters of an adapter that exists, from its header."""
    return sum(math.prod(tensor.shape) for tensor in read_header(folder / WEIGHTS).values())


def estimate_memory(
    shape: BaseShape, phase: PhaseConfig, quantization: str, trainable: int, frozen: int, longest: int, device: str
) -> dict[str, int]:
    """Bytes of one worker by part; activations are a formula for gated decoders, all else is counted.

    Mixed precision on CUDA: the base in 2 bytes, adapters in float32. On CPU everything is float32.
    """
    size = 2 if device == "cuda" else 4
    in_layers = sum(a * b for a, b in shape.linear.values())
    stored = {"none": size, "int8": 1, "nf4": 0.516}[quantization]
    small = phase.optimizer == "paged_adamw_8bit" or (phase.optimizer == "auto" and device == "cuda")
    tokens = phase.batch_size * longest
    inputs = sum(a + b for a, b in shape.linear.values()) / max(1, shape.layers)
    # Of each layer: inputs and outputs of its linear layers, and about four times the hidden size around its norms.
    per_layer = size * tokens * (inputs / 2 + 4 * shape.hidden)
    recomputed = phase.gradient_checkpointing is True
    activations = size * tokens * shape.hidden * shape.layers + per_layer if recomputed else per_layer * shape.layers
    return {
        "base": round(in_layers * stored + (shape.parameters - in_layers) * size),
        "adapters": 4 * (trainable + frozen),
        "gradients": 4 * trainable,
        "optimiser": (2 if small else 8) * trainable,
        "activations": round(activations),
        "head": min(HEAD_CHUNK_BYTES[device], 4 * shape.vocabulary * tokens),
    }
