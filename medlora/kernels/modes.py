"""Training and eval mode of every module, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keeping_modes(model: torch.nn.Module) -> Iterator[None]:
    """Put every module of a model back into the mode, training or eval, that it has now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The whole model in eval mode while inside; then every module has its own mode back."""
    with keeping_modes(model):
        model.eval()
        yield
