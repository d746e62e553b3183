"""Plans of flat batches, and varlen attention behind its wrapper; what needs a GPU is in tests/gpu."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlora.kernels import varlen
from medlora.kernels.varlen import Span, attend_at_once, attend_in_turn, carry_plan, make_plan, using
from tests.support.varlen import reference_varlen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 5))
def test_the_integers_of_a_plan_are_those_of_its_segments(sizes: list[int], shared: int) -> None:
    segments: list[Span] = [(0, shared, 0)] if shared else []
    for size in sizes:
        at = segments[-1][1] if segments else 0
        segments.append((at, at + size, shared))
    plan = make_plan(segments)
    seen = [[*range(s), *range(start, stop)] for start, stop, s in segments]
    queries = plan.cu_q.tolist()
    assert [range(*pair) for pair in zip(queries, queries[1:], strict=False)] == [range(a, b) for a, b, _ in segments]
    keys = plan.cu_k.tolist()
    places = list(range(keys[-1])) if plan.places is None else plan.places.tolist()
    assert [places[a:b] for a, b in zip(keys, keys[1:], strict=False)] == seen and keys[-1] == len(places)
    assert (plan.places is None) == (shared == 0)
    assert (plan.max_q, plan.max_k) == (max(b - a for a, b, _ in segments), max(map(len, seen)))
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32 and plan.tokens == segments[-1][1]


def fake_2_11(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:  # fmt: skip
    return reference_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def fake_2_12(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None) -> torch.Tensor:  # fmt: skip
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError("enable_gqa")
    return reference_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def fake_2_13(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None, num_splits: int | None = None) -> torch.Tensor:  # fmt: skip
    assert num_splits is None
    return fake_2_12(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa)  # fmt: skip


SEGMENTS = [
    ((0, 9, 0), (9, 14, 9), (14, 25, 9)),
    ((0, 9, 0), (9, 10, 0), (10, 25, 0)),
    ((0, 25, 0),),
]


@pytest.mark.parametrize("function", [fake_2_11, fake_2_12, fake_2_13])
@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (2, 2)])
def test_one_call_gives_what_one_segment_after_another_gives(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor], window: int | None, heads: tuple[int, int]
) -> None:
    """Output and gradients, by the signature of each torch; in float64, so that only rounding differs."""
    monkeypatch.setattr(varlen, "varlen_attn", function)
    draw = torch.Generator().manual_seed(0)
    for segments in SEGMENTS:
        given = [torch.randn(1, n, 25, 8, generator=draw, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
        upstream = torch.randn(1, 25, heads[0], 8, generator=draw, dtype=torch.float64)
        found = []
        for at_once in (True, False):
            x = [tensor.clone().requires_grad_() for tensor in given]
            plan = make_plan(segments)
            if at_once:
                out = attend_at_once(x[0], x[1], x[2], plan, window, 0.3)
            else:
                out = attend_in_turn(x[0], x[1], x[2], segments, window, 0.3)
            found.append([out, *torch.autograd.grad(out, x, upstream)])
        for one, other in zip(*found, strict=True):
            # Keys and values are summed in float32 where segments share them.
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_installed_torch_has_one_of_these_signatures() -> None:
    assert varlen.varlen_attn is not None
    names = set(inspect.signature(varlen.varlen_attn).parameters)
    known = [set(inspect.signature(fake).parameters) for fake in (fake_2_11, fake_2_12, fake_2_13)]
    assert {"scale", "window_size", "max_q", "max_k"} <= names
    assert ("enable_gqa" in names) == any("enable_gqa" in each for each in known if len(each) <= len(names))


def test_where_it_cannot_run_the_reason_is_known() -> None:
    cpu = torch.device("cpu")
    assert "needs CUDA" in str(varlen.find_obstacle(cpu, torch.bfloat16, 4, 1, 16))
    assert not varlen.suits(torch.zeros(1, 4, 3, 8), torch.zeros(1, 1, 3, 8))


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [
        ((7, 5), torch.bfloat16, "T4 has compute capability 7.5, it needs 8.0"),
        ((9, 0), torch.float32, "the model computes in float32"),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_old_cards_and_float32_keep_to_sdpa(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    why = varlen._find_missing(torch.device("cuda", 0), dtype)
    assert why is None if said is None else said in str(why)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (reference_varlen, None),
        (lambda *a, **o: reference_varlen(*a, **{**o, "window_size": (-1, 0)}), "with a window of 16"),
        (lambda *a, **o: 1.1 * reference_varlen(*a, **o), "output differ"),
        (lambda *a, **o: 1 / 0, "trying it raised ZeroDivisionError"),
    ],
)
def test_the_trial_finds_a_function_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor], said: str | None
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", function)
    why = varlen._compare(torch.device("cpu"), torch.bfloat16, 4, 1, 16)
    assert why is None if said is None else said in str(why)


def test_what_is_computed_again_has_the_plan_of_its_forward_pass() -> None:
    """Also in another thread, where the variable is not set."""
    plan = make_plan([(0, 3, 0)])
    with using(plan):
        forward, again = carry_plan()
        with forward:
            assert varlen.get_plan() is plan
    assert varlen.get_plan() is None
    with again:
        assert varlen.get_plan() is plan
    assert varlen.get_plan() is None
