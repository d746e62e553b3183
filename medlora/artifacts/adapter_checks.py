"""An adapter touches only itself: its folder is checked, from config and safetensors header alone, before PEFT opens it.

PEFT loads a tensor that is named like one of the base's weights over the base. It starts `pissa` and `olora` by
changing the base, and matches target patterns with an engine that can hang. None of that is left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.artifacts.headers import CONFIG, FLOATS, WEIGHTS, TensorInfo, find_not_finite, read_header, read_mapping
from medlora.artifacts.name_patterns import NamePattern
from medlora.errors import InputError

_PREFIX = "base_model.model."


ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name of trained vocabulary rows within an embedding."""


EMBEDDINGS = {
    *("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings", "embeddings"),
    *("output", "output_layer", "word_embedding", "embedding", "embed", "shared"),
}
"""Names that families give to their input and output embeddings, which PEFT may save whole."""


_CONFIG_BYTES = 4 * 2**20


_HIGHEST_RANK = 65_536


_HIGHEST_ROW = 10_000_000


_MOST_NAMES = 50_000


_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")


_READ = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "alora_invocation_tokens"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
"""Keys that are checked here or change nothing by themselves; any other must be empty."""


_UNFIT = "this adapter does not fit the base or its own config"


_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,30}")


_PLAIN = re.compile(r"[\w.-]{1,300}")


_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<part>[AB])\.weight|(?P<embedded>embedding_[AB])|(?P<magnitude>magnitude_vector))"
)


@dataclass(frozen=True)
class Targets:
    """Which modules an adapter's config means, with which rank and alpha, for any patterns."""

    matches: Callable[[str], bool]
    """Whether the config targets the module of that name; always true for `all-linear`."""
    find_rank: Callable[[str], int]
    find_alpha: Callable[[str], float]
    is_plain: bool
    """Whether the config has names alone, which PEFT compares without any pattern."""


@dataclass(frozen=True)
class Checked:
    """What is known of an adapter whose folder was checked."""

    targets: Targets
    sizes: dict[str, tuple[int, int]]
    """The modules that it sits on, each with the size of its inputs and outputs."""


def check_adapter(folder: Path) -> Checked:
    """Check an adapter's config and the header of its weights against each other, and that its numbers are finite.

    Raises InputError for a start that changes the base and for what is not supported. It also does so for every tensor
    that is not the adapter's own or does not fit its shape.
    """
    config = read_mapping(folder / CONFIG, _CONFIG_BYTES)
    where = folder / CONFIG
    _check_start(where, config)
    _check_keys(where, config)
    _check_numbers(where, config)
    targets, tensors = find_targets(where, config), read_header(folder / WEIGHTS)
    checked = Checked(targets, _check_tensors(folder / WEIGHTS, tensors, config, targets))
    if name := find_not_finite(folder / WEIGHTS, tensors):
        raise InputError(
            f"{folder / WEIGHTS}: {name} holds NaN or infinity; its training diverged, take an earlier adapter"
        )
    return checked


def _check_start(where: Path, config: Mapping[str, object]) -> None:
    start = config.get("init_lora_weights", True)
    if (
        not isinstance(start, bool | str | None)
        or (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS
    ):
        raise InputError(
            f"{where}: init_lora_weights is {str(start)[:40]!r}: loading such an adapter changes or computes from the "
            "base's own weights, under every other stage too. Save it as a plain adapter where it was trained, with PEFT's "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=START), and name that folder"
        )


