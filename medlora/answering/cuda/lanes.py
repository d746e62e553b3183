"""Keys and values at addresses that stay: what a captured step reads and writes.

Every layer holds all columns. Sliding windows are kept by the masks, so that nothing moves and no number of the host takes part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_masks_for_generate

from medlora.answering.prefix_cache import Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Masks = torch.Tensor | dict[str, torch.Tensor]
"""Numbers to add to scores [rows, 1, queries, columns]: one for all layers, or one for each kind of layer."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Places:
    """Where the next token goes: `filled` on the host before decoding, `column` on the device while decoding."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.most_rows, self.most_columns = rows, columns
        self.decoding, self.filled, self.columns = False, 0, columns
        self.column = torch.zeros(1, dtype=torch.long, device=device)


class _Lane(CacheLayerMixin):
    """One layer's keys and values, each [rows, heads, columns, size]."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate all columns of all rows."""
        shape = self.places.most_rows, key_states.shape[1], self.places.most_columns
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: object, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what a forward pass has computed; what its queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places, rows = self.places, len(key_states)
        if places.decoding:
            keys, values = self.keys[:rows, :, : places.columns], self.values[:rows, :, : places.columns]
            keys.index_copy_(2, places.column, key_states)
            values.index_copy_(2, places.column, value_states)
            return keys, values
        start, stop = places.filled, places.filled + key_states.shape[2]
        self.keys[:rows, :, start:stop] = key_states
        self.values[:rows, :, start:stop] = value_states
        return self.keys[:rows, :, :stop], self.values[:rows, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns a pass sees, and the first of them."""
        return self.places.filled + query_length, 0

    def get_seq_length(self) -> int:
        """How many columns are filled."""
        return self.places.filled

    def get_max_length(self) -> int:
        """How many there are."""
        return self.places.most_columns


class Lanes(Cache):
    """Keys and values of all layers for up to `rows` rows of `columns` tokens, at addresses that stay."""

    def __init__(self, layers: int, rows: int, columns: int, device: torch.device) -> None:
        self.places = Places(rows, columns, device)
        super().__init__(layers=[_Lane(self.places) for _ in range(layers)])

    def list_lanes(self) -> list[_Lane]:
        """One a layer."""
        return cast(list[_Lane], self.layers)

    def restart(self, rows: int, columns: int) -> None:
        """As new, for so much; what the last batch left is cleared, since 0 x NaN is NaN even where a mask says 0."""
        self.places.decoding, self.places.filled = False, 0
        for lane in self.list_lanes():
            if lane.is_initialized:
                lane.keys[:rows, :, :columns].zero_()
                lane.values[:rows, :, :columns].zero_()

    def put_prefix(self, prefix: Prefix, pads: torch.Tensor, shifted: bool) -> None:
        """The prefix in the first columns of every row, shifted right by its padding (see `prefix_cache.make_batch`)."""
        rows, cached = len(pads), len(prefix.ids)
        sources = (torch.arange(cached, device=pads.device) - pads[:, None]).clamp(min=0)
        for lane, tensors in zip(self.list_lanes(), prefix.layers, strict=True):
            if not lane.is_initialized:
                lane.lazy_initialization(*tensors)
            for kept, tensor in zip((lane.keys, lane.values), tensors, strict=True):
                kept[:rows, :, :cached] = tensor[0][:, sources].transpose(0, 1) if shifted else tensor
        self.places.filled = cached

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Move these rows to the front, in this order."""
        filled = self.places.filled
        for lane in self.list_lanes():
            for kept in (lane.keys, lane.values):
                kept[: len(rows), :, :filled] = kept[rows, :, :filled]


def find_mask_kinds(model: PreTrainedModel) -> tuple[str, ...] | str:
    """The kinds of masks that a model takes ready-made: a dict by these names, or one mask of that kind.

    Raises NotImplementedError where a layer is neither full nor sliding attention.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "attention_chunk_size", None):
            raise NotImplementedError("its attention is chunked")
        return _SLIDING if getattr(config, "sliding_window", None) else _FULL
    if other := {*kinds} - {_FULL, _SLIDING}:
        raise NotImplementedError(f"it has layers of other kinds ({', '.join(sorted(other))})")
    made = create_masks_for_generate(
        config=config,
        inputs_embeds=torch.empty(1, 1, 0),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
    )
    if not isinstance(made, dict):
        raise NotImplementedError("it takes no masks by kind of layer")
    return tuple(made)


def make_masks(
    kinds: tuple[str, ...] | str, places: Places, pads: torch.Tensor, window: int | None, dtype: torch.dtype
) -> Masks:
    """What the queries at `places.column` see of rows with `pads` [rows] columns of padding before them."""
    columns = torch.arange(places.columns, device=pads.device)
    hidden = (columns > places.column) | (columns < pads[:, None])
    return mask_out(kinds, hidden[:, None, None], places.column - columns, window, dtype)


def mask_out(
    kinds: tuple[str, ...] | str, hidden: torch.Tensor, distance: torch.Tensor, window: int | None, dtype: torch.dtype
) -> Masks:
    """Masks of these kinds that hide `hidden` [rows, 1, queries, columns], and in a window what is too distant.

    As numbers to add, made once a step: SDPA would turn a mask of booleans into them in every layer.
    """
    masks = {}
    for kind in (kinds,) if isinstance(kinds, str) else kinds:
        out = hidden | (distance >= window) if kind == _SLIDING and window is not None else hidden
        masks[kind] = out.new_zeros(out.shape, dtype=dtype).masked_fill_(out, -torch.inf)
    return masks[kinds] if isinstance(kinds, str) else masks
