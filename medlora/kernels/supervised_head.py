"""The output head and the loss behind it: where a label is, a few positions at a time, in memory that does not grow.

With a vocabulary of 262,144 the head over all positions is most of a step, and its logits most of the memory. For
16,000 supervised tokens they are 17 GB in float32, twice with their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medlora.kernels.autograd import Context
from medlora.kernels.elementwise_cpu import log_once
from medlora.kernels.lora_forward import find_rows
from medlora.kernels.modes import in_eval_mode

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Most memory of the float32 logits that exist at a time; each chunk of any size reads the head twice."""


class HasLogits(Protocol):
    """What a causal model returns."""

    logits: torch.Tensor


class SupervisedHead:
    """A model's head for training: `at` restricts it to the supervised positions, `compute_loss` finishes its work.

    The model gives the hidden states in place of logits. Loss and gradients are computed from them chunk by chunk (as
    in Liger's fused linear cross-entropy, arXiv 2410.10989). A model that does more to its logits than the head does
    (soft capping, scaling) computes them itself, at these positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = model.get_output_embeddings()
        self.positions: torch.Tensor | None = None
        self.compute: Callable[[torch.Tensor], torch.Tensor] = self.head.forward
        self.deferred = self._is_last(model)
        self.last_layer, pointwise = _find_pointwise(model)
        # Made once: torch.compile would compile a step anew for every new function that it meets in the model.
        self.replacements: list[tuple[torch.nn.Module, Callable[..., torch.Tensor]]] = [
            (module, partial(_run_at, module.forward, self)) for module in pointwise
        ]
        if pointwise and not self._is_pointwise(model):
            self.replacements = []
        self.replacements.append((self.head, self._pick))

    @torch.no_grad()
    def _is_last(self, model: PreTrainedModel) -> bool:
        """Whether the model's logits are what its head gives, asked with one token."""
        given = torch.linspace(10, 20, 8, device=model.device)
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        try:
            with in_eval_mode(model), _replaced(self.head, lambda hidden: given.view(1, 1, 8)):
                logits = model(input_ids=ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a family does with its logits, it may do in training
            log_once(f"the logits of {type(model).__name__} are computed whole: {error}")
            return False
        return torch.equal(logits.flatten().float(), given)

    @torch.no_grad()
    def _is_pointwise(self, model: PreTrainedModel) -> bool:
        """Whether the last layer's parts may run at some positions alone, tried once a model with four tokens."""
        known = vars(self.last_layer)
        if "_medlora_pointwise" in known:
            return bool(known["_medlora_pointwise"])
        ids = torch.arange(4, device=model.device)[None]
        seen: list[torch.Tensor] = []
        self.positions = torch.tensor([1, 3], device=model.device)

        def look(hidden: torch.Tensor) -> torch.Tensor:
            assert self.positions is not None
            seen.append(hidden.flatten(0, -2).index_select(0, self.positions).float())
            return self.compute(hidden)

        try:
            for replacements in ([], self.replacements):
                with in_eval_mode(model), ExitStack() as stack:
                    for module, forward in [*replacements, (self.head, look)]:
                        stack.enter_context(_replaced(module, forward))
                    model(input_ids=ids, use_cache=False)
            tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
            same = bool((seen[0] - seen[1]).abs().max() <= tolerance * seen[0].abs().max())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as in `_is_last`
            log_once(f"the last layer of {type(model).__name__} runs at every position: {error}")
            same = False
        finally:
            self.positions = None
        known["_medlora_pointwise"] = same
        return same

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """While inside, the head sees only `positions`: indices into the flattened [rows, length] of a batch.

        So do the parts of the last layer whose outputs at other positions nobody reads. A layer that is computed again
        in the backward pass is the exception, since the positions are then no longer known.
        """
        self.positions = positions
        recomputed = getattr(self.last_layer, "gradient_checkpointing", False)
        with ExitStack() as stack:
            for module, forward in self.replacements[-1:] if recomputed else self.replacements:
                stack.enter_context(_replaced(module, forward))
            yield

    def _pick(self, hidden: torch.Tensor) -> torch.Tensor:
        """Takes the place of the head's `forward`."""
        assert self.positions is not None
        chosen = hidden.flatten(0, 1).index_select(0, self.positions)
        return chosen if self.deferred else self.compute(chosen)

    def compute_loss(
        self, outputs: HasLogits, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy summed over the positions of `at` and divided by their number in the whole accumulated batch.

        `labels` [rows, length]. A mean per micro-batch would weigh tokens of short completions more (gradients up to 4.5
        times too large).
        """
        assert self.positions is not None
        targets = labels.flatten().index_select(0, self.positions + 1)
        if self.deferred:
            total = self._sum_losses(outputs.logits, targets)
        else:
            total = torch.nn.functional.cross_entropy(outputs.logits.float(), targets, reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else max(len(targets), 1))

    def _sum_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = self.head.weight if isinstance(self.head, torch.nn.Linear) else None
        rows = values = None
        if isinstance(self.head, TrainableTokensWrapper):
            inner = self.head.token_adapter.base_layer.weight
            assert isinstance(inner, torch.Tensor)
            weight = inner
            rows, values = find_rows(self.head.token_adapter)
        vocabulary = self.head.original_module.weight.shape[0] if weight is None else weight.shape[0]
        most = max(1, CHUNK_BYTES.get(hidden.device.type, 2**30) // (4 * vocabulary))
        chunks = max(1, math.ceil(len(hidden) / most))
        size = max(1, math.ceil(len(hidden) / chunks))  # all alike: a last one of a few positions would cost as much
        if weight is not None and not weight.requires_grad and getattr(self.head, "bias", None) is None:
            lean: torch.Tensor = _ChunkedLoss.apply(hidden, weight, targets, rows, values, size)
            return lean
        total = hidden.sum() * 0.0
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            total = total + checkpoint(self._sum_plain, part, wanted, use_reentrant=False)
        return total

    def _sum_plain(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.compute(hidden).float(), targets, reduction="sum")


@contextmanager
def _replaced(module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _find_pointwise(model: PreTrainedModel) -> tuple[torch.nn.Module | None, list[torch.nn.Module]]:
    """The last layer of a model's decoder, and the parts of it whose output at a position is read there alone.

    These are its queries, the product behind attention, and the MLP; none where a layer is more than norms, attention and
    an MLP of its own.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    last = layers[-1] if layers else None
    parts = {name: part for name, part in last.named_children()} if last is not None else {}
    attention, mlp = parts.pop("self_attn", None), parts.pop("mlp", None)
    found = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), mlp]
    known = hasattr(mlp, "down_proj") and all(type(part).__name__.endswith("RMSNorm") for part in parts.values())
    return last, found if known and None not in found else []


