"""A stage as a whole model: its chain merged into the base's weights, one file of them in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from medlora.artifacts.headers import FLOATS
from medlora.errors import InputError
from medlora.model.adapter_files import ChainTensors, LowRank
from medlora.model.base_weights import BaseWeights, StoredTensor, requantize
from medlora.model.tokenizer import stop_token_ids
from medlora.runs.files import write_json
from medlora.tokens.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file of weights."""

_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
_WIDTHS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a stage's vocabulary."""

    size: int
    """Rows of its embeddings; those of the base where nothing was added beyond them."""
    pieces: Mapping[int, Sequence[int]]
    """For each added token the tokens whose mean its row starts as."""


def find_vocabulary(weights: BaseWeights, tokenizer: Tokenizer, original: Tokenizer) -> Vocabulary:
    """What the words of `tokenizer` that `original` lacks need of rows, as `load_base` gives them."""
    old = original.get_vocab()
    new = {token: i for token, i in tokenizer.get_vocab().items() if token not in old}
    pieces = {i: original.encode(token.replace("▁", " "), add_special_tokens=False) for token, i in new.items()}
    return Vocabulary(max([weights.rows, *(i + 1 for i in new.values())]), pieces)


def find_dtype(name: str | None) -> torch.dtype | None:
    """The type that torch has under a name."""
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def start_rows(weights: BaseWeights, vocabulary: Vocabulary) -> dict[str, dict[int, torch.Tensor]]:
    """The rows that added tokens start as, by embeddings and id, in float32."""
    rows = {}
    for parameter in dict.fromkeys((weights.entrance, weights.head)):
        stored = weights.find(parameter)
        rows[parameter.removesuffix(".weight")] = {
            i: stored.read_rows(pieces).float().mean(0) for i, pieces in vocabulary.pieces.items()
        }
    return rows


def check_merge(weights: BaseWeights, chain: ChainTensors) -> None:
    """Raise InputError for a chain that cannot be merged exactly into the files of this base."""
    for layer, parts in chain.layers.items():
        parameter = f"{layer}.weight"
        if (
            parameter in (weights.entrance, weights.head)
            and weights.entrance == weights.head
            or parameter in weights.tied
        ):
            raise InputError(
                f"{layer}: an adapter sits on embeddings that the base ties to its head; merged, it would change both; "
                "export with --as adapter"
            )
        if parameter not in weights.linear:
            raise InputError(f"{layer}: the base in {weights.folder} has no such linear layer; it is another base")
        stored = weights.find(parameter)
        sizes = stored.info.shape if parameter in weights.turned else stored.info.shape[::-1]
        if wrong := next((p for p in parts if (p.a.shape[1], p.b.shape[0]) != tuple(sizes)), None):
            raise InputError(
                f"{layer}: an adapter has {wrong.a.shape[1]} inputs and {wrong.b.shape[0]} outputs, the base in "
                f"{weights.folder} {sizes[0]} and {sizes[1]}; it is another base"
            )
        if stored.info.dtype not in FLOATS:
            raise InputError(f"{stored.file}: {stored.key} is {stored.info.dtype}; merging needs unquantized weights")
    for layer in chain.rows:
        if f"{layer}.weight" not in (weights.entrance, weights.head):
            raise InputError(
                f"{layer}: the base in {weights.folder} has no embeddings of that name; it is another base"
            )


def add_low_rank(weight: torch.Tensor, parts: Sequence[LowRank]) -> torch.Tensor:
    """The weight [outputs, inputs] with what the adapters add to it.

    DoRA measures the plain weight and rescales what the adapters below it have made of it, as PEFT's forward pass does.
    """
    merged = weight.clone()
    for part in parts:
        change = part.b @ part.a
        if part.magnitude is not None:
            scale = (part.magnitude / torch.linalg.norm(weight + change, dim=1)).unsqueeze(1)
            change = (scale - 1) * merged + scale * change
        merged += change
    return merged


