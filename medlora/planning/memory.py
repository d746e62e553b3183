"""The memory that a phase takes, by a formula, and what follows from it: rows of a pass, quantization, too small cards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medlora.artifacts.bases import find_base_folder
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import SettledPhase
from medlora.config.placement import Placement
from medlora.config.run import RunConfig
from medlora.errors import InputError
from medlora.miniature import settings
from medlora.planning.figures import RunPlan
from medlora.planning.sizes import BaseShape, count_lora, read_shape

HEAD_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Most memory of the head's logits at a time, as `kernels.supervised_head` has it."""

MOST_SAVED_KEYS = 1024
"""Attention on CPU saves its probabilities for rows up to so many tokens, as `kernels.attention` has it."""

USABLE = 0.85
"""Share of a card's memory that a step may take, as the dry run of `training.memory_fit` has it."""

CARD_GIB = {
    **{
        "T4": 16,
        "L4": 24,
        "A10G": 24,
        "L40S": 48,
        "A100-40G": 40,
        "A100-80G": 80,
        "H100": 80,
        "H200": 141,
        "B200": 180,
    },
    **{"RTX-A6000": 48},
}
"""Memory of accelerators by Ray's names for them, as their maker says."""


class Longest(NamedTuple):
    """The largest sizes among the rows of a phase, in tokens."""

    row: int
    document: int
    """Attention stays within a document; packed rows hold several."""


def estimate_memory(
    shape: BaseShape,
    phase: SettledPhase,
    quantization: str,
    lora: LoraSettings,
    trainable: int,
    frozen: int,
    longest: Longest,
    device: str,
) -> dict[str, int]:
    """Bytes of one worker by part; activations are a formula for gated decoders, all else is counted.

    Mixed precision on CUDA: the base in 2 bytes, adapters in float32. On CPU everything is float32.
    """
    size = 2 if device == "cuda" else 4
    in_layers = sum(a * b for a, b in shape.linear.values())
    stored = {"none": size, "int8": 1, "nf4": 0.516}[quantization]
    small = phase.optimizer == "paged_adamw_8bit"
    tokens = phase.batch_size * longest.row
    # The chunk's logits; on CUDA in float32 twice, once for their softmax, and in bfloat16.
    chunk = min(HEAD_CHUNK_BYTES[device], 4 * shape.vocabulary * tokens)
    return {
        "base": round(in_layers * stored + (shape.parameters - in_layers) * size),
        "adapters": 4 * (trainable + frozen),
        "gradients": 4 * trainable,
        "optimiser": (2 if small else 8) * trainable,
        "activations": round(tokens * _count_activations(shape, phase, lora, frozen, longest.document, device)),
        "head": round(chunk * (2.5 if device == "cuda" else 1)),
    }


def _count_activations(
    shape: BaseShape, phase: SettledPhase, lora: LoraSettings, frozen: int, document: int, device: str
) -> float:
    """Bytes that a token leaves for the backward pass, or, with recomputation, at the height of one layer's."""
    size, widths = 2 if device == "cuda" else 4, _Widths.read(shape)
    ranks = len(shape.choose(lora.targets)) * lora.r * (1 + frozen / max(count_lora(shape, lora), 1)) / shape.layers
    layer = widths.count_saved(shape, size) + size * ranks
    if lora.dropout:
        layer += widths.count_dropped(device)
    if device == "cpu" and document <= MOST_SAVED_KEYS:
        layer += size * document * shape.heads  # the probabilities of attention
    # The norm before the head, what the head reads, and the rotary positions' cosines and sines, which layers share.
    shared = size * (2 * shape.hidden + 2 * shape.rotations * widths.head_size)
    if phase.gradient_checkpointing is True:
        return size * shape.hidden * shape.layers + layer + shared
    # The last layer's queries, attention and MLP are computed where labels are, and copied to their places.
    return layer * shape.layers + shared + size * (widths.queries + 2 * shape.hidden)


