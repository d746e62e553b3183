"""The tokens that many prompts share, computed once and reused as KV cache by every batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelInputs(TypedDict):
    """What a batch is asked with."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    use_cache: bool
    past_key_values: NotRequired[DynamicCache]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of `ids` in every layer, each [1, heads, len(ids), head_dim]; never written to."""

    ids: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def share_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The longest run of tokens that all rows begin with."""
    shortest, longest = min(rows), max(rows)
    for i, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b:
            return list(shortest[:i])
    return list(shortest)


def split_by_prefix(rows: Sequence[Sequence[int]], prefix: Prefix | None) -> list[tuple[Prefix | None, list[int]]]:
    """Places of the rows that begin with the prefix, and of the others; an empty group is left out."""
    if prefix is None:
        return [(None, list(range(len(rows))))]
    n = len(prefix.ids)
    beginning = [i for i, row in enumerate(rows) if len(row) > n and tuple(row[:n]) == prefix.ids]
    rest = sorted({*range(len(rows))} - {*beginning})
    return [(shared, places) for shared, places in ((prefix, beginning), (None, rest)) if places]


def can_reuse(model: PreTrainedModel) -> bool:
    """Whether every layer caches plain keys and values, in a sliding window or not (recurrent layers do not)."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers} <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }


def identify_weights(model: PreTrainedModel) -> tuple[object, ...]:
    """Differs whenever the model computes something else: another stage is active, or a weight was written to."""
    switches = tuple(
        (tuple(module.active_adapters), module.disable_adapters)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    return switches, tuple((id(weight), weight._version) for weight in model.parameters())


@torch.no_grad()
def compute_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """Run `ids` through the model and cache all keys and values, also those that sliding windows would drop."""
    # Without the config every layer of the cache is a full one; the masks still apply the windows.
    cache = DynamicCache()
    batch = torch.tensor([list(ids)], device=model.device)
    compute_last_logits(model, input_ids=batch, past_key_values=cache, use_cache=True)
    return Prefix(tuple(ids), tuple((layer.keys, layer.values) for layer in _list_plain(cache)))


class _PlainLayer(Protocol):
    """A layer of a cache that holds plain keys and values."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> object:
        """Append to both."""


def _list_plain(cache: DynamicCache) -> list[_PlainLayer]:
    """The layers of a cache of a model that `can_reuse`."""
    return cast(list[_PlainLayer], cache.layers)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that extends `cache` without changing it: its layers make new tensors when they grow."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        # Recurrent layers store their states in dicts.
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return copied


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Reduce the cache to these rows, in this order."""
    for layer in cache.layers:
        # transformers 5.23 selects keys and values alone; reordering takes a recurrent layer's states along.
        name = "reorder_cache" if hasattr(layer, "recurrent_states") else "batch_select_indices"
        getattr(layer, name)(rows)


def compute_last_logits(model: PreTrainedModel, **inputs: object) -> torch.Tensor:
    """The logits after the last column, [rows, vocabulary]; the head is computed only there.

    The slice that `logits_to_keep` takes is not contiguous, so torch would read the whole head once a row (bmm). We make it
    contiguous, and the head is read once.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        logits: torch.Tensor = model(**inputs, logits_to_keep=1).logits
        return logits[:, -1]
    finally:
        hook.remove()


def make_batch(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    prefix: Prefix | None = None,
    use_cache: bool = True,
) -> ModelInputs:
    """The model's inputs for `rows`, all ending in the last column; with `prefix`, what rows begin with comes from it.

    The cache holds the first len(prefix) columns of the left-padded batch. A row that is shorter than the longest has
    its prefix shifted right by the difference. Its padding comes first, and the end of its prefix is computed again in
    place of padding. Neighbours stay neighbours, which is what sliding windows count. Padding is always masked.
    """
    device = model.device
    longest = max(map(len, rows))
    pads = torch.tensor([longest - len(row) for row in rows], device=device)
    cached = len(prefix.ids) if prefix else 0
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    columns = torch.arange(longest, device=device)
    batch: ModelInputs = {
        "input_ids": torch.tensor([row[cached:] for row in ids], device=device),
        "attention_mask": (columns >= pads[:, None]).long(),
        "position_ids": (columns[cached:] - pads[:, None]).clamp(min=0),
        "use_cache": use_cache,
    }
    if use_cache:
        batch["past_key_values"] = cache = DynamicCache(config=model.config)
    if prefix:
        sources = (columns[:cached] - pads[:, None]).clamp(min=0)
        for layer, tensors in zip(_list_plain(cache), prefix.layers, strict=True):
            if pads.any():
                layer.update(*(tensor[0][:, sources].transpose(0, 1) for tensor in tensors))
            else:
                layer.update(*(tensor.expand(len(rows), -1, -1, -1) for tensor in tensors))
    return batch
