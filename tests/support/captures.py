"""What stands for CUDA's graphs where there is no CUDA, and what shows that a step could be one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medlora.answering.cuda.decoder import Decoder

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
"""Operations whose result the host waits for: none may be in a captured step."""


class Recorder(TorchDispatchMode):
    """The operations of a step: names, host arguments, and which memory outside of the step they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, ...]] = []
        self.made: dict[int, Any] = {}  # held, so that no address is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line: list[Any] = [str(func)]
        inputs = set()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                place = leaf.untyped_storage().data_ptr()
                inputs.add(place)
                held = place if place not in self.made else "made"
                line.append((held, leaf.shape, leaf.stride(), leaf.storage_offset()))
            else:
                line.append(repr(leaf))
        self.lines.append(tuple(line))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in inputs:
                self.made[leaf.untyped_storage().data_ptr()] = leaf
        return out

    def list_asking(self) -> list[str]:
        """The operations that ask the device for a value."""
        return sorted({line[0] for line in self.lines if any(word in line[0] for word in ASKING)})


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ASKING):
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


class Frozen:
    """Stands for CUDA's graphs: runs a step with the host values of its capture, so that a wrong key shows in the tokens."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Refusing():
            yield

    def record(self, decoder: Decoder) -> Callable[[], None]:
        assert decoder.lanes is not None
        rows, lanes, columns = decoder.rows, decoder.lanes, decoder.lanes.places.columns
        layers = [module for module in decoder.model.modules() if isinstance(module, BaseTunerLayer)]
        adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]

        def replay() -> None:
            assert decoder.lanes is lanes, "a graph outlived its lanes"
            assert all(list(m.active_adapters) == a and m.disable_adapters == d for m, a, d in adapters), (
                "another stage"
            )
            assert (decoder.rows, lanes.places.columns) == (rows, columns), "another shape"
            decoder.compute_step()

        return replay
