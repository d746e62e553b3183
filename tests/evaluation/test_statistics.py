from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from medlora.evaluation import statistics
from medlora.evaluation.predictions import Prediction


def stage(name: str, marks: str, test: str = "doctor", subject: str = "", start: int = 0) -> list[Prediction]:
    """One prediction per mark: 1 right, 0 wrong, u unparsed, f failed."""
    choice = {"1": "A", "0": "B", "u": None, "f": None}
    return [
        Prediction(
            f"{test}_{i}", test, name, "A", choice[m], subject, error="out of memory" if m == "f" else "", options=5
        )
        for i, m in enumerate(marks, start)
    ]


@settings(deadline=None)  # the machine may be busy
@given(total=st.integers(1, 4000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_interval_is_that_of_scipy(total: int, share: float, confidence: float) -> None:
    correct = round(total * share)
    expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert statistics.wilson(correct, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), interval in published.items():
        assert statistics.wilson(correct, total) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_proportion(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="is no proportion"):
        statistics.wilson(correct, total)


def test_unparsed_and_failed_stay_in_the_denominator() -> None:
    found = statistics.accuracy(stage("base", "110ufu1"))
    assert (found.correct, found.total, found.unparsed, found.failed, found.value) == (3, 7, 2, 1, 3 / 7)


def test_breakdown_gives_micro_macro_and_chance() -> None:
    predictions = stage("base", "1111", "nurse", "care") + stage("base", "10", "doctor", "heart")
    by_test, by_subject = statistics.breakdown(predictions), statistics.breakdown(predictions, "subject")
    assert {name: group.value for name, group in by_test.groups.items()} == {"doctor": 0.5, "nurse": 1.0}
    assert list(by_subject.groups) == ["care", "heart"]
    assert (by_test.micro.value, by_test.macro, by_test.chance) == (5 / 6, 0.75, pytest.approx(0.2))


def test_chance_is_the_mean_over_questions_of_different_sizes() -> None:
    four = Prediction("1", "t", "s", "A", "A", options=4)
    ten = Prediction("2", "t", "s", "A", "A", probabilities=(0.1,) * 10)
    unknown = Prediction("3", "t", "s", "A", "A")
    assert statistics.chance([four, ten]) == pytest.approx(0.175)
    assert statistics.chance([four, unknown]) is None


def test_comparison_names_gained_and_lost_questions() -> None:
    found = statistics.compare(stage("base", "1100u"), stage("02", "1011f"), seed=1)
    assert found.gained == (("doctor", "doctor_2"), ("doctor", "doctor_3"))
    assert found.lost == (("doctor", "doctor_1"),)
    assert (found.before, found.after, found.total, found.difference) == ("base", "02", 5, 0.2)
    assert found.p_value == found.p_holm == 1.0


@settings(deadline=None)  # the machine may be busy
@given(gained=st.integers(0, 300), lost=st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_of_scipy(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(5, 0) == 2 / 32
    assert statistics.mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert 0 < statistics.mcnemar(1000, 400) < 1e-50


def test_holm_of_a_worked_example() -> None:
    # Holm's procedure by hand: 0.005 * 4, 0.01 * 3, max(0.03 * 2, ...), max(0.04 * 1, 0.06).
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_all_pairs_are_corrected_together() -> None:
    predictions = stage("base", "0" * 20) + stage("00", "0" * 12 + "1" * 8) + stage("01", "0" * 10 + "1" * 10)
    found = statistics.compare_all(predictions, seed=0)
    assert [(c.before, c.after) for c in found] == [("base", "00"), ("base", "01"), ("00", "01")]
    assert [c.p_value for c in found] == [2 / 2**8, 2 / 2**10, 0.5]
    assert [c.p_holm for c in found] == [2 * 2 / 2**8, 3 * 2 / 2**10, 0.5]


def test_bootstrap_interval_is_that_of_scipy_and_of_its_seed() -> None:
    before, after = stage("base", "1" * 60 + "0" * 40), stage("00", "1" * 50 + "0" * 10 + "1" * 25 + "0" * 15)
    found = statistics.compare(before, after, seed=3)
    gains = np.array([b.correct - a.correct for a, b in zip(before, after, strict=True)], dtype=float)
    expected = bootstrap((gains,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0))
    low, high = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.011)  # one question is 0.01
    assert found == statistics.compare(before, after, seed=3)


@pytest.mark.parametrize("total", [1, 10, 124, 3009])
def test_where_no_pair_differs_the_interval_is_exact(total: int) -> None:
    before = stage("base", "1" * (total - total // 3) + "0" * (total // 3))
    found = statistics.compare(before, before_named(before, "same"), seed=3)
    limit = binomtest(0, total).proportion_ci(0.95, method="exact").high
    assert (found.low, found.high) == pytest.approx((-limit, limit))
    one_gained = [replace(p, choice=p.gold) if i == total - 1 else p for i, p in enumerate(before)]
    if total // 3:  # one pair that differs: the bootstrap again
        assert statistics.compare(before, before_named(one_gained, "better"), seed=3).low == 0.0


def before_named(predictions: list[Prediction], name: str) -> list[Prediction]:
    return [Prediction(p.id, p.test, name, p.gold, p.choice) for p in predictions]


def test_stages_with_different_questions_are_not_paired() -> None:
    with pytest.raises(
        ValueError, match=r"'base' and '00' cannot be paired: 1 only in 'base' \(e.g. \('doctor', 'doctor_2'\)\)"
    ):
        statistics.compare(stage("base", "110"), stage("00", "11"), seed=0)
    other_gold = [Prediction("doctor_0", "doctor", "00", "B", "B")]
    with pytest.raises(ValueError, match="different gold letters"):
        statistics.compare(stage("base", "1"), other_gold, seed=0)


def test_the_same_id_in_two_tests_is_two_questions() -> None:
    both = [Prediction("1", test, "base", "A", "A") for test in ("doctor", "nurse")]
    assert statistics.accuracy(both).total == 2


@pytest.mark.parametrize(
    "score",
    [
        statistics.accuracy,
        statistics.breakdown,
        statistics.letter_bias,
        statistics.calibration,
        statistics.forgetting_matrix,
    ],
)
def test_nothing_and_repeated_questions_are_refused(score) -> None:
    with pytest.raises(ValueError, match="no predictions"):
        score([])
    with pytest.raises(ValueError, match=r"answers question \('doctor', 'doctor_0'\) more than once"):
        score(stage("base", "1") * 2)


def confident(probability: float, correct: bool, number: int) -> Prediction:
    rest = (1 - probability) / 4
    return Prediction(
        str(number), "t", "s", "A" if correct else "B", "A", probabilities=(probability, rest, rest, rest, rest)
    )


def test_calibration_by_hand() -> None:
    # Two bins hold something: (0.8, 0.9] with 4 at 0.85, 2 right; (0.4, 0.5] with 1 at 0.5, right.
    predictions = [confident(0.85, i < 2, i) for i in range(4)] + [
        confident(0.5, True, 4),
        Prediction("5", "t", "s", "A", "A"),
    ]
    found = statistics.calibration(predictions)
    assert found is not None
    assert found.ece == pytest.approx(4 / 5 * abs(0.5 - 0.85) + 1 / 5 * 0.5)
    assert (found.counted, found.without) == (5, 1)
    assert [b.count for b in found.bins] == [0, 0, 0, 0, 1, 0, 0, 0, 4, 0]
    assert found.bins[0].accuracy is None and found.bins[8].accuracy == 0.5
    assert statistics.calibration([Prediction("5", "t", "s", "A", "A")]) is None


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.floats(0.2, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_calibration_counts_every_prediction_once(drawn: list[tuple[float, bool]], bins: int) -> None:
    found = statistics.calibration([confident(p, right, i) for i, (p, right) in enumerate(drawn)], bins)
    assert found is not None and sum(b.count for b in found.bins) == len(drawn) and 0 <= found.ece <= 1
    for b in found.bins:
        assert b.confidence is None or b.low - 1e-9 <= b.confidence <= b.high + 1e-9


def test_calibration_refuses_what_is_no_distribution() -> None:
    with pytest.raises(ValueError, match=r"question \('t', '1'\) are not a distribution"):
        statistics.calibration([Prediction("1", "t", "s", "A", "A", probabilities=(0.5, 0.4))])


def test_forgetting_matrix_by_hand() -> None:
    predictions = stage("base", "1100", "a") + stage("00", "1110", "a") + stage("01", "1000", "a")
    predictions += stage("base", "10", "b") + stage("01", "11", "b")
    found = statistics.forgetting_matrix(predictions)
    assert (found.stages, found.tests) == (("base", "00", "01"), ("a", "b"))
    assert found.accuracy == ((0.5, 0.5), (0.75, None), (0.25, 1.0))
    assert found.forgotten == (0.5, -0.5)
    assert statistics.forgetting_matrix(stage("base", "1")).forgotten == (None,)


def test_letter_bias_by_hand() -> None:
    golds, choices = "AABC", ["A", "B", "B", None]
    found = statistics.letter_bias(
        [Prediction(str(i), "t", "s", g, c) for i, (g, c) in enumerate(zip(golds, choices, strict=True))]
    )
    assert (found.chosen, found.gold, found.none) == ({"A": 1, "B": 2, "C": 0}, {"A": 2, "B": 1, "C": 1}, 1)
    assert found.distance == pytest.approx((abs(1 / 3 - 1 / 2) + abs(2 / 3 - 1 / 4) + 1 / 4) / 2)


def test_every_result_converts_to_json() -> None:
    predictions = stage("base", "110u") + stage("00", "0111")
    results = [
        statistics.breakdown(stage("base", "10f")),
        *statistics.compare_all(predictions, seed=0),
        statistics.calibration([confident(0.7, True, 0)]),
        statistics.forgetting_matrix(predictions),
        statistics.letter_bias(stage("base", "uuu")),
    ]
    for result in results:
        text = json.dumps(asdict(result), allow_nan=False)
        assert all(math.isfinite(x) for x in json.loads(text).values() if isinstance(x, float))