def _check_keys(where: Path, config: Mapping[str, object]) -> None:
    """Raise InputError for what is not supported, or is of another type than PEFT writes."""
    if len(config) > 500:
        raise InputError(f"{where}: has {len(config):,} keys; a LoRA config has some dozens")
    for key, value in config.items():
        if key not in _READ and value not in (None, False, "", [], {}):
            raise InputError(
                f"{where}: {str(key)[:60]} is set, which is not supported; only plain LoRA, DoRA, rsLoRA and trained "
                "vocabulary rows can be loaded"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{where}: bias is {str(config['bias'])[:40]!r}, which changes the base; only 'none' can be loaded"
        )
    for key in ("base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or len(value) > 4096 or not value.isprintable()):
            raise InputError(f"{where}: {key} must be a line of text without control characters")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{where}: {key} must be true or false, found {str(config[key])[:40]!r}")
    if not _is_names(config.get("modules_to_save"), EMBEDDINGS):
        raise InputError(
            f"{where}: modules_to_save replaces {str(config['modules_to_save'])[:80]} of the base; only whole embeddings can "
            f"be loaded ({', '.join(sorted(EMBEDDINGS)[:4])}, ...)"
        )
    if isinstance(runtime := config.get("runtime_config"), dict) and any(runtime.values()):
        raise InputError(f"{where}: runtime_config is set, which is not supported; remove it")


def _is_names(value: object, known: set[str] | None = None) -> bool:
    """Whether a value is a list of plain names, of `known` ones where given; None and an empty list are."""
    return value is None or (
        isinstance(value, list)
        and len(value) <= _MOST_NAMES
        and all(isinstance(name, str) and _PLAIN.fullmatch(name) and (not known or name in known) for name in value)
    )


def _is_number(value: object, least: float, most: float, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return (
        isinstance(value, kind)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and least <= value <= most
    )


def _check_numbers(where: Path, config: Mapping[str, Any]) -> None:
    ranks = {"r": config.get("r", 8), **_name_values("rank_pattern", where, config)}
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **_name_values("alpha_pattern", where, config)}
    for key, value in ranks.items():
        if not _is_number(value, 1, _HIGHEST_RANK, int):
            raise InputError(
                f"{where}: {key} must be a whole number from 1 to {_HIGHEST_RANK:,}, found {str(value)[:40]!r}"
            )
    for key, value in alphas.items():
        if not _is_number(value, -1e6, 1e6):
            raise InputError(f"{where}: {key} must be a finite number up to a million, found {str(value)[:40]!r}")
    if not _is_number(dropout := config.get("lora_dropout", 0.0), 0, 0.999999):
        raise InputError(f"{where}: lora_dropout must be a number from 0 up to 1, found {str(dropout)[:40]!r}")
    rows = config.get("trainable_token_indices")
    for ids in rows.values() if isinstance(rows, dict) else [rows or []]:
        good = isinstance(ids, list) and all(_is_number(i, 0, _HIGHEST_ROW, int) for i in ids)
        if not good or len(set(ids)) < len(ids):
            raise InputError(
                f"{where}: trainable_token_indices must be token ids, each once and none below 0 or above {_HIGHEST_ROW:,}"
            )
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if len(listed) > 10_000 or not all(_is_number(layer, 0, 10_000, int) for layer in listed):
        raise InputError(f"{where}: layers_to_transform must be numbers of layers, found {str(layers)[:40]!r}")
    tokens = config.get("alora_invocation_tokens") or []
    if (
        not isinstance(tokens, list)
        or len(tokens) > 10_000
        or not all(_is_number(i, 0, _HIGHEST_ROW, int) for i in tokens)
    ):
        raise InputError(f"{where}: alora_invocation_tokens must be token ids")


def _name_values(key: str, where: Path, config: Mapping[str, object]) -> dict[str, object]:
    """The values of a pattern's mapping by dotted keys; raises InputError when it is no mapping of patterns."""
    values = config.get(key) or {}
    if not isinstance(values, dict) or len(values) > _MOST_NAMES:
        raise InputError(f"{where}: {key} must be a mapping of at most {_MOST_NAMES:,} names")
    return {f"{key}.{name[:60]}": value for name, value in values.items()}


def find_targets(where: Path, config: Mapping[str, Any]) -> Targets:
    """What an adapter's config targets; raises InputError for patterns that cannot be matched in bounded time."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    saved, layers = set(config.get("modules_to_save") or ()), config.get("layers_to_transform")
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not _is_names(patterns):
        raise InputError(f"{where}: layers_pattern must be plain names, found {str(patterns)[:60]!r}")
    wanted = _read_names(where, "target_modules", targets)
    left_out = _read_names(where, "exclude_modules", excluded)
    numbers = None if layers in (None, []) else set(layers if isinstance(layers, list) else [layers])
    head = f"(?:{'|'.join(map(re.escape, patterns))})" if patterns else r"[^.]+"
    layer = re.compile(rf"(?:^|\.){head}\.(\d+)\.")

    def matches(name: str) -> bool:
        if left_out(name) or saved & set(name.split(".")) or not wanted(name):
            return False
        if numbers is None or isinstance(targets, str):
            return True
        found = layer.search(name)
        return found is not None and int(found[1]) in numbers

    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    return Targets(
        matches,
        _find_value(where, "rank_pattern", ranks, config.get("r", 8)),
        _find_value(where, "alpha_pattern", alphas, config.get("lora_alpha", 8)),
        is_plain=(isinstance(targets, list) or targets == "all-linear")
        and isinstance(excluded, list)
        and not (ranks or alphas or patterns),
    )


def _read_names(where: Path, key: str, value: Any) -> Callable[[str], bool]:
    """Whether a module's name is meant by a list of names (which end it) or by a pattern (which it matches whole)."""
    if isinstance(value, str):
        if key == "target_modules" and value == "all-linear":
            return lambda name: True
        return _compile(where, key, value).fullmatch
    if not _is_names(value) or (key == "target_modules" and not value):
        raise InputError(f"{where}: {key} must be a list of plain names or a pattern, found {str(value)[:60]!r}")
    names = set(value)

    def ends(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))

    return ends


