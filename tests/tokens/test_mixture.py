from __future__ import annotations

from collections import Counter

import pytest

from medlora.seeds import derive_seed
from medlora.tokens.mixture import Part, compute_shares, interleave, share_tokens


def test_shares_hold_in_every_stretch() -> None:
    draws = interleave({"a": Part(50, 0.7), "b": Part(500, 0.3)}, 1000, seed=1)
    for start in range(0, 1000, 10):
        assert Counter(name for name, _ in draws[start : start + 10]) == {"a": 7, "b": 3}


def test_without_shares_an_epoch_shows_everything_once() -> None:
    draws = interleave({"a": Part(30), "b": Part(70)}, 100, seed=1)
    assert len(set(draws)) == 100


def test_every_example_is_drawn_once_before_any_is_drawn_again_in_another_order() -> None:
    order = [i for _, i in interleave({"a": Part(20)}, 60, seed=3)]
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_a_function_of_the_seed_and_a_prefix_of_a_longer_run() -> None:
    parts = {"a": Part(9, 0.4), "b": Part(5)}
    assert interleave(parts, 40, seed=7) == interleave(parts, 90, seed=7)[:40]
    assert interleave(parts, 40, seed=7) != interleave(parts, 40, seed=8)


def test_parts_without_a_share_split_what_is_left_by_size() -> None:
    shares = compute_shares({"replay": Part(3, 0.1), "a": Part(20), "b": Part(60)})
    assert shares == pytest.approx({"replay": 0.1, "a": 0.225, "b": 0.675})


def test_an_empty_part_is_never_drawn() -> None:
    assert {name for name, _ in interleave({"a": Part(2), "none": Part(0, 0.5)}, 10, seed=0)} == {"a"}


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 1.1"):
        compute_shares({"a": Part(1, 1.1), "b": Part(1)})


def test_seeds_of_different_names_differ() -> None:
    assert len({derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", "b")}) == 4
    assert 0 <= derive_seed(0, "a") < 2**31


def test_shares_may_count_tokens() -> None:
    parts = {"short": Part(100, 0.5), "long": Part(10, 0.3), "rest": Part(40), "none": Part(0)}
    mean = {"short": 10.0, "long": 200.0, "rest": 50.0, "none": 0.0}
    counted = share_tokens(parts, mean)
    tokens = Counter[str]()
    for name, _ in interleave(counted, 20_000, seed=0):
        tokens[name] += int(mean[name])
    total = tokens.total()
    assert {name: round(n / total, 2) for name, n in tokens.items()} == {"short": 0.5, "long": 0.3, "rest": 0.2}


def test_without_shares_an_epoch_is_an_epoch_whatever_is_counted() -> None:
    parts = {"a": Part(3), "b": Part(5)}
    draws = interleave(share_tokens(parts, {"a": 7.0, "b": 300.0}), 8, seed=0)
    assert len(set(draws)) == 8
