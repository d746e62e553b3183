"""What it costs to look for numbers that are not finite before an adapter is saved, against the save of a checkpoint.

python benchmarks/faults/finite_check.py        one line; the adapter is of rank 16 on the linear layers of Gemma 3 4B
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import ROOT  # noqa: F401  (finds medlora)
from peft import LoraConfig

from medlora.model.adapter_files import find_non_finite, write_adapter
from medlora.runs.manifests import commit

LAYERS, RANK = 34, 16
SHAPES = {
    "self_attn.q_proj": (2560, 2048),
    "self_attn.k_proj": (2560, 1024),
    "self_attn.v_proj": (2560, 1024),
    "self_attn.o_proj": (2048, 2560),
    "mlp.gate_proj": (2560, 10240),
    "mlp.up_proj": (2560, 10240),
    "mlp.down_proj": (10240, 2560),
}
"""Inputs and outputs, from the model's config.json."""


def make_tensors() -> dict[str, torch.Tensor]:
    """The tensors of the adapter, random."""
    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, inputs)
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, RANK)
    return tensors


def measure_s(act: Callable[[], object], times: int) -> float:
    """The median of so many runs."""
    taken = []
    for _ in range(times):
        began = time.monotonic()
        act()
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Adapter and optimiser on disk, hashed, synced and sealed."""
    write_adapter(
        folder, LoraConfig(r=RANK, target_modules=[name.rpartition(".")[2] for name in SHAPES]), tensors, None
    )
    state = {i: {"exp_avg": tensor, "exp_avg_sq": tensor.clone()} for i, tensor in enumerate(tensors.values())}
    torch.save(state, folder / "optimizer.pt")
    commit(folder, {"step": 1})


def main() -> None:
    """Print the line."""
    torch.set_num_threads(1)
    tensors = make_tensors()
    check_s = measure_s(lambda: find_non_finite(tensors), 9)
    with tempfile.TemporaryDirectory() as name:
        save_s = measure_s(lambda: save_checkpoint(Path(name) / "checkpoint-1", tensors), 3)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"{count:,} trained numbers: checked in {1000 * check_s:.1f} ms, a checkpoint saved in {save_s:.2f} s, "
        f"{100 * check_s / save_s:.2f} %"
    )


if __name__ == "__main__":
    main()