@dataclass(frozen=True)
class _Widths:
    """How wide the parts of a gated decoder's layer are."""

    hidden: int
    queries: int
    keys: int
    inner: int
    head_size: int
    """Of queries and keys; 0 where the number of heads is unknown."""

    @classmethod
    def read(cls, shape: BaseShape) -> _Widths:
        by_name = {name.rpartition(".")[2]: pair for name, pair in shape.linear.items()}
        queries = by_name.get("o_proj", (shape.hidden, 0))[0]
        keys = by_name.get("k_proj", (0, queries))[1]
        inner = by_name.get("down_proj", (4 * shape.hidden, 0))[0]
        return cls(shape.hidden, queries, keys, inner, queries // shape.heads if shape.heads else 0)

    def count_saved(self, shape: BaseShape, size: int) -> int:
        """Bytes that a token leaves for the backward pass in a layer, as `medlora.kernels` saves them.

        A norm saves what it normalises and its root, in float32. A linear layer saves what it reads: once where q, k and
        v, or gate and up, read the same. Attention saves queries, keys, values and its output, which the product behind it
        reads; a gated MLP its gate, its up and their product.
        """
        saved = (2 + shape.norms) * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.inner
        if not shape.head_norms:
            return size * saved + 4 * shape.norms
        heads = (self.queries + self.keys) // self.head_size if self.head_size else 0
        return size * (saved + self.queries + self.keys) + 4 * (shape.norms + heads)

    def count_dropped(self, device: str) -> int:
        """Bytes that dropout adds in a layer whose seven linear layers have an adapter.

        On CUDA a mask of a byte for each input that layers share, and in bfloat16 another copy of what attention has saved
        already. On CPU PEFT gives each layer a mask and a copy of its own in float32, and no layer saves its input itself.
        """
        if device == "cuda":
            return 2 * self.hidden + self.queries + self.inner + 2 * self.queries
        return 4 * (8 * self.hidden + self.queries + self.inner)


def name_stored(base: BaseModelConfig) -> str:
    """The quantization in which a base's weights lie in memory."""
    return "none" if base.dequantize else base.quantization


def choose_pass(
    shape: BaseShape,
    phase: SettledPhase,
    quantization: str,
    lora: LoraSettings,
    adapters: tuple[int, int],
    longest: Longest,
    card_gib: float | None,
) -> SettledPhase:
    """The phase on CUDA with the pass that `batch_size: auto` will about take on a card; of one row on an unknown card.

    `adapters` are the trained and the frozen parameters.
    """
    total = phase.batch_size * phase.accumulation
    if not phase.may_grow:
        return phase
    limit = USABLE * (card_gib or 0) * 2**30
    for size in sorted((n for n in range(1, total + 1) if total % n == 0), reverse=True):
        chosen = phase.model_copy(update={"batch_size": size, "accumulation": total // size})
        needed = estimate_memory(shape, chosen, quantization, lora, *adapters, longest, "cuda")
        if sum(needed.values()) <= limit:
            break
    return chosen


def find_card_gib(placement: Placement) -> float | None:
    """Memory of the card that a placement asks for by name, else of the smallest GPU of this machine; None if unknown."""
    if placement.accelerator_type:
        return CARD_GIB.get(placement.accelerator_type)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(float(line) for line in told.split()) / 2**10
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def guess_device(placement: Placement) -> str:
    """What the run will train on as far as this machine and the config tell: `cuda` where GPUs are asked for or here."""
    if placement.gpus_per_worker is not None:
        return "cuda" if placement.gpus_per_worker else "cpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def settle_quantization(config: RunConfig) -> tuple[RunConfig, str | None]:
    """The config with a name for `base.quantization: auto`, and a sentence that says why it is that one.

    It is the first of none, int8 and nf4 with which a pass of one row of every phase fits the card, activations
    recomputed. The choice is part of what a run is made from. Raises InputError where the card or the base is unknown.
    """
    if config.base.quantization != "auto":
        return config, None
    placements = [phase.placement or config.placement for phase in config.phases]
    if all(guess_device(placement) == "cpu" for placement in placements):
        return _name(config, "none"), "base.quantization auto: none, on CPU"
    cards = [find_card_gib(placement) for placement in placements]
    folder = None if config.base.model == "miniature" else find_base_folder(config.base)
    shape = (
        read_shape(folder, settings.SHAPE, settings.VOCABULARY) if folder or config.base.model == "miniature" else None
    )
    if None in cards or shape is None:
        lacking = "the card's memory" if shape else "the base's size"
        raise InputError(
            f"base.quantization: auto needs {lacking}, which is not known here; set placement.accelerator_type to one of "
            f"{', '.join(CARD_GIB)}, download the base first, or say none, int8 or nf4"
        )
    card, told = min(card for card in cards if card is not None), list[str]()
    for quantization in ("none", "int8", "nf4"):
        needed = max(_estimate_least(config, shape, quantization, i) for i in range(len(config.phases))) / 2**30
        if needed <= USABLE * card:
            why = f", {' and '.join(told)}" if told else ""
            text = f"base.quantization auto: {quantization}, which takes about {needed:.1f} of {card:.0f} GiB{why}"
            return _name(config, quantization), text
        told.append(f"{quantization} would take {needed:.1f}")
    raise InputError(f"base.quantization: auto finds nothing that fits a card of {card:.0f} GiB: {', '.join(told)} GiB")


def _name(config: RunConfig, quantization: str) -> RunConfig:
    return config.model_copy(update={"base": config.base.model_copy(update={"quantization": quantization})})


def _estimate_least(config: RunConfig, shape: BaseShape, quantization: str, at: int) -> int:
    """Bytes of a pass of one row of a phase, activations recomputed, behind adapters as large as its own."""
    phase, share = config.phases[at], config.phases[at].settle(1)
    one = share.model_copy(update={"batch_size": 1, "gradient_checkpointing": True})
    lora = phase.lora or config.lora
    count = count_lora(shape, lora)
    longest = Longest(phase.max_tokens, phase.max_tokens)
    return sum(estimate_memory(shape, one, quantization, lora, count, at * count, longest, "cuda").values())


def find_memory_warnings(plan: RunPlan, accelerators: Iterable[str]) -> Iterator[str]:
    """A sentence for each phase whose worker is estimated to need more than the largest known card of a cluster has."""
    known = {name: CARD_GIB[name] for name in accelerators if name in CARD_GIB}
    if not known:
        return
    largest = max(known, key=lambda name: known[name])
    for phase in plan.phases:
        needed = sum((phase.memory_bytes or {}).values()) / 2**30
        if phase.is_left and needed > known[largest]:
            yield (
                f"phase {phase.name} is estimated to need {needed:.0f} GiB a worker, and the largest card of the cluster "
                f"({largest}) has {known[largest]}; training lowers batch_size if it must, a smaller base.quantization helps"
            )