def _compile(where: Path, key: str, pattern: str) -> NamePattern:
    try:
        return NamePattern(pattern)
    except InputError as error:
        raise InputError(f"{where}: {key}: {error}") from None


def _find_value(where: Path, key: str, values: Mapping[str, object], default: Any) -> Callable[[str], Any]:
    """The value that a module's name has by the first key that its end matches, as PEFT looks it up."""
    if len(values) > 1_000 and not all(_PLAIN.fullmatch(name) for name in values):
        raise InputError(f"{where}: {key} has {len(values):,} patterns; at most 1,000 are read, or plain names")
    plain = all(re.fullmatch(r"[\w.]{1,300}", name) for name in values)
    compiled = [] if plain else [(_compile(where, key, name), value) for name, value in values.items()]
    order = {name: i for i, name in enumerate(values)}

    def find(module: str) -> object:
        if plain:
            # In PEFT a dot in a key matches any character; for no module does that differ from a dot.
            parts = module.split(".")
            ends = [end for i in range(len(parts)) if (end := ".".join(parts[i:])) in order]
            return values[min(ends, key=order.__getitem__)] if ends else default
        return next((value for pattern, value in compiled if pattern.match_end(module)), default)

    return find


def _check_tensors(
    where: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, object], targets: Targets
) -> dict[str, tuple[int, int]]:
    """The modules that an adapter's tensors sit on, each with the size of its inputs and outputs.

    Raises InputError for the first tensor that is none of LoRA, DoRA, vocabulary rows or a whole embedding. It also
    does so for one that sits on a module that the config does not target, or does not fit its rank.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    rows = whole = 0
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key or not _NAME.fullmatch(name):
            raise InputError(
                f"{where}: holds {key[:100]!r}, which is no tensor of a LoRA adapter; save the adapter again"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{where}: {key[:100]} is of type {tensor.dtype[:20]}; an adapter's are {', '.join(FLOATS)}"
            )
        if found := _LORA.fullmatch(name):
            part = found["part"] or found["embedded"] or "magnitude"
            parts.setdefault(found["module"], {})[part] = tensor.shape
        elif name.endswith(f".{ROWS}"):
            _check_rows(where, name, tensor.shape, config)
            rows += 1
        else:
            _check_whole(where, name, tensor.shape)
            whole += 1
    if not parts:
        raise InputError(f"{where}: holds no LoRA tensors; the adapter was not saved completely")
    for key, held in (("trainable_token_indices", rows or whole), ("modules_to_save", whole)):
        if config.get(key) and not held:
            raise InputError(
                f"{where}: holds no embeddings, which {key} of the config names; the adapter is not complete"
            )
    return {module: _check_module(where, module, shapes, config, targets) for module, shapes in parts.items()}


def _check_rows(where: Path, name: str, shape: tuple[int, ...], config: Mapping[str, object]) -> None:
    ids = find_row_ids(config.get("trainable_token_indices"), name.removesuffix(f".{ROWS}"))
    if len(shape) != 2 or shape[0] != len(ids):
        raise InputError(
            f"{where}: {name} has shape {list(shape)}, the config's trainable_token_indices name {len(ids)} rows for it"
        )


def find_row_ids(indices: Any, embeddings: str) -> list[int]:
    """The token ids that `trainable_token_indices` name for the embeddings of that name."""
    if isinstance(indices, dict):
        return next((ids for target, ids in indices.items() if embeddings.endswith(target)), [])
    return indices or []


def _check_whole(where: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise InputError unless a name is that of a whole embedding, which `targets.adopt_embeddings` takes apart."""
    module = re.sub(r"(\.(token_adapter\.base_layer|base_layer|modules_to_save|original_module))?\.weight$", "", name)
    if module == name or module.rpartition(".")[2] not in EMBEDDINGS or len(shape) != 2:
        raise InputError(
            f"{where}: holds {name[:100]}, which is no part of a LoRA adapter but a weight of the base; "
            "such a file would change the base under every stage: save the adapter again with PEFT"
        )


