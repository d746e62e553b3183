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
from medlora.training.reuse import Kept
from tests.support.tiny_run import configure, weights


def train(
    folder: Path, finished: Path, bases: dict[str, str], data: Path, kept: Kept | None, quantization: str, **p02: Any
) -> bytes:
    """Phase 02 on the finished phases before it; the bytes of its adapter."""
    config = configure(bases["gemma"], data, p02={"max_steps": 4, "weights": "records", **p02})
    config = config.model_copy(update={"base": config.base.model_copy(update={"quantization": quantization})})
    done, chain = RunFolder(finished), ()
    for phase in config.phases[:2]:
        chain = extend_chain(chain, phase, done.phase(phase.name).adapter)
    job = make_job(config, config.phases[2], chain).model_copy(update={"threads": 1})
    run_phase(job, RunFolder(folder).phase("02"), lambda event: None, kept=kept)
    return weights(folder, "02")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_phase_after_others_has_the_bytes_of_one_alone(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path, quantization: str
) -> None:
    common = (finished, bases, data)
    alone = train(tmp_path / "alone", *common, None, quantization)
    kept = Kept()
    # DoRA on an int8 base on CPU is refused.
    shape = {"r": 2, "alpha": 2, "targets": "attention", "dora": quantization != "int8"}
    other = train(tmp_path / "other", *common, kept, quantization, learning_rate=3e-2, lora=shape)
    base = kept.held["base"][1]
    assert train(tmp_path / "after", *common, kept, quantization) == alone != other
    assert kept.held["base"][1] is base and not base.is_changed()  # it was not loaded again
    assert not any("lora" in name for name, _ in base.model.named_parameters())
    # Other data and another tokenizer are not taken for the same.
    rows = kept.held["rows"][1]
    train(tmp_path / "shorter", *common, kept, quantization, max_tokens=120)
    assert kept.held["rows"][1] is not rows and kept.held["base"][1] is base


def test_a_base_whose_weights_were_written_to_is_loaded_again() -> None:
    kept, loaded = Kept(), []

    def load() -> torch.nn.Module:
        loaded.append(torch.nn.Linear(2, 2))
        return loaded[-1]

    first = kept.borrow_base("base", load)
    assert first is not loaded[0] and first.weight is loaded[0].weight
    first.extra = torch.nn.Linear(2, 2)
    second = kept.borrow_base("base", load)
    assert len(loaded) == 1 and not hasattr(second, "extra")
    with torch.no_grad():
        second.weight.mul_(2)
    assert kept.borrow_base("base", load).weight is loaded[1].weight
    assert kept.borrow_base("other", load).weight is loaded[2].weight and len(loaded) == 3
