"""A base model's folder, checked from its headers, index and JSON files before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medlora.artifacts.chat_templates import check_template
from medlora.artifacts.headers import FLOATS, TensorInfo, read_header, read_mapping
from medlora.errors import InputError

_CONFIG_BYTES = 16 * 2**20


_INDEX_BYTES = 128 * 2**20


_TOKENIZER_BYTES = 512 * 2**20


_TEMPLATE_BYTES = 2**20


_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    *("tekken.json", "*.tiktoken", "bpe.model"),
)
"""Files of which a tokenizer has one at least."""


_LAYER = re.compile(r"(?:^|\.)(?P<place>(?:layers|h|blocks)\.(?P<number>\d+)\.(?P<rest>.+?))(?:\.weight)?$")


_NOT_TEXT = re.compile(r"vision|visual|audio|image|encoder|speech|projector|mtp|experts")


_SAMPLES, _SAMPLE_BYTES = 64, 4096


def check_base(folder: Path, trust_remote_code: bool = False, complete: bool = True) -> None:
    """Raise InputError for what makes a model's folder unusable; unless it is `complete`, files may still be missing."""
    at = "base.model: "
    try:
        config = read_mapping(folder / "config.json", _CONFIG_BYTES)
        if not (isinstance(config.get("model_type"), str) or isinstance(config.get("architectures"), list)):
            raise InputError(
                f"{folder / 'config.json'}: has neither model_type nor architectures; it is no model's config"
            )
        tensors = read_base_tensors(folder)
        if tensors is not None:
            _check_shapes(folder, config, tensors)
        elif complete:
            raise _explain_absent_weights(folder)
        check_tokenizer(folder, trust_remote_code, complete)
    except InputError as error:
        raise InputError(f"{at}{error}") from None


def _explain_absent_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return InputError(
            f"{folder}: has no {_SINGLE}, and {pickles[0]} is a pickle, which can run code on loading; save the model "
            "with safetensors"
        )
    return InputError(f"{folder}: has no weights ({_SINGLE} or {_INDEX}); copy the whole model there")


def read_base_tensors(folder: Path) -> dict[str, TensorInfo] | None:
    """The tensors of a model by name, from the headers of its shards; None where it has no safetensors weights.

    Raises InputError for a shard that is missing or cut short, and for an index that names what is not there.
    """
    if (folder / _SINGLE).exists():
        return read_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        return None
    places = read_mapping(folder / _INDEX, _INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{folder / _INDEX}: has no weight_map of tensors to files; copy it again")
    shards = sorted(set(places.values()))
    if odd := next((name for name in shards if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name)), None):
        raise InputError(f"{folder / _INDEX}: names {odd[:100]!r}, which is no safetensors file beside it")
    if absent := [name for name in shards if not (folder / name).exists()]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"{folder / _INDEX}: names {absent[0]}{more} of {len(shards)} files, which the folder does not have; copy them there"
        )
    held = {name: read_header(folder / name) for name in shards}
    found = {}
    for name, shard in places.items():
        if name not in held[shard]:
            raise InputError(
                f"{folder / _INDEX}: names {name[:100]} in {shard}, which does not hold it; copy both again"
            )
        found[name] = held[shard][name]
    return found


