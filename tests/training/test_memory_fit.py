"""What a forward pass takes is measured before the first step; a batch that does not fit is lowered, one that could grow is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.config.model import LoraSettings
from medlora.config.phase import PhaseConfig
from medlora.training import memory_fit
from medlora.training.batches import FlatCollator
from tests.support.batches import build, make_row

GIB = 2**30


def configure(batch_size: int, accumulation: int, **more: Any) -> PhaseConfig:
    plain = {"name": "02", "chain": "new", "sources": [{"source": "miniature:text"}]}
    return PhaseConfig.model_validate({**plain, "batch_size": batch_size, "accumulation": accumulation, **more})


@pytest.mark.parametrize(
    ("free_gib", "batch_size", "said"),
    [
        (100, 4, "takes 5.0 GiB of 100.0 GiB free; batch_size 16, accumulation 1 would fit, too"),
        (10, 4, "takes 5.0 GiB of 10.0 GiB free"),  # 7 would fit; of the divisors of 16, 4 is the largest
        (4, 2, "would take 5.0 GiB of 4.0 GiB free: batch_size 4 becomes 2, accumulation 4 becomes 8"),
        (1, 1, "would take 5.0 GiB of 1.0 GiB free: batch_size 4 becomes 1, accumulation 4 becomes 16"),
    ],
)
def test_the_largest_batch_that_fits_is_told_from_one_and_two_rows(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, batch_size: int, said: str
) -> None:
    """A fixed GiB and one more for every row."""
    monkeypatch.setattr(memory_fit, "measure_step", lambda model, rows, phase, collator: (1 + len(rows)) * GIB)
    monkeypatch.setattr(memory_fit, "describe_device", lambda device: SimpleNamespace(free_bytes=free_gib * GIB))
    texts: list[str] = []
    fitted = memory_fit.fit_batch(
        SimpleNamespace(device="cpu"), [None, None], configure(4, 4), None, lambda text, *level: texts.append(text)
    )
    assert (fitted.batch_size, fitted.batch_size * fitted.accumulation) == (batch_size, 16)
    assert said in texts[0] and len(texts) == 1


def test_where_even_one_row_does_not_fit_training_has_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(memory_fit, "measure_step", fail)
    model = torch.nn.Linear(1, 1)
    assert memory_fit.fit_batch(model, [None], configure(4, 4), None, pytest.fail) == configure(4, 4)


def test_a_dry_run_measures_and_leaves_no_trace(bases: dict[str, str]) -> None:
    model, _ = build(bases["gemma"], [LoraSettings(r=4, alpha=8, dropout=0.1)])
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    phase, rows = configure(4, 1), [make_row(40, prompt=5), make_row(40, prompt=5, start=3)]
    one = memory_fit.measure_step(model, rows[:1], phase, FlatCollator())
    two = memory_fit.measure_step(model, rows, phase, FlatCollator())
    recomputed = memory_fit.measure_step(
        model, rows, phase.model_copy(update={"gradient_checkpointing": True}), FlatCollator()
    )
    assert 1.5 * one < two < 2.5 * one, "twice the rows, about twice the activations"
    assert recomputed < 0.5 * two
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_one_sequence_that_does_not_fit_is_recomputed_before_training_gives_up() -> None:
    last = memory_fit.shrink(configure(1, 16))
    assert last is not None and last.gradient_checkpointing is True and last.batch_size == 1
    assert memory_fit.shrink(last) is None
    assert memory_fit.shrink(configure(1, 16, gradient_checkpointing=False)) is None


def test_the_global_batch_is_kept_when_a_batch_is_halved() -> None:
    cut = [memory_fit.shrink(configure(b, a)) for b, a in ((8, 1), (3, 2), (5, 1))]
    assert [(each.batch_size, each.accumulation) for each in cut if each] == [(4, 2), (1, 6), (1, 5)]
