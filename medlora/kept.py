"""What a process keeps that trains one phase after another: the tokenizer, the rows, the base with its weights.

A phase that is trained with them ends with the same bytes as one in a fresh process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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
        return copy.deepcopy(whole.model, {id(tensor): tensor for tensor in whole.tensors})


class _Frozen:
    """A model nobody works with, and how often each of its tensors had been written to when it came."""

    def __init__(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            # bitsandbytes moves an int8 layer's weights from the parameter, which copies share, to the layer in its first pass.
            if getattr(getattr(module, "weight", None), "CB", None) is not None:
                module.init_8bit_state()
        self.model = model
        self.tensors = list({id(tensor): tensor for tensor in _find_tensors(model)}.values())
        self.versions = [tensor._version for tensor in self.tensors]

    def is_changed(self) -> bool:
        """Whether any of the tensors was written to since."""
        return [tensor._version for tensor in self.tensors] != self.versions


def _find_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = vars(module).get("state")  # of an int8 layer
        yield from (value for value in vars(state).values() if torch.is_tensor(value)) if state is not None else ()
