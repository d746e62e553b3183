"""Where adapters sit on a base: the linear layers of its text decoder, and rows of its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from medlora.adapter_files import ROWS, row_ids
from medlora.errors import InputError

_PREFIX = "base_model.model."


def decoder_name(base: PreTrainedModel) -> str:
    """Name of the text decoder: the module that holds the input embeddings."""
    return _name_of(base, base.get_input_embeddings()).rpartition(".")[0]


def _name_of(base: PreTrainedModel, wanted: torch.nn.Module) -> str:
    return next(name for name, module in base.named_modules() if module is wanted)


def choose_targets(base: PreTrainedModel, wanted: str | Sequence[str]) -> list[str] | str:
    """Leaf names where they mean the decoder alone, else a regex that is anchored to it."""
    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | LoraLayer)]
    linear = [name for name in linear if not re.search(r"\.(base_layer$|lora_[AB]\.)", name)]
    decoder = decoder_name(base)
    inside = [name for name in linear if name.startswith(f"{decoder}.")]
    leaves = {name.rpartition(".")[2] for name in inside}
    if wanted == "all-linear":
        chosen = leaves
    elif wanted == "attention":
        chosen = {name.rpartition(".")[2] for name in inside if re.search("attn|attention", name.rpartition(".")[0])}
    else:
        chosen = set(wanted)
    if not chosen or chosen - leaves:
        unknown = ", ".join(sorted(chosen - leaves)) or wanted
        raise InputError(f"lora.targets: the text decoder has no layer {unknown}; it has {', '.join(sorted(leaves))}")
    outside = {name.rpartition(".")[2] for name in set(linear) - set(inside)}
    if not chosen & outside:
        return sorted(chosen)
    return rf"{re.escape(decoder)}\..*\.({'|'.join(sorted(chosen))})"


def choose_rows(base: PreTrainedModel, ids: Sequence[int]) -> list[int] | dict[str, list[int]] | None:
    """The rows to train as PEFT wants them: a list where input and output embeddings are tied, else one for each."""
    rows = sorted(set(ids))
    entrance, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not rows:
        return None
    if _bare(head) is _bare(entrance):
        return rows
    return {_name_of(base, module).rpartition(".")[2]: list(rows) for module in (entrance, head)}


def _bare(embeddings: torch.nn.Module) -> torch.Tensor:
    """The base's own embeddings, whatever wraps them."""
    return getattr(embeddings, "original_module", embeddings).weight


def adopt_embeddings(base: PreTrainedModel, folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Turn whole embeddings in an adapter's file, which PEFT writes after a resize, into the rows that they change.

    Loaded as they are they would overwrite the base under every stage. Those in `modules_to_save` stay whole, with the
    base's rows where the file has fewer. Raises InputError when the base's vocabulary is too small for the adapter.
    """
    head, entrance = base.get_output_embeddings(), base.get_input_embeddings()
    finals: dict[str, torch.Tensor] = {}
    for module in (head, entrance):
        name = f"{_PREFIX}{_name_of(base, module)}"
        found = [tensors.pop(f"{name}.{part}weight", None) for part in ("", "token_adapter.base_layer.")]
        for copy in ("modules_to_save", "original_module"):
            tensors.pop(f"{name}.{copy}.weight", None)
        whole = next((tensor for tensor in found if tensor is not None), None)
        needed = max(0 if whole is None else len(whole), *(i + 1 for i in row_ids(config, name)), 0)
        if needed > len(_bare(module)):
            raise InputError(
                f"{folder}: was trained on a vocabulary of {needed} tokens, the base here has {len(_bare(module))}; "
                "load the base with the tokenizer that was saved with the adapter"
            )
        if whole is None:
            continue
        final = _bare(module).detach().cpu().clone()
        final[: len(whole)] = whole
        if name.rpartition(".")[2] in (config.modules_to_save or ()):
            tensors[f"{name}.weight"] = final
        else:
            finals[name] = final
    if not finals:
        return
    modules = [entrance] if _bare(head) is _bare(entrance) else [entrance, head]
    changed = set[int]()
    for module in modules:
        name = f"{_PREFIX}{_name_of(base, module)}"
        own = _bare(module).detach().cpu()
        final = finals.setdefault(name, own.clone())
        if f"{name}.{ROWS}" in tensors:
            trained = row_ids(config, name)
            final[trained] = tensors[f"{name}.{ROWS}"].to(final.dtype)
            changed |= set(trained)
        changed |= set((final != own).any(dim=1).nonzero().flatten().tolist())
    for name in [name for name in tensors if name.endswith(ROWS)]:
        del tensors[name]
    config.trainable_token_indices = choose_rows(base, sorted(changed))
    if changed:
        for module in modules:
            name = f"{_PREFIX}{_name_of(base, module)}"
            tensors[f"{name}.{ROWS}"] = finals[name][sorted(changed)]