def find_shards(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a model; raises InputError where files are missing, damaged, or no safetensors."""
    tensors = read_base_tensors(folder)
    if tensors is None:
        raise _explain_absent_weights(folder)
    if (folder / _SINGLE).exists():
        return dict.fromkeys(tensors, folder / _SINGLE)
    places = read_mapping(folder / _INDEX, _INDEX_BYTES)["weight_map"]
    assert isinstance(places, dict)  # `read_base_tensors` has looked
    return {name: folder / places[name] for name in tensors}


def _check_shapes(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError where weights do not fit the sizes that the config itself names."""
    if not tensors:
        raise InputError(f"{folder}: its weights hold no tensor at all; copy the model again")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    hidden, layers = text.get("hidden_size"), text.get("num_hidden_layers")  # type: ignore[union-attr]
    same_width = type(hidden) is int and not {"word_embed_proj_dim", "embedding_size"} & set(text)  # type: ignore[arg-type]
    numbers = set()
    for name, tensor in tensors.items():
        if _NOT_TEXT.search(name):
            continue
        if found := _LAYER.search(name):
            numbers.add(int(found["number"]))
        plain = same_width and len(tensor.shape) == 2 and tensor.dtype in FLOATS and "quantization_config" not in config
        if plain and name.endswith(("embed_tokens.weight", ".q_proj.weight")) and tensor.shape[1] != hidden:
            raise InputError(
                f"{folder}: {name} has shape {list(tensor.shape)}, and config.json says hidden_size {hidden}; config and "
                "weights are of different models"
            )
    if type(layers) is int and 0 < layers <= 10_000 and numbers and (lacking := set(range(layers)) - numbers):
        raise InputError(
            f"{folder}: its weights have no layer {min(lacking)}, and config.json says num_hidden_layers {layers}; a file of "
            "the model is missing, or config and weights are of different models"
        )


def check_tokenizer(folder: Path, trust_remote_code: bool = False, complete: bool = True) -> None:
    """Raise InputError where a folder's tokenizer is missing, no JSON, or has a chat template that never ends."""
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if (folder / name).exists():
            settings[name] = read_mapping(folder / name, _CONFIG_BYTES)
    about = settings.get("tokenizer_config.json", {})
    own_code = trust_remote_code and "auto_map" in about
    if complete and not own_code and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        raise InputError(
            f"{folder}: has no tokenizer (none of {', '.join(_TOKENIZERS[:5])}, ...); copy the tokenizer's files of the "
            "same model there, or every text would become nothing"
        )
    if (folder / "tokenizer.json").exists():
        tokenizer = read_mapping(folder / "tokenizer.json", _TOKENIZER_BYTES)
        vocabulary = tokenizer.get("model")
        if not isinstance(vocabulary, dict) or not vocabulary.get("vocab"):
            raise InputError(f"{folder / 'tokenizer.json'}: has no vocabulary (model.vocab); copy it again")
    for name, template in _list_templates(folder, about):
        check_template(name, template)


def _list_templates(folder: Path, about: Mapping[str, object]) -> list[tuple[str, str]]:
    """A tokenizer's chat templates: where each is, and its text."""
    found: list[tuple[str, str]] = []
    written = about.get("chat_template")
    if isinstance(written, str):
        found.append((f"{folder / 'tokenizer_config.json'}: chat_template", written))
    for each in written if isinstance(written, list) else []:
        if isinstance(each, dict) and isinstance(each.get("template"), str):
            where = f"{folder / 'tokenizer_config.json'}: chat_template {str(each.get('name'))[:40]!r}"
            found.append((where, each["template"]))
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if not path.is_file():
            continue
        if path.stat().st_size > _TEMPLATE_BYTES:
            raise InputError(f"{path}: has {path.stat().st_size:,} bytes; a chat template has some thousands")
        found.append((str(path), path.read_text(encoding="utf-8", errors="replace")))
    return found


def check_layers(where: Path, adapter: Mapping[str, tuple[int, int]], base: Mapping[str, TensorInfo]) -> None:
    """Raise InputError where headers alone show that an adapter is of another base: a missing layer, another size.

    Files name modules by other beginnings than the model in memory, so layers are compared from `layers.N.` on. What
    headers do not show is checked by the model, once it is loaded.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in base.items():
        if found := _LAYER.search(name):
            comparable = len(tensor.shape) == 2 and tensor.dtype in FLOATS
            shapes.setdefault(found["place"], set()).add(tensor.shape if comparable else ())
    kinds = {_number_free(place) for place in shapes}
    leaves = {part for name in base for part in name.split(".")}
    for module, sizes in adapter.items():
        found = _LAYER.search(module)
        place = found["place"] if found else module
        if place in shapes:
            fits = any(not shape or set(shape) == set(sizes) for shape in shapes[place])
            problem = "" if fits else f"it has {sizes[0]} inputs and {sizes[1]} outputs there, other sizes in the base"
        elif _number_free(place) in kinds:
            problem = "which the base does not have"
        else:
            fused = any("experts" in name for name in base)
            problem = "" if fused or module.rpartition(".")[2] in leaves else "which the base does not have"
        if problem:
            raise InputError(f"{where}: this adapter does not fit the base: it sits on {module[:100]}, {problem}")


def _number_free(place: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", place)


def sample_weights(folder: Path) -> str | None:
    """A quick hash of a model's headers and of samples of its weights; others of its shape have another."""
    digest, found = hashlib.sha256(), False
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in _list_places(size):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
        found = True
    return digest.hexdigest()[:32] if found else None


def _list_places(size: int) -> Iterable[int]:
    """Where a file is sampled: its beginning, its end, and evenly between."""
    last = max(0, size - _SAMPLE_BYTES)
    return sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
