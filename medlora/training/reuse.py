"""What a process keeps that trains one phase after another: the tokenizer, the rows, the base with its weights.

A phase that is trained with them ends with the same bytes as one in a fresh process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


class Kept:
    """Things by kind, each with what it was made from; of every kind the last one alone, since a base may fill a GPU."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, Any]] = {}

    def get(self, kind: str, made_from: Any, make: Callable[[], Any]) -> Any:
        """What is kept of that kind, where it was made from the same; else made now, the old one let go first."""
        if kind not in self.held or self.held[kind][0] != made_from:
            self.held.pop(kind, None)
            self.held[kind] = (made_from, make())
        return self.held[kind][1]

    def borrow_base(self, made_from: Any, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The base with modules of its own and the weights that are kept: adapters that are put on it leave nothing behind.

        Weights that were written to, which training never does, are loaded again.
        """
        if (held := self.held.get("base")) and held[1].is_changed():
            del self.held["base"]
        whole: _Frozen = self.get("base", made_from, lambda: _Frozen(load()))
        return whole.lend()


class _Frozen:
    """A model nobody works with, and how often each of its tensors had been written to when it came."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tensors = [*model.parameters(), *model.buffers()]
        self.versions = [tensor._version for tensor in self.tensors]

    def is_changed(self) -> bool:
        """Whether any of the tensors was written to since."""
        return [tensor._version for tensor in self.tensors] != self.versions

    def lend(self) -> torch.nn.Module:
        """The model with modules of its own on the same weights."""
        return copy.deepcopy(self.model, {id(tensor): _share(tensor) for tensor in self.tensors})


def _share(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of an int8 layer, whose first pass takes the weights out of its parameter, another parameter on them."""
    if not hasattr(tensor, "SCB"):
        return tensor
    from bitsandbytes.nn import Int8Params

    return Int8Params(tensor.data, requires_grad=False, has_fp16_weights=False, CB=tensor.CB, SCB=tensor.SCB)
