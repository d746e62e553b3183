"""What torch hands to both halves of an autograd Function, as far as the kernels read it."""

from __future__ import annotations

from typing import Protocol

import torch


class Context(Protocol):
    """The `ctx` of a Function; a kernel that puts more on it extends this."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Save tensors for the backward pass."""
