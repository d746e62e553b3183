"""Where adapters sit on a base: the linear layers of its text decoder, and rows of its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from medlora.artifacts.adapter_checks import ROWS, Checked, check_sizes
from medlora.errors import InputError
from medlora.model.adapter_files import row_ids

_PREFIX = "base_model.model."


def decoder_name(base: PreTrainedModel) -> str:
    """Name of the text decoder: the module that holds the input embeddings."""
    return _name_of(base, base.get_input_embeddings()).rpartition(".")[0]


def _name_of(base: PreTrainedModel, wanted: torch.nn.Module) -> str:
    names: Iterator[str] = (name for name, module in base.named_modules() if module is wanted)
    return next(names)


def name_embeddings(base: PreTrainedModel) -> tuple[str, str]:
    """Names of the input and of the output embeddings; the first one twice where they are tied."""
    entrance, head = base.get_input_embeddings(), base.get_output_embeddings()
    name = _name_of(base, entrance)
    return name, name if _bare(head) is _bare(entrance) else _name_of(base, head)


def list_linear(base: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers of a base by name, whether or not adapters sit on them; GPT-2's Conv1D is one with its weight turned."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in base.named_modules():
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(layer, torch.nn.Linear | Conv1D) and not re.search(r"\.(base_layer$|lora_[AB]\.)", name):
            found[name] = layer
    return found


def has_turned_weights(base: PreTrainedModel) -> bool:
    """Whether a base's linear layers keep their weights as [inputs, outputs], as GPT-2's do."""
    return any(isinstance(layer, Conv1D) for layer in list_linear(base).values())


def choose_targets(base: PreTrainedModel, wanted: str | Sequence[str]) -> list[str] | str:
    """Leaf names where they mean these layers of the decoder alone, else a regex that is anchored to it."""
    linear = list_linear(base)
    decoder = decoder_name(base)
    inside = [name for name in linear if not decoder or name.startswith(f"{decoder}.")]
    leaves = {name.rpartition(".")[2] for name in inside}
    if wanted == "all-linear":
        chosen = inside
    elif wanted == "attention":
        chosen = [name for name in inside if re.search("attn|attention", name.rpartition(".")[0])]
    else:
        chosen = [name for name in inside if name.rpartition(".")[2] in wanted]
    ends = {name.rpartition(".")[2] for name in chosen}
    asked = {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = sorted(asked - leaves) if not isinstance(wanted, str) else sorted(asked) if not chosen else []
    if unknown:
        has = ", ".join(sorted(leaves)) or f"no linear layer at all ({type(base).__name__})"
        raise InputError(f"lora.targets: the text decoder has no layer {', '.join(unknown)}; it has {has}")
    others = {name.rpartition(".")[2] for name in set(linear) - set(chosen)}
    if not ends & others:
        return sorted(ends)
    if {name.rpartition(".")[2] for name in set(inside) - set(chosen)} & ends:
        # GPT-2's attention and MLP both have a c_proj: the layer above distinguishes them.
        ends = {re.escape(".".join(name.split(".")[-2:])) for name in chosen}
    within = rf"{re.escape(decoder)}\." if decoder else ""
    return rf"{within}.*\.({'|'.join(sorted(ends))})"


def check_fit(
    base: PreTrainedModel, folder: Path, tensors: dict[str, torch.Tensor], checked: Checked
) -> list[str] | None:
    """The names of the base's layers that an adapter sits on, where its config has patterns; None where it has plain names.

    Raises InputError for a tensor of no layer of the base, or of another size.
    """
    layers = {name: _measure(layer) for name, layer in list_linear(base).items()}
    embeddings = {
        _name_of(base, module): module for module in (base.get_input_embeddings(), base.get_output_embeddings())
    }
    for name in embeddings:
        if name not in layers:
            # LoRA sees an embedding as a layer with an input for every token.
            layers[name] = tuple(_bare(embeddings[name]).shape)
    check_sizes(folder, checked.sizes, layers)
    for key, tensor in tensors.items():
        module = re.sub(_BESIDE, "", key.removeprefix(_PREFIX))
        if module == key.removeprefix(_PREFIX):
            continue
        if module not in embeddings or tensor.shape[-1] != _bare(embeddings[module]).shape[-1]:
            raise InputError(
                f"{folder}: this adapter does not fit the base: it holds {key} of shape {list(tensor.shape)}, and the base's "
                f"embeddings are {', '.join(f'{n} {list(_bare(m).shape)}' for n, m in embeddings.items())}"
            )
    if checked.targets.is_plain:
        return None
    meant = {name for name in layers if checked.targets.matches(name)}
    if lacking := sorted(meant - set(checked.sizes)):
        raise InputError(f"{folder}: this adapter does not fit the base or its own config: it lacks {lacking[0]}")
    return sorted(checked.sizes)


_BESIDE = rf"(?<!\.lora_[AB])(\.{re.escape(ROWS)}|(\.(token_adapter\.base_layer|base_layer|modules_to_save|original_module))?\.weight)$"
"""The ends of tensors beside LoRA's: trained rows, and embeddings that were saved whole."""


def _measure(layer: torch.nn.Module) -> tuple[int, ...]:
    """Inputs and outputs of a linear layer; a quantized one's weight has another shape."""
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)
    return layer.in_features, layer.out_features  # type: ignore[return-value]


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
    """The base's own embeddings, without their wrappers."""
    return cast(torch.Tensor, getattr(embeddings, "original_module", embeddings).weight)


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
        _drop_copy(folder, f"{name}.base_layer.weight", tensors, _bare(module))
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


def _drop_copy(folder: Path, name: str, tensors: dict[str, torch.Tensor], own: torch.Tensor) -> None:
    """Drop the copy of the base's embeddings that PEFT saves with LoRA on them; raises InputError where it is another's."""
    copy = tensors.pop(name, None)
    # A base that was computed in bfloat16 there has other last digits here.
    if copy is not None and not (
        len(copy) <= len(own) and torch.allclose(own[: len(copy)].float().cpu(), copy.float(), rtol=0.02, atol=1e-3)
    ):
        raise InputError(
            f"{folder}: this adapter does not fit the base: it brings other embeddings ({name}) under its LoRA on them"
        )
