"""What a forward pass takes is measured before the first step; a batch that does not fit is lowered, one that could grow is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.config.model import LoraSettings
from medlora.config.phase import PhaseConfig, SettledPhase
from medlora.training import memory_fit, trainer
from medlora.training.batches import FlatCollator
from tests.support.batches import build, make_row

GIB = 2**30


def configure(batch_size: int, accumulation: int, **more: Any) -> SettledPhase:
    plain = {"name": "02", "chain": "new", "sources": [{"source": "miniature:text"}]}
    numbers = {"batch_size": batch_size, "accumulation": accumulation}
    return PhaseConfig.model_validate({**plain, **numbers, **more}).settle(1)


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


def fit_on_a_card(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, most: float = 1000, **keys: Any
) -> tuple[SettledPhase, list[str], list[int]]:
    """`batch_size: auto`, 32 rows a step: a GiB a row, half of it with recomputation; passes of over `most` GiB run out."""
    tried: list[int] = []

    def measure(model: Any, rows: Any, phase: Any, collator: Any) -> int:
        tried.append(len(rows))
        taken = 1 + len(rows) * (0.5 if phase.gradient_checkpointing is True else 1)
        if taken > most:
            raise torch.OutOfMemoryError("made up")
        return int(taken * GIB)

    monkeypatch.setattr(memory_fit, "measure_step", measure)
    monkeypatch.setattr(memory_fit, "_clear", lambda model: None)
    monkeypatch.setattr(memory_fit, "describe_device", lambda device: SimpleNamespace(free_bytes=free_gib * GIB))
    model = SimpleNamespace(
        device="cuda", parameters=lambda: [torch.zeros(GIB // 8, device="meta", requires_grad=True)]
    )
    plain = {"name": "02", "chain": "new", "sources": [{"source": "miniature:text"}]}
    phase, texts = PhaseConfig.model_validate({**plain, **keys}).settle(1), list[str]()
    fitted = memory_fit.fit_batch(model, [None] * 32, phase, None, lambda text, *level: texts.append(text))  # type: ignore[arg-type, list-item]
    return fitted, texts, tried


@pytest.mark.parametrize(
    ("free_gib", "most", "batch_size", "tried"),
    [
        (100, 1000, 32, [1, 2, 32]),
        (25, 1000, 16, [1, 2, 16]),  # 0.85 of them, less one of the optimiser's states, less the fixed one
        (100, 20, 16, [1, 2, 32, 16]),  # a dry run does not see everything that a formula would have to know
        (3, 1000, 1, [1, 2]),
    ],
)
def test_on_a_card_a_pass_takes_as_many_rows_as_fit(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, most: float, batch_size: int, tried: list[int]
) -> None:
    fitted, texts, sizes = fit_on_a_card(monkeypatch, free_gib, most)
    assert (fitted.batch_size, fitted.batch_size * fitted.accumulation, sizes) == (batch_size, 32, tried)
    assert f"batch_size auto: {batch_size} of the longest rows in a forward pass take" in texts[0] and len(texts) == 1


def test_activations_are_recomputed_only_where_one_row_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, texts, sizes = fit_on_a_card(monkeypatch, 100, 1.5)
    assert (
        fitted.gradient_checkpointing is True and sizes[0] == 1 and "one of the longest rows does not fit" in texts[0]
    )
    fitted, _, sizes = fit_on_a_card(monkeypatch, 100, 1.5, gradient_checkpointing=False)
    assert (fitted.gradient_checkpointing, sizes) == (False, [1])


def test_numbers_of_a_config_are_not_raised_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, texts, sizes = fit_on_a_card(monkeypatch, 100, batch_size=4)
    assert (fitted.batch_size, fitted.accumulation, sizes) == (4, 16, [1, 2])
    assert "batch_size 64, accumulation 1 would fit, too" in texts[0]


def test_workers_take_the_pass_that_fits_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = configure(8, 4)

    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, (4, True)]

    monkeypatch.setattr(memory_fit.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(memory_fit.dist, "all_gather_object", gather)
    agreed = memory_fit._agree(phase)
    assert (agreed.batch_size, agreed.accumulation, agreed.gradient_checkpointing) == (4, 8, True)


@pytest.mark.parametrize(
    ("free_gib", "optimizer", "chosen"),
    [
        (11, "auto", "adamw_torch_fused"),
        (9, "auto", "paged_adamw_8bit"),  # a GiB of states would be more than a tenth
        (9, "adamw_torch", "adamw_torch"),
    ],
)
def test_the_optimiser_follows_from_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, optimizer: str, chosen: str
) -> None:
    monkeypatch.setattr(trainer, "describe_device", lambda device: SimpleNamespace(free_bytes=free_gib * GIB))
    parameters = [torch.zeros(GIB // 8, device="meta", requires_grad=True), torch.zeros(1)]
    model: Any = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: parameters)
    assert trainer.choose_optimizer(model, configure(4, 4, optimizer=optimizer)) == chosen


@pytest.mark.parametrize("quantized", [True, False])
def test_a_segment_that_resumes_keeps_the_kind_of_its_optimiser(tmp_path: Path, quantized: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(300, 20))
    if quantized:
        from bitsandbytes.optim import PagedAdamW8bit

        optimizer: torch.optim.Optimizer = PagedAdamW8bit([parameter])
    else:
        optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model: Any = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: [parameter])
    found = trainer.choose_optimizer(model, configure(4, 4), tmp_path)
    assert found == ("paged_adamw_8bit" if quantized else "adamw_torch_fused")


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
