"""Group rows of similar length into batches within a token budget that fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from medlora import pulse
from medlora.kernels.memory import clear_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


CPU_TOKENS = 800
"""Tokens of a forward pass on CPU: at 2,048 a Gemma-3-270M takes a fifth longer, as activations leave the caches."""


_MOST_TOKENS, _SHARE = 65_536, 0.6

MOST_PADDING, LEAST_TOKENS = 0.1, 8192
"""A padded batch on a GPU ends where more than this share of it would be padding, once it has so many tokens."""

MOST_ROWS = 256
"""Rows that a GPU writes at a time: from there on, reading keys and values takes longer than reading the weights."""


class Batcher:
    """Groups rows by length into batches of at most `tokens` tokens, padding counted; at least one row each.

    A batch has at most `most_rows` rows, and with `cuts` it ends where padding would waste it. When the device runs out of
    memory, it halves its budget, logs that once, and continues.
    """

    def __init__(self, tokens: int, most_rows: int | None = None, cuts: bool = False) -> None:
        self.tokens, self.most_rows, self.cuts = tokens, most_rows, cuts
        self._warned = False

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        """Call `work` with the places of the rows of each batch, the longest first, until every row was in one.

        Raises torch.OutOfMemoryError when one row alone does not fit.
        """
        waiting = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        while waiting:
            longest = max(lengths[waiting[0]], 1)
            most = max(min(self.tokens // longest, self.most_rows or len(waiting)), 1)
            batch = waiting[:most]
            if self.cuts:
                batch = batch[: count_unpadded([lengths[i] for i in batch])]
            try:
                work(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens = len(batch) * longest // 2
                if self.most_rows is not None:
                    self.most_rows = len(batch) // 2
                if not self._warned:
                    log.warning("out of memory with %d rows of %d tokens: the batch is halved", len(batch), longest)
                    self._warned = True
            else:
                pulse.beat()
                waiting = waiting[len(batch) :]
                continue
            clear_memory()  # outside of `except`, where the traceback would keep the batch's tensors alive


def count_unpadded(lengths: Sequence[int], most_padding: float = MOST_PADDING, least_tokens: int = LEAST_TOKENS) -> int:
    """How many of the rows, the longest first, make a batch that is at most so far padding.

    A batch of fewer than `least_tokens` is not cut: the device would not be busy with it.
    """
    longest, useful = max(lengths[0], 1), 0
    for n, length in enumerate(lengths):
        useful += length
        if n * longest >= least_tokens and useful < (1 - most_padding) * (n + 1) * longest:
            return n
    return len(lengths)


def find_token_budget(
    model: PreTrainedModel, row_tokens: int, cached_tokens: int, head_positions: int, copies: int = 2
) -> int:
    """Tokens per forward pass that fit into 0.6 of the device's free memory; CPU_TOKENS without a GPU.

    `row_tokens` are computed per row, `cached_tokens` are its keys and values in the end, `head_positions` are those
    where the head is computed. Counts keys and values `copies` times (growing copies them), the widest activations, and
    logits in the model's type and in float32.
    """
    device = torch.device(model.device)
    if device.type != "cuda":
        return CPU_TOKENS
    config = model.config.get_text_config()
    size = torch.finfo(model.dtype).bits // 8
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv_bytes = copies * 2 * config.num_hidden_layers * kv_heads * head_dim * size
    # Residual, norms in float32, queries and repeated keys, gate / up / product of the MLP.
    wide = 6 * config.hidden_size + 4 * config.num_attention_heads * head_dim + 3 * config.intermediate_size
    row_bytes = row_tokens * wide * 4 + cached_tokens * kv_bytes + head_positions * config.vocab_size * (size + 8)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rows = max(int(_SHARE * free / row_bytes), 1)
    return max(min(rows * row_tokens, _MOST_TOKENS), row_tokens)
