"""Checks that need a CUDA GPU: `python -m pytest --run-gpu tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.curriculum.jobs import make_job
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import load_tokenizer
from medlora.runs.files import read_json_lines
from medlora.runs.folders import RunFolder
from medlora.training.batches import FlatCollator
from medlora.training.phase import run_phase
from tests.support.batches import BATCHES, measure
from tests.support.tiny_run import configure, run_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["gemma", "medgemma", "llama"])
def test_a_phase_trains_on_the_gpu(
    family: str, quantization: str, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    config = configure(bases[family], data, p00={"optimizer": "auto", "gradient_checkpointing": True})
    config = config.model_copy(update={"base": config.base.model_copy(update={"quantization": quantization})})
    manifest = run_phase(
        make_job(config, config.phases[0], ()), RunFolder(tmp_path).phase("00"), lambda event: None, "cuda"
    )
    losses = [row["loss"] for row in read_json_lines(RunFolder(tmp_path).phase("00").metrics)]
    assert manifest["segments"][0]["optimizer"] == "adamw_torch_fused" and losses[-1] < losses[0]


def test_the_gpu_learns_what_the_cpu_learns(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    config = configure(bases["gemma"], data, lora={"r": 4, "alpha": 8})
    config = config.model_copy(update={"base": config.base.model_copy(update={"compute_dtype": "float32"})})
    run_all(config, tmp_path / "cpu", ("00",))
    run_phase(
        make_job(config, config.phases[0], ()),
        RunFolder(tmp_path / "cuda").phase("00"),
        lambda event: None,
        "cuda",
    )
    curves = [
        [row["loss"] for row in read_json_lines(RunFolder(tmp_path / d).phase("00").metrics)] for d in ("cpu", "cuda")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("name", BATCHES)
def test_flat_batches_and_chunked_losses_are_those_of_the_cpu(bases: dict[str, str], name: str) -> None:
    """In float32; TF32 is off by default."""
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        base = BaseModelConfig(model=bases["gemma"], compute_dtype="float32")
        model = add_adapter(load_base(base, load_tokenizer(base), device), "a", LoraSettings(r=4, alpha=8), [], seed=0)
        batch = {key: value.to(device) for key, value in FlatCollator()(BATCHES[name]).items()}
        loss, of_weights = measure(model.train(), batch)
        losses.append(loss)
        gradients.append({key: gradient.cpu() for key, gradient in of_weights.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)