@dataclass(frozen=True)
class Merge:
    """How every tensor of a base becomes that of a stage."""

    weights: BaseWeights
    chain: ChainTensors
    vocabulary: Vocabulary
    dtype: torch.dtype | None = None
    """Of all weights; unset = each keeps its own."""
    quantization: str = "none"
    """Merge into the weights that a base quantized in this way computes with."""

    def write(self, out: Path) -> None:
        """Write the weights, a file at a time, and their index where there are several."""
        kept = [tensor for tensor in self.weights.tensors if tensor.parameter not in self.weights.tied]
        shards = list(_divide(kept, self._measure))
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({each.key: self.merge(each) for each in shard}, out / name, metadata={"format": "pt"})
            # safetensors writes a file that nobody else may read, whatever the umask says.
            shutil.copymode(out / "config.json", out / name)
            index |= dict.fromkeys((each.key for each in shard), name)
        if len(shards) > 1:
            total = sum(self._measure(each) for each in kept)
            write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})

    def merge(self, stored: StoredTensor) -> torch.Tensor:
        """One tensor of the stage, in the type it is written in."""
        tensor, layer = stored.read(), stored.parameter.removesuffix(".weight")
        if stored.info.dtype not in FLOATS:
            return tensor
        dtype = self.dtype or tensor.dtype
        if stored.is_converted:
            return tensor.to(dtype)
        if stored.parameter in (self.weights.entrance, self.weights.head):
            tensor = self._extend(tensor, layer)
        elif stored.parameter == self.weights.head.replace(".weight", ".bias"):
            tensor = torch.nn.functional.pad(tensor, (0, self.vocabulary.size - len(tensor)))
        if stored.parameter in self.weights.linear:
            tensor = self._merge_linear(tensor, stored.parameter)
        if not torch.isfinite(tensor := tensor.to(dtype)).all():
            raise InputError(f"{stored.key}: does not fit into {_WIDTHS.get(dtype, dtype)}; choose another --dtype")
        return tensor.contiguous()

    def _merge_linear(self, tensor: torch.Tensor, parameter: str) -> torch.Tensor:
        """The weight of a linear layer, as training saw it, with what the adapters add."""
        is_turned, parts = parameter in self.weights.turned, self.chain.layers.get(parameter.removesuffix(".weight"))
        weight = tensor.T if is_turned else tensor
        if self.quantization != "none" and parameter in self.weights.quantizable:
            weight = requantize(weight.contiguous(), self.quantization)
        if parts:
            weight = add_low_rank(weight.float(), parts)
        return weight.T if is_turned else weight

    def _extend(self, tensor: torch.Tensor, layer: str) -> torch.Tensor:
        """Embeddings with the rows of added tokens: first the mean of their pieces, then what adapters trained."""
        if more := self.vocabulary.size - len(tensor):
            tensor = torch.cat([tensor, tensor.new_zeros(more, tensor.shape[1])])
        trained = self.chain.rows.get(layer, {})
        if not trained and not self.vocabulary.pieces:
            return tensor
        # The rows that an adapter trained may be finer than the base's type.
        extended = tensor.to(self.dtype or tensor.dtype, copy=True)
        for i, pieces in self.vocabulary.pieces.items():
            extended[i] = tensor[list(pieces)].float().mean(0).to(extended.dtype)
        for i, row in trained.items():
            extended[i] = row.to(extended.dtype)
        return extended

    def _measure(self, stored: StoredTensor) -> int:
        """About how many bytes a tensor takes in the file."""
        count = 1
        for size in stored.info.shape:
            count *= size
        if stored.parameter in (self.weights.entrance, self.weights.head) and stored.info.shape:
            count = count // stored.info.shape[0] * self.vocabulary.size
        own = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(stored.info.dtype, 8)
        return count * (self.dtype.itemsize if self.dtype and stored.info.dtype in FLOATS else own)


def _divide(tensors: Sequence[StoredTensor], measure: Callable[[StoredTensor], int]) -> Iterator[list[StoredTensor]]:
    """The tensors in files of at most `SHARD_BYTES`, where one alone is not larger."""
    shard: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + measure(tensor) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += measure(tensor)
    yield shard


def copy_base_files(base: Path, out: Path, without_tokenizer: bool) -> None:
    """Copy a base's small files: config, tokenizer, processor, and its own code where it brings some."""
    for file in sorted(base.iterdir()):
        kind = file.suffix in (".json", ".jinja", ".model", ".txt", ".py") and not file.name.endswith(".index.json")
        ours = without_tokenizer and file.name.startswith(_TOKENIZER_FILES)
        if file.is_file() and kind and not ours and not file.name.startswith("adapter_"):
            shutil.copyfile(file, out / file.name)


def write_configs(merge: Merge, tokenizer: Tokenizer, out: Path) -> None:
    """Bring config.json and generation_config.json up to the stage: vocabulary, type, the tokens that end an answer."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for part in (config, text):
        if "vocab_size" in part or part is text:
            part["vocab_size"] = merge.vocabulary.size
    if merge.dtype is not None:
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            for key in {"dtype", "torch_dtype"} & set(part) | ({"dtype"} if part is config else set()):
                part[key] = _WIDTHS[merge.dtype]
    write_json(out / "config.json", config)
    path = out / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings.pop("_from_model_config", None)
    listed = settings.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
    stops = {*(listed if isinstance(listed, list) else [listed]), *stop_token_ids(tokenizer)} - {None}
    settings["eos_token_id"] = sorted(stops)
    for key, value in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        if settings.get(key) is None and value is not None:
            settings[key] = value
    write_json(path, settings)
