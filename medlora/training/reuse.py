"""Parts that consecutive phases of one process share: the tokenizer, the rows, the base model.

A phase that reuses them ends with the same bytes as one in a fresh process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from transformers import PreTrainedModel

from medlora.curriculum.jobs import PhaseJob

Part = TypeVar("Part")


class ReusedParts:
    """The last part of each kind, with what it was made from; only the last one, since a base may fill a GPU."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[object, object]] = {}

    def get(self, kind: str, made_from: object, make: Callable[[], Part]) -> Part:
        """The part of that kind if it was made from the same; else a new one, after the old one is released."""
        if kind not in self.parts or self.parts[kind][0] != made_from:
            self.parts.pop(kind, None)
            self.parts[kind] = (made_from, make())
        return cast(Part, self.parts[kind][1])

    def borrow_base(self, made_from: object, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The base as new modules on the reused weights, so adapters added to it leave nothing behind.

        Weights that were written to, which training never does, are loaded again.
        """
        if (part := self.parts.get("base")) and isinstance(part[1], _Frozen) and part[1].is_changed():
            del self.parts["base"]
        whole: _Frozen = self.get("base", made_from, lambda: _Frozen(load()))
        return whole.lend()


class _Frozen:
    """A model that nobody trains, and how often each of its tensors had been written to when it was loaded."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tensors = [*model.parameters(), *model.buffers()]
        self.versions = [tensor._version for tensor in self.tensors]

    def is_changed(self) -> bool:
        """Whether any of the tensors was written to since."""
        return [tensor._version for tensor in self.tensors] != self.versions

    def lend(self) -> PreTrainedModel:
        """A copy of the modules on the same weights."""
        return copy.deepcopy(self.model, {id(tensor): _share(tensor) for tensor in self.tensors})


def _share(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself. An int8 layer's first pass takes the weights out of its parameter, so it gets another parameter."""
    if not hasattr(tensor, "SCB"):
        return tensor
    from bitsandbytes.nn import Int8Params

    again: torch.Tensor = Int8Params(
        tensor.data,
        requires_grad=False,
        has_fp16_weights=False,
        CB=tensor.CB,  # type: ignore[attr-defined]
        SCB=tensor.SCB,
    )
    return again


def describe_tokenizer(job: PhaseJob) -> list[object]:
    """What the tokenizer of a phase depends on."""
    extended = job.phase.chain == "new" and job.phase.train_extra_tokens
    return [
        job.fingerprint["base"],
        job.fingerprint["base_files"],
        job.fingerprint["parent"],
        job.phase.chain,
        extended,
    ]


def describe_rows(job: PhaseJob, tokenizer_hash: str) -> dict[str, object]:
    """What the rows of a phase depend on."""
    phase = job.phase.model_dump(mode="json", include={"name", "sources", "replay", "max_tokens", "packing"})
    rest = job.model_dump(mode="json", include={"replayed", "dropped", "seed", "cache"})
    return phase | rest | {name: job.fingerprint[name] for name in ("data", "prompts")} | {"tokenizer": tokenizer_hash}


def describe_base(job: PhaseJob, tokenizer_hash: str, device: str) -> list[object]:
    """What the base model of a phase, as it is loaded, depends on."""
    return [job.fingerprint["base"], job.fingerprint["base_files"], tokenizer_hash, device]
