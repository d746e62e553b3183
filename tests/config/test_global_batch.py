"""One key for the sequences of a step; numbers for its forward passes mean what they always meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from medlora.config.model import BaseModelConfig
from medlora.config.phase import PhaseConfig, name_as_before
from medlora.config.run import RunConfig
from medlora.curriculum.jobs import _dump_phase

PLAIN = {"name": "02", "chain": "new", "sources": [{"source": "miniature:text"}]}


def make(**keys: Any) -> PhaseConfig:
    return PhaseConfig.model_validate({**PLAIN, **keys})


@pytest.mark.parametrize(
    ("keys", "workers", "rows", "passes"),
    [
        ({}, 1, 32, (2, 16)),
        ({}, 4, 32, (2, 4)),
        ({"global_batch": 6}, 2, 6, (1, 3)),
        ({"global_batch": 32, "batch_size": 5}, 1, 32, (4, 8)),
        ({"global_batch": 1}, 1, 1, (1, 1)),
        # As before: of each worker, 16 passes unless said otherwise, of 2 sequences unless said otherwise.
        ({"batch_size": 4}, 1, 64, (4, 16)),
        ({"accumulation": 8}, 1, 16, (2, 8)),
        ({"batch_size": 4, "accumulation": 3}, 2, 24, (4, 3)),
    ],
)
def test_a_step_is_cut_into_passes(keys: dict[str, Any], workers: int, rows: int, passes: tuple[int, int]) -> None:
    phase = make(**keys)
    settled = phase.settle(workers)
    assert phase.count_batch(workers) == settled.count_batch(workers) == rows
    assert (settled.batch_size, settled.accumulation) == passes
    assert settled.may_grow == ("batch_size" not in keys and "accumulation" not in keys)
    assert PhaseConfig.model_validate(phase.model_dump(mode="json")) == phase


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"global_batch": 32, "accumulation": 4}, "keep one of them"),
        ({"batch_size": "auto", "accumulation": 4}, "it follows from global_batch"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"batch_size": "many"}, "auto"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make(**keys)


def test_workers_share_a_step_evenly() -> None:
    run = {"name": "r", "base": {"model": "miniature"}, "placement": {"workers": 3}}
    with pytest.raises(ValidationError, match=r"phases\.0\.global_batch: 32 sequences cannot be shared by 3 workers"):
        RunConfig.model_validate({**run, "phases": [PLAIN]})
    RunConfig.model_validate({**run, "phases": [{**PLAIN, "global_batch": 33}]})
    RunConfig.model_validate({**run, "phases": [{**PLAIN, "batch_size": 2}]})


def test_fingerprints_know_old_numbers_and_the_old_default() -> None:
    keys = ("batch_size", "accumulation", "global_batch")

    def show(**given: Any) -> dict[str, Any]:
        return {key: value for key, value in _dump_phase(make(**given)).items() if key in keys}

    assert show() == show(global_batch=32) == show(batch_size=2) == {"batch_size": 2, "accumulation": 16}
    assert show(batch_size=4, accumulation=2) == {"batch_size": 4, "accumulation": 2}
    assert show(global_batch=64) == {"batch_size": "auto", "global_batch": 64}
    plain = {"name": "other"}
    name_as_before(plain)
    assert plain == {"name": "other"}


def test_the_threshold_of_int8_is_told_where_it_is_another_one() -> None:
    base = BaseModelConfig(model="m", quantization="int8")
    assert not {"int8_threshold", "dequantize"} & set(base.model_dump(mode="json"))
    assert base.model_copy(update={"int8_threshold": 0.0}).model_dump(mode="json")["int8_threshold"] == 0.0
