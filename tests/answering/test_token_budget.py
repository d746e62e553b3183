"""Where a batch ends: pure arithmetic on lengths."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from medlora.answering.token_budget import Batcher, count_unpadded

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80).map(lambda each: sorted(each, reverse=True))


@given(LENGTHS, st.integers(1, 20_000))
def test_a_batch_that_is_cut_is_the_longest_that_wastes_little(lengths: list[int], least: int) -> None:
    n = count_unpadded(lengths, 0.1, least)
    assert 1 <= n <= len(lengths)
    wasted = [1 - sum(lengths[:k]) / (k * lengths[0]) for k in range(1, len(lengths) + 1)]
    if n < len(lengths):
        assert n * lengths[0] >= least, "so small a batch is not cut"
        assert wasted[n] > 0.1
    if n * lengths[0] > least + lengths[0]:
        assert wasted[n - 1] <= 0.1 + 1e-9


def run(batcher: Batcher, lengths: list[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    batcher.run(lengths, lambda batch: batches.append([lengths[i] for i in batch]))
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    return batches


def count_useful(batches: list[list[int]]) -> float:
    return sum(map(sum, batches)) / sum(len(batch) * batch[0] for batch in batches)


def test_a_large_budget_wastes_no_more_than_a_small_one() -> None:
    """With a GPU's budget of 65,536 tokens, half of what is computed for questions like these was padding."""
    dice = random.Random(0)
    lengths = [int(min(40 + dice.lognormvariate(4, 0.5), 400)) for _ in range(295)]
    assert count_useful(run(Batcher(65_536), lengths)) < 0.6
    assert count_useful(run(Batcher(65_536, cuts=True), lengths)) > 0.75


def test_batches_on_cpu_are_those_of_before() -> None:
    lengths = [30, 900, 10, 10, 250, 240, 5, 0]
    assert run(Batcher(800), lengths) == [[900], [250, 240, 30], [10, 10, 5, 0]]


def test_no_batch_has_more_rows_than_lanes() -> None:
    assert [len(batch) for batch in run(Batcher(10_000, most_rows=4), [5] * 10)] == [4, 4, 2]
