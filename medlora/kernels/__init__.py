"""Faster forward and backward passes; they import nothing of medlora."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

# The torch packages all import this one first, and PEFT imports bitsandbytes. It reports at every int8 product that it
# computes in float16, and on newer CPUs that it lacks a kernel package that needs the hub. Neither can be acted on.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes with its compiled functions compiled at their first call.

    It asks torch for them at import, and torch then loads its compiler: 0.9 s of every worker that never calls them.
    """
    compile_now = torch.compile

    def compile_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now


def _import_losses() -> None:
    """Import transformers' losses without scipy: those for objects in pictures want its optimiser, 0.4 s of every worker."""
    from transformers import utils

    names = vars(utils)
    is_scipy_available = names["is_scipy_available"]
    names["is_scipy_available"] = lambda: False
    try:
        import transformers.loss.loss_utils  # noqa: F401
    finally:
        names["is_scipy_available"] = is_scipy_available


_import_bitsandbytes()
_import_losses()