def _check_module(
    where: Path, module: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object], targets: Targets
) -> tuple[int, int]:
    """The sizes of inputs and outputs of a module, from its tensors' shapes."""
    if not targets.matches(module):
        raise InputError(
            f"{where}: {_UNFIT}: it holds tensors of {module[:100]}, which target_modules of the config does not name"
        )
    first, second = ("A", "B") if "A" in shapes or "B" in shapes else ("embedding_A", "embedding_B")
    expected = {first, second, *(["magnitude"] if config.get("use_dora") else [])}
    if set(shapes) != expected:
        odd = sorted(expected ^ set(shapes))[0]
        what = "lacks" if odd in expected else "holds"
        raise InputError(
            f"{where}: {_UNFIT}: {module[:100]} {what} lora {odd}; the adapter was not saved completely, or is another's"
        )
    a, b, rank = shapes[first], shapes[second], targets.find_rank(module)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or not a[1] or not b[0]:
        raise InputError(
            f"{where}: {_UNFIT}: {module[:100]} has A of shape {list(a)} and B of {list(b)}, which do not fit the config's rank {rank}"
        )
    if "magnitude" in shapes and math.prod(shapes["magnitude"]) not in (b[0], a[1]):
        raise InputError(
            f"{where}: {_UNFIT}: {module[:100]} has a DoRA magnitude of shape {list(shapes['magnitude'])} for {b[0]} outputs"
        )
    return a[1], b[0]


def check_sizes(where: Path, adapter: Mapping[str, tuple[int, int]], base: Mapping[str, Iterable[int]]) -> None:
    """Raise InputError where an adapter's module is none of the base's modules (name -> inputs, outputs), or of another size."""
    for module, sizes in adapter.items():
        if module not in base:
            raise InputError(
                f"{where}: this adapter does not fit the base: it sits on {module}, which the base does not have"
            )
        if tuple(base[module]) != sizes:
            raise InputError(
                f"{where}: this adapter does not fit the base: {module} has {sizes[0]} inputs and {sizes[1]} outputs there, "
                f"{' and '.join(map(str, base[module]))} in the base"
            )
