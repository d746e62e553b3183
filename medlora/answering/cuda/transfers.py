"""Numbers on their way to and from the device while it goes on working."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on the device; the host does not wait for what the device is doing."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch_later(tensor: torch.Tensor) -> Callable[[], list[Any]]:
    """The values of a tensor as they are now, as nested lists; calling what is returned waits for them alone."""
    if tensor.device.type != "cuda":
        kept = tensor.clone()
        return kept.tolist
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[Any]:
        event.synchronize()
        values: list[Any] = pinned.tolist()
        return values

    return wait
