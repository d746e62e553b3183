"""The weights of a base on disk: under which name each parameter is stored, read one tensor or a few rows at a time.

Files name tensors as the family did when it was published. transformers renames them on loading, by a table of its own,
which is asked here for the names that adapters use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.base import get_keys_to_not_convert

from medlora.artifacts.base_checks import find_shards
from medlora.artifacts.headers import TensorInfo, read_header
from medlora.config.model import BaseModelConfig
from medlora.errors import InputError
from medlora.model.files import explain_load_errors, find_local_folder, load_quietly
from medlora.model.targets import list_linear, name_embeddings


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a base's files."""

    key: str
    """Its name in the file."""
    file: Path
    info: TensorInfo
    parameter: str
    """The parameter that it becomes, as adapters name it."""
    is_converted: bool
    """Whether transformers joins, splits or turns it on loading, so that it is not the parameter itself."""

    def read(self) -> torch.Tensor:
        """The tensor as it is stored."""
        with safe_open(self.file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
            return tensor

    def read_rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, without the rest of it."""
        with safe_open(self.file, "pt") as file:
            part = file.get_slice(self.key)
            return torch.cat([part[i : i + 1] for i in ids])


@dataclass(frozen=True)
class BaseWeights:
    """A base as its files have it."""

    folder: Path
    tensors: tuple[StoredTensor, ...]
    """In the order of the files."""
    entrance: str
    """The parameter of the input embeddings, and of the output embeddings below; one name twice where they are tied."""
    head: str
    tied: frozenset[str]
    """Parameters that are another one under a second name; a copy of them in the files is never read."""
    turned: frozenset[str]
    """Parameters of GPT-2's kind of linear layer, stored as [inputs, outputs]."""
    linear: frozenset[str]
    """Parameters of all linear layers."""
    quantizable: frozenset[str]
    """Those of them that loading with bitsandbytes quantizes."""

    @property
    def rows(self) -> int:
        """Rows of the input embeddings: tokens that the base has place for."""
        return self.find(self.entrance).info.shape[0]

    def find(self, parameter: str) -> StoredTensor:
        """The tensor that is this parameter; raises InputError when none is, as it stands."""
        found = next((t for t in self.tensors if t.parameter == parameter and not t.is_converted), None)
        if found is None:
            raise InputError(
                f"{self.folder}: no file holds {parameter} by itself; transformers puts it together on loading, so an "
                "adapter on it cannot be merged file by file; export with --as adapter or --as peft-stack"
            )
        return found


def read_base_weights(base: BaseModelConfig) -> BaseWeights:
    """What the files of a base hold; no weight is read, and the model is built without memory for any.

    Raises InputError when the base is not here, or its own weights are quantized.
    """
    folder = Path(find_local_folder(base, weights=True))
    with explain_load_errors(f"base.model: {folder}"), load_quietly():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise InputError(
                f"base.model: the weights in {folder} are quantized themselves, so nothing can be merged into them; name "
                "the folder of the unquantized base with --base"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)
    model.tie_weights()
    entrance, head = name_embeddings(model)
    places = find_shards(folder)
    renamed = _rename(model, places)
    headers = {file: read_header(file) for file in sorted(set(places.values()))}
    stored = tuple(
        StoredTensor(key, file, info, *renamed[key])
        for file, held in headers.items()
        for key, info in held.items()
        if places.get(key) == file
    )
    own = {name for name, _ in model.named_parameters()}
    linear, turned = _list_linear(model)
    return BaseWeights(
        folder=folder,
        tensors=stored,
        entrance=f"{entrance}.weight",
        head=f"{head}.weight",
        tied=frozenset({name for name, _ in model.named_parameters(remove_duplicate=False)} - own),
        turned=frozenset(turned),
        linear=frozenset(linear),
        quantizable=frozenset(linear) - {f"{name}.weight" for name in get_keys_to_not_convert(model)},
    )


def _list_linear(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    layers = list_linear(model)
    turned = [f"{name}.weight" for name, layer in layers.items() if not isinstance(layer, torch.nn.Linear)]
    return [f"{name}.weight" for name in layers], turned


def _rename(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The parameter of every key of the files, and whether transformers converts the tensor on the way."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if not isinstance(each, WeightRenaming)]
    own = model.state_dict()
    found = {}
    for key in sorted(keys, key=dot_natural_key):  # the order of transformers: some renamings wait for an earlier key
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)  # type: ignore[arg-type]
        found[key] = (name, pattern is not None)
    return found


def requantize(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A linear weight [outputs, inputs] as a base loaded with this quantization computes with it, in float32."""
    from bitsandbytes import functional  # slow to import, and only this needs it

    if quantization == "nf4":
        packed, state = functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
        found: torch.Tensor = functional.dequantize_4bit(packed, state)
        return found.float()
    rounded, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    restored: torch.Tensor = rounded.float() * scales.float().unsqueeze(1) / 127
    return restored
