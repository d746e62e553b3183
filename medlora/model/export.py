"""A chain of adapters as one PEFT adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from medlora.artifacts.adapter_checks import ROWS, Targets, check_adapter
from medlora.artifacts.adapter_origin import find_foreign_bases, find_missing_parents
from medlora.artifacts.adapters import find_adapter
from medlora.artifacts.headers import CONFIG
from medlora.errors import InputError
from medlora.model.adapter_files import read_config, read_tensors, row_ids, write_adapter

_PREFIX = "base_model.model."


def export_chain(adapters: Sequence[str | Path], out: str | Path, force: bool = False) -> None:
    """Write a chain as one ordinary PEFT adapter that gives the same logits, without loading the base.

    The ranks add up: A is concatenated along the rank, and B with each adapter's scaling folded in. A layer of lower
    rank is padded with zeros, so that all have one rank (exact, as PEFT's `add_weighted_adapter` with "cat").
    Vocabulary rows come from the last adapter that has them, tokenizer files from the last that has some. Raises
    InputError when an adapter holds more than LoRA and vocabulary rows (DoRA, aLoRA, whole modules), the adapters are
    of different bases, or `out` holds an adapter already; without `force` also for an adapter that was trained on top
    of others that are not there.
    """
    out = Path(out)
    if not adapters:
        raise InputError("nothing to export: the base alone has no adapter")
    if (out / CONFIG).exists():
        raise InputError(f"{out}: already holds an adapter; choose another folder or remove it")
    folders = [find_adapter(place) for place in adapters]
    checked = [check_adapter(folder) for folder in folders]
    doubts = [] if force else [*find_foreign_bases(folders), *find_missing_parents(folders)]
    if doubts:
        shown = "\n  ".join(doubts)
        raise InputError(f"{out}: this chain would not give what its adapters were trained for:\n  {shown}")
    configs = [read_config(folder) for folder in folders]
    low_rank: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for folder, config, found in zip(folders, configs, checked, strict=True):
        _collect(folder, config, found.targets, low_rank, rows)
    for layer, pairs in low_rank.items():
        if len({(a.shape[1], b.shape[0]) for a, b in pairs}) > 1:
            raise InputError(f"{out}: the adapters disagree about the size of {layer}; they are of different bases")
    rank = max(sum(len(a) for a, _ in pairs) for pairs in low_rank.values())
    tensors = {}
    for layer, pairs in low_rank.items():
        a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
    for layer, by_id in rows.items():
        tensors[f"{_PREFIX}{layer}.{ROWS}"] = torch.stack([by_id[i] for i in sorted(by_id)])
    first = configs[0].target_modules
    same = all(c.target_modules == first and not (c.exclude_modules or c.layers_to_transform) for c in configs)
    joined = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=configs[0].fan_in_fan_out,
        target_modules=first if same else sorted(low_rank),
        trainable_token_indices={layer: sorted(by_id) for layer, by_id in rows.items()} or None,
    )
    try:
        write_adapter(out, joined, tensors, configs[0].base_model_name_or_path)
    except FloatingPointError as error:
        raise InputError(f"{out}: {error}; an adapter of the chain is broken, train its phase again") from None
    tokenizers = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    for file in sorted(tokenizers[-1].iterdir()) if tokenizers else ():
        if file.name != CONFIG and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(file, out / file.name)


def _collect(
    folder: Path,
    config: LoraConfig,
    targets: Targets,
    low_rank: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
    rows: dict[str, dict[int, torch.Tensor]],
) -> None:
    """Add one adapter's (A, scaled B) per layer and its vocabulary rows by id."""
    if config.use_dora:
        raise InputError(f"{folder}: DoRA rescales the base's weights; it cannot become part of one LoRA adapter")
    if config.alora_invocation_tokens:
        raise InputError(
            f"{folder}: aLoRA acts only behind its invocation tokens; it cannot become part of one LoRA adapter"
        )
    tensors = read_tensors(folder)
    for name in sorted(tensors):
        path = name.removeprefix(_PREFIX)
        if path.endswith(".lora_A.weight"):
            layer = path.removesuffix(".lora_A.weight")
            a, b = tensors[name].float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()
            alpha = targets.find_alpha(layer)
            low_rank.setdefault(layer, []).append((a, b * alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))))
        elif path.endswith(f".{ROWS}"):
            layer = path.removesuffix(f".{ROWS}")
            rows.setdefault(layer, {}).update(zip(row_ids(config, layer), tensors[name].float(), strict=True))
        elif not path.endswith(".lora_B.weight"):
            raise InputError(
                f"{folder}: holds {name}, neither LoRA nor vocabulary rows; it cannot become part of one LoRA adapter"
            )
