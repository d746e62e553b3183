"""A chain of adapters as one PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig

from medlora.artifacts.adapter_checks import ROWS
from medlora.artifacts.adapter_origin import find_foreign_bases, find_missing_parents
from medlora.artifacts.adapters import find_adapter
from medlora.artifacts.headers import CONFIG
from medlora.errors import InputError
from medlora.model.adapter_files import (
    PREFIX,
    LowRank,
    read_chain_tensors,
    read_config,
    read_tensors,
    row_ids,
    write_adapter,
)

Rows = Mapping[str, Mapping[int, torch.Tensor]]
"""Vocabulary rows by the name of the embeddings and the token's id."""


def export_chain(
    adapters: Sequence[str | Path],
    out: str | Path,
    force: bool = False,
    dtype: str = "float32",
    rows: Rows | None = None,
) -> None:
    """Write a chain as one ordinary PEFT adapter that gives the same logits, without loading the base.

    The ranks add up: A is concatenated along the rank, and B with each adapter's scaling folded in. A layer of lower
    rank is padded with zeros, so that all have one rank (exact, as PEFT's `add_weighted_adapter` with "cat").
    Vocabulary rows come from the last adapter that has them, else from `rows`; tokenizer files from the last that has
    some. Raises InputError when an adapter holds more than LoRA and vocabulary rows (DoRA, aLoRA, whole modules), the
    adapters are of different bases, or `out` holds an adapter already; without `force` also for an adapter that was trained on top
    of others that are not there.
    """
    out = Path(out)
    if not adapters:
        raise InputError("nothing to export: the base alone has no adapter")
    if (out / CONFIG).exists():
        raise InputError(f"{out}: already holds an adapter; choose another folder or remove it")
    folders = [find_adapter(place) for place in adapters]
    check_chain(folders, out, force)
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.use_dora:
            raise InputError(
                f"{folder}: DoRA rescales the base's weights; it cannot become part of one LoRA adapter, export with "
                "--as merged"
            )
    found = read_chain_tensors(folders)
    tensors, rank = _join(found.layers, out)
    wanted = {
        layer: {**(rows or {}).get(layer, {}), **found.rows.get(layer, {})} for layer in {**(rows or {}), **found.rows}
    }
    for layer, by_id in wanted.items():
        tensors[f"{PREFIX}{layer}.{ROWS}"] = torch.stack([by_id[i].float() for i in sorted(by_id)])
    first = configs[0].target_modules
    same = all(c.target_modules == first and not (c.exclude_modules or c.layers_to_transform) for c in configs)
    joined = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=configs[0].fan_in_fan_out,
        target_modules=first if same else sorted(found.layers),
        trainable_token_indices={layer: sorted(by_id) for layer, by_id in wanted.items()} or None,
    )
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    try:
        write_adapter(out, joined, tensors, configs[0].base_model_name_or_path)
    except FloatingPointError as error:
        raise InputError(f"{out}: {error}; an adapter of the chain is broken, train its phase again") from None
    copy_tokenizer(folders, out)


def copy_adapter(adapter: Path, out: Path, rows: Rows) -> None:
    """Copy an adapter's folder, with more vocabulary rows than it has."""
    shutil.copytree(adapter, out, ignore=_list_special)
    if not any(rows.values()):
        return
    config, tensors = read_config(adapter), read_tensors(adapter)
    ids: dict[str, list[int]] = {}
    for layer in rows:
        name = f"{PREFIX}{layer}.{ROWS}"
        by_id = dict(zip(row_ids(config, layer), tensors.get(name, ()), strict=True)) | dict(rows[layer])
        ids[layer] = sorted(by_id)
        tensors[name] = torch.stack([by_id[i].float() for i in ids[layer]])
    config.trainable_token_indices = ids
    write_adapter(out, config, tensors, config.base_model_name_or_path)


def _list_special(folder: str, names: Sequence[str]) -> list[str]:
    """What is neither a file nor a folder, such as a pipe, which would wait for ever for someone to write into it."""
    return [name for name in names if not ((path := Path(folder) / name).is_file() or path.is_dir())]


def check_chain(folders: Sequence[Path], out: Path, force: bool) -> None:
    """Raise InputError where a chain lacks adapters or mixes bases, unless `force` is given."""
    doubts = [] if force else [*find_foreign_bases(folders), *find_missing_parents(folders)]
    if doubts:
        shown = "\n  ".join(doubts)
        raise InputError(f"{out}: this chain would not give what its adapters were trained for:\n  {shown}")


def copy_tokenizer(folders: Sequence[Path], out: Path) -> bool:
    """Copy the tokenizer of the last adapter that brings one; returns whether there was any."""
    tokenizers = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    for file in sorted(tokenizers[-1].iterdir()) if tokenizers else ():
        if file.name != CONFIG and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(file, out / file.name)
    return bool(tokenizers)


def _join(layers: Mapping[str, Sequence[LowRank]], out: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of one adapter with the ranks of all, and that rank."""
    for layer, parts in layers.items():
        if len({(part.a.shape[1], part.b.shape[0]) for part in parts}) > 1:
            raise InputError(f"{out}: the adapters disagree about the size of {layer}; they are of different bases")
    rank = max(sum(len(part.a) for part in parts) for parts in layers.values())
    tensors = {}
    for layer, parts in layers.items():
        a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
    return tensors, rank
