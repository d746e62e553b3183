"""A process that trains one phase after another: what it keeps changes no byte of what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medlora.curriculum.chains import extend_chain
from medlora.curriculum.jobs import make_job
from medlora.runs.folders import RunFolder
from medlora.training.phase import run_phase
from medlora.training.reuse import ReusedParts
from tests.support.tiny_run import configure, weights


def train(
    folder: Path,
    finished: Path,
    bases: dict[str, str],
    data: Path,
    reuse: ReusedParts | None,
    quantization: str,
    **p02: Any,
) -> bytes:
    """Phase 02 on the finished phases before it; the bytes of its adapter."""
    config = configure(bases["gemma"], data, p02={"max_steps": 4, "weights": "records", **p02})
    config = config.model_copy(update={"base": config.base.model_copy(update={"quantization": quantization})})
    done, chain = RunFolder(finished), ()
    for phase in config.phases[:2]:
        chain = extend_chain(chain, phase, done.phase(phase.name).adapter)
    job = make_job(config, config.phases[2], chain).model_copy(update={"threads": 1})
    run_phase(job, RunFolder(folder).phase("02"), lambda event: None, reuse=reuse)
    return weights(folder, "02")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_phase_after_others_has_the_bytes_of_one_alone(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, quantization: str
) -> None:
    common = (finished, bases, data)
    alone = train(tmp_path / "alone", *common, None, quantization)
    reuse = ReusedParts()
    # DoRA on an int8 base on CPU is refused.
    shape = {"r": 2, "alpha": 2, "targets": "attention", "dora": quantization != "int8"}
    other = train(tmp_path / "other", *common, reuse, quantization, learning_rate=3e-2, lora=shape)
    base = reuse.parts["base"][1]
    assert train(tmp_path / "after", *common, reuse, quantization) == alone != other
    assert reuse.parts["base"][1] is base and not base.is_changed()  # it was not loaded again
    assert not any("lora" in name for name, _ in base.model.named_parameters())
    # Other data and another tokenizer are not taken for the same.
    rows = reuse.parts["rows"][1]
    train(tmp_path / "shorter", *common, reuse, quantization, max_tokens=120)
    assert reuse.parts["rows"][1] is not rows and reuse.parts["base"][1] is base


def test_a_base_whose_weights_were_written_to_is_loaded_again() -> None:
    reuse, loaded = ReusedParts(), []

    def load() -> torch.nn.Module:
        loaded.append(torch.nn.Linear(2, 2))
        return loaded[-1]

    first = reuse.borrow_base("base", load)
    assert first is not loaded[0] and first.weight is loaded[0].weight
    first.extra = torch.nn.Linear(2, 2)
    second = reuse.borrow_base("base", load)
    assert len(loaded) == 1 and not hasattr(second, "extra")
    with torch.no_grad():
        second.weight.mul_(2)
    assert reuse.borrow_base("base", load).weight is loaded[1].weight
    assert reuse.borrow_base("other", load).weight is loaded[2].weight and len(loaded) == 3