def _run_at(forward: Callable[[torch.Tensor], torch.Tensor], head: SupervisedHead, x: torch.Tensor) -> torch.Tensor:
    """`forward` at the head's positions of the flattened x [rows, length, size]; zeros elsewhere."""
    if torch.compiler.is_compiling():
        return forward(x)
    assert head.positions is not None
    rows = x.flatten(0, -2)
    out = forward(rows.index_select(0, head.positions)[None])[0]
    whole = out.new_zeros(len(rows), out.shape[-1]).index_copy(0, head.positions, out)
    return whole.view(*x.shape[:-1], -1)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden` [n, size] through a frozen head `weight` [vocabulary, size], gradients at once.

    Where `rows` [r] are given, these rows of the vocabulary are `values` [r, size] instead, which get a gradient too. One
    product for the logits of a chunk, one for the gradient of its hidden states; nothing of a chunk is stored.
    """

    @staticmethod
    def forward(
        ctx: Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: torch.Tensor | None,
        values: torch.Tensor | None,
        size: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        trained = None if values is None else values.detach().to(weight.dtype)
        change = None if trained is None else trained - weight[rows]
        values_gradient = torch.zeros_like(values) if values is not None and ctx.needs_input_grad[4] else None
        exact = hidden.dtype == weight.dtype == torch.float32
        shape = (min(size, len(hidden)), weight.shape[0])
        buffer = torch.empty(shape, device=hidden.device) if exact else None
        for start in range(0, len(hidden), size):
            part, wanted = hidden[start : start + size].to(weight.dtype), targets[start : start + size, None]
            if buffer is not None:
                logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            else:
                logits = (part @ weight.T).float()
            if trained is not None and rows is not None:
                logits.index_copy_(1, rows, (part @ trained.T).float())
            highest = logits.amax(1, keepdim=True)
            aimed = logits.gather(1, wanted)
            # Softmax in place reads and writes a row while it is in the cache; its value at the highest logit is never 0.
            shares = torch.softmax(logits, 1, out=logits) if buffer is not None else logits.softmax(1)
            total += (highest - shares.amax(1, keepdim=True).log() - aimed).sum()
            if not ctx.needs_input_grad[0]:
                continue
            shares.scatter_add_(1, wanted, torch.full_like(aimed, -1.0))
            shares = shares.to(weight.dtype)
            back = shares @ weight
            if change is not None and rows is not None:
                of_rows = shares.index_select(1, rows)
                back.addmm_(of_rows, change)
                if values_gradient is not None:
                    values_gradient += (of_rows.T @ part).to(values_gradient.dtype)
            gradient[start : start + size] = back
        ctx.save_for_backward(gradient, values_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, values_gradient = ctx.saved_tensors
        to_values = None if values_gradient is None else values_gradient * upstream
        return gradient * upstream, None, None, None, to_values, None
