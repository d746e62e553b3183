"""LoRA branches prepared once a stage: A and scaled B of all active adapters in the type that the base computes in.

PEFT keeps adapters in float32 over a base in bfloat16. It would cast every input, scale and add every branch, and cast the
output, at every layer of every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer

from medlora.answering.prefix_cache import identify_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Forward = Callable[..., torch.Tensor]


@dataclass(eq=False)
class PreparedStage:
    """The forward passes of the LoRA layers of one stage; two stages are never equal."""

    forwards: list[tuple[torch.nn.Module, Forward]]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While inside, the layers compute with what was prepared; nothing may be trained."""
        own = [(module, vars(module).get("forward")) for module, _ in self.forwards]
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, before in own:
                if before is None:
                    del module.forward
                else:
                    module.forward = before


class PreparedAdapters:
    """The prepared stages of one model, each made when it is first asked for, all dropped when a weight changes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.stages: dict[object, PreparedStage] = {}
        self._weights: object = None
        self._warned = False

    def find(self) -> PreparedStage:
        """The stage that is active now."""
        switches, versions = identify_weights(self.model)
        weights = versions, tuple(weight.data_ptr() for weight in self.model.parameters())
        if weights != self._weights:
            self.stages.clear()
            self._weights = weights
        if switches not in self.stages:
            stage = PreparedStage(_prepare(self.model))
            self.stages[switches] = stage if self._agrees(stage) else PreparedStage([])
        return self.stages[switches]

    @torch.no_grad()
    def _agrees(self, stage: PreparedStage) -> bool:
        """Whether a few tokens have the same logits with what was prepared; if not, it is said once."""

        def compute() -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits.float()

        ids = torch.arange(3, 8, device=self.model.device)[None]
        expected = compute()
        with stage.installed():
            found = compute()
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        if (found - expected).abs().max() <= tolerance * expected.abs().max():
            return True
        if not self._warned:
            log.warning("adapters are not prepared: with them, %s gives other logits", type(self.model).__name__)
            self._warned = True
        return False

    def release(self) -> None:
        """Give the memory back."""
        self.stages.clear()


@torch.no_grad()
def _prepare(model: PreTrainedModel) -> list[tuple[torch.nn.Module, Forward]]:
    """A forward pass for every plain LoRA layer; layers of other kinds (DoRA, biases, Conv1D) keep their own."""
    forwards: list[tuple[torch.nn.Module, Forward]] = []
    for module in model.modules():
        if not isinstance(module, LoraLayer) or not isinstance(module, torch.nn.Module) or module.merged:
            continue
        base = module.get_base_layer()
        keys = [key for key in module.active_adapters if key in module.lora_A]
        if not isinstance(base, torch.nn.Linear) or any(
            key in module.lora_variant or module.lora_bias[key] for key in keys
        ):
            continue
        if module.disable_adapters or not keys:
            forwards.append((module, base.__call__))
            continue
        layer: Any = module  # PEFT's containers have no types
        pairs: list[tuple[torch.Tensor, torch.Tensor, float]] = [
            (layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key]) for key in keys
        ]
        a = torch.cat([each for each, _, _ in pairs]).to(model.dtype)
        b = torch.cat([each * scale for _, each, scale in pairs], dim=1).to(model.dtype)
        forwards.append((module, partial(_add_branch, module, base, a, b)))
    return forwards


def _add_branch(
    layer: torch.nn.Module,
    base: torch.nn.Linear,
    a: torch.Tensor,
    b: torch.Tensor,
    x: torch.Tensor,
    *arguments: object,
    **options: object,
) -> torch.Tensor:
    """What the base gives plus x A' B'; where the types are others, what PEFT gives."""
    if x.dtype != a.dtype or arguments or options:
        plain: torch.Tensor = type(layer).forward(layer, x, *arguments, **options)
        return plain
    out: torch.Tensor = base(x)
    if out.dtype != a.dtype:
        return out + (x @ a.T @ b.T).to(out.dtype)
    thin = torch.nn.functional.linear(x.flatten(0, -2), a)
    return out.flatten(0, -2).addmm_(thin, b.T).view(out.shape)
