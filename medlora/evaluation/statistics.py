"""Predictions -> how good, how sure: accuracy with intervals, paired comparisons, calibration, forgetting, letter bias.

Unparsed and failed questions count as wrong and stay in every denominator; their numbers are stated beside it. Every
result is a frozen dataclass of plain numbers, strings and tuples: `dataclasses.asdict` gives JSON. A question is the
pair (test, id). All functions raise ValueError when there is nothing to score or a stage answers a question twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist, fmean
from typing import Literal

import numpy as np

from medlora.evaluation.predictions import Prediction
from medlora.records import LETTERS

QuestionKey = tuple[str, str]
"""A question's test and id."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`correct` of `total` with the Wilson interval [low, high]; `unparsed` and `failed` are among the wrong ones."""

    correct: int
    total: int
    unparsed: int
    failed: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Accuracy by group: `micro` over all questions, `macro` the plain mean of the groups' accuracies."""

    groups: dict[str, Accuracy]
    micro: Accuracy
    macro: float
    chance: float | None  # expected accuracy of a blind guess; None when the number of options is not known


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction (Wilson 1927, JASA 22:209)."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is no proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, shrink = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == total else min(1.0, centre + half)


def accuracy(predictions: Sequence[Prediction], confidence: float = 0.95) -> Accuracy:
    """Accuracy of one stage's predictions, or of any part of them."""
    _by_question(predictions)
    correct, total = sum(p.correct for p in predictions), len(predictions)
    failed = sum(bool(p.error) and p.choice is None for p in predictions)
    unparsed = sum(p.choice is None for p in predictions) - failed
    return Accuracy(correct, total, unparsed, failed, correct / total, *wilson(correct, total, confidence))


def breakdown(predictions: Sequence[Prediction], by: Literal["test", "subject"] = "test") -> Breakdown:
    """Accuracy of one stage by test or by subject, groups in alphabetical order."""
    names = sorted({getattr(p, by) for p in predictions})
    groups = {name: accuracy([p for p in predictions if getattr(p, by) == name]) for name in names}
    micro = accuracy(predictions)
    return Breakdown(groups, micro, fmean(group.value for group in groups.values()), chance(predictions))


def chance(predictions: Sequence[Prediction]) -> float | None:
    """Mean of 1 / number of options; None where that number is unknown for a question."""
    options = [p.options or len(p.probabilities) for p in predictions]
    return fmean(1 / n for n in options) if options and all(options) else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two stages on the same questions: `difference` is accuracy(after) - accuracy(before).

    [low, high] is the paired bootstrap interval of the difference, or `bound_undivided` where no question is gained or
    lost, or `bound_all_changed` where all are. `p_value` is the exact two-sided McNemar test on the gained and lost
    questions; `p_holm` is the same corrected for all comparisons made together.
    """

    before: str
    after: str
    total: int
    gained: tuple[QuestionKey, ...]  # wrong before, right after
    lost: tuple[QuestionKey, ...]  # right before, wrong after
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float


def compare(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Comparison:
    """One stage against another, question by question.

    Raises ValueError when the two do not answer exactly the same questions with the same gold letters.
    """
    first, second = _by_question(before), _by_question(after)
    names = _stage(before), _stage(after)
    if first.keys() != second.keys():
        only = [sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())]
        found = "; ".join(f"{len(o)} only in {n!r} (e.g. {o[0]})" for n, o in zip(names, only, strict=True) if o)
        raise ValueError(f"stages {names[0]!r} and {names[1]!r} cannot be paired: {found}")
    if differing := sorted(q for q in first if first[q].gold != second[q].gold):
        raise ValueError(f"stages {names[0]!r} and {names[1]!r} have different gold letters, e.g. for {differing[0]}")
    gained = tuple(sorted(q for q in first if second[q].correct and not first[q].correct))
    lost = tuple(sorted(q for q in first if first[q].correct and not second[q].correct))
    if len(first) in (len(gained), len(lost)):
        low, high = bound_all_changed(len(first), bool(gained), confidence)
    elif gained or lost:
        low, high = _bootstrap(len(gained), len(lost), len(first), seed, resamples, confidence)
    else:
        low, high = bound_undivided(len(first), confidence)
    p_value = mcnemar(len(gained), len(lost))
    difference = (len(gained) - len(lost)) / len(first)
    return Comparison(*names, len(first), gained, lost, difference, low, high, p_value, p_value)


def bound_undivided(total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a difference where none of `total` questions was gained or lost.

    A bootstrap of equal pairs has no width, which claims too much. The upper limit for 0 gained of `total` is 1 -
    (alpha/2)^(1/total), about 3.7 / total (Clopper and Pearson 1934, Biometrika 26:404). The lower limit is the same
    for the lost ones. Together they hold with at least the confidence asked for (Bonferroni).
    """
    if total < 1:
        raise ValueError("no questions to bound a difference on")
    limit = float(1 - ((1 - confidence) / 2) ** (1 / total))
    return -limit, limit


def bound_all_changed(total: int, gained: bool, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a difference where every question was gained, or every one lost: a bootstrap has no width there.

    Clopper and Pearson's lower limit for `total` of `total` is share = (alpha/2)^(1/total). At most 1 - share are then
    changed the other way, so that the difference is at least 2 share - 1.
    """
    bound = 2 * ((1 - confidence) / 2) ** (1 / total) - 1
    return (bound, 1.0) if gained else (-1.0, -bound)


SATURATED = 0.98
"""Share of right answers from which on a test hardly distinguishes stages."""


def is_saturated(shares: Sequence[float]) -> bool:
    """Whether two or more stages are all at or near 100 %."""
    return len(shares) > 1 and min(shares) >= SATURATED


def compare_all(predictions: Sequence[Prediction], seed: int, resamples: int = 10_000) -> tuple[Comparison, ...]:
    """Every two stages, in the order in which the stages first appear, with p-values corrected over all pairs."""
    stages = _by_stage(predictions)
    pairs = [compare(stages[a], stages[b], seed, resamples) for a, b in combinations(stages, 2)]
    corrected = holm([pair.p_value for pair in pairs])
    return tuple(replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: a binomial test of `gained` against a fair coin; 1.0 when nothing changed."""
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2 ** (gained + lost)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979, Scand J Statist 6:65), in the order given."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _bootstrap(gained: int, lost: int, total: int, seed: int, resamples: int, confidence: float) -> tuple[float, float]:
    # Questions drawn with replacement are gained, lost or unchanged: their counts are multinomial, so draw the counts.
    shares = np.array([gained, lost, total - gained - lost]) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
    differences = (counts[:, 0] - counts[:, 1]) / total
    low, high = np.quantile(differences, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions whose confidence lies in (low, high]; the means are None in an empty bin."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error over `counted` predictions; `without` more gave no probabilities and are left out."""

    ece: float
    bins: tuple[ReliabilityBin, ...]
    counted: int
    without: int


def calibration(predictions: Sequence[Prediction], bins: int = 10) -> Calibration | None:
    """ECE with bins of equal width (Guo et al. 2017, arXiv 1706.04599); None when no prediction has probabilities.

    The confidence of a prediction is its highest probability. Raises ValueError when probabilities do not sum to 1.
    """
    _by_question(predictions)
    having = [p for p in predictions if p.probabilities]
    if not having:
        return None
    for p in having:
        if not math.isclose(sum(p.probabilities), 1, abs_tol=1e-3) or min(p.probabilities) < 0:
            raise ValueError(f"probabilities of question {(p.test, p.id)} are not a distribution: {p.probabilities}")
    members: list[list[Prediction]] = [[] for _ in range(bins)]
    for p in having:
        members[min(bins, max(1, math.ceil(max(p.probabilities) * bins))) - 1].append(p)
    filled = []
    for place, inside in enumerate(members):
        confidence = fmean(max(p.probabilities) for p in inside) if inside else None
        right = fmean(p.correct for p in inside) if inside else None
        filled.append(ReliabilityBin(place / bins, (place + 1) / bins, len(inside), confidence, right))
    gaps = (b.count * abs((b.accuracy or 0) - (b.confidence or 0)) for b in filled)
    return Calibration(sum(gaps) / len(having), tuple(filled), len(having), len(predictions) - len(having))


@dataclass(frozen=True, slots=True)
class ForgettingMatrix:
    """Accuracy of every stage (row) on every test (column); None where a stage was not asked.

    `forgotten[j]` is the best earlier accuracy on test j minus the last stage's: above 0, something was lost
    (Chaudhry et al. 2018, arXiv 1801.10112); None where the last stage or all earlier ones were not asked.
    """

    stages: tuple[str, ...]
    tests: tuple[str, ...]
    accuracy: tuple[tuple[float | None, ...], ...]
    forgotten: tuple[float | None, ...]


def forgetting_matrix(predictions: Sequence[Prediction]) -> ForgettingMatrix:
    """Stages in the order in which they first appear, tests in alphabetical order."""
    stages = _by_stage(predictions)
    tests = tuple(sorted({p.test for p in predictions}))
    rows: list[tuple[float | None, ...]] = []
    for inside in stages.values():
        on = {test: [p.correct for p in inside if p.test == test] for test in tests}
        rows.append(tuple(fmean(on[test]) if on[test] else None for test in tests))
    forgotten: list[float | None] = []
    for column in zip(*rows, strict=True):
        earlier, last = [value for value in column[:-1] if value is not None], column[-1]
        forgotten.append(max(earlier) - last if earlier and last is not None else None)
    return ForgettingMatrix(tuple(stages), tests, tuple(rows), tuple(forgotten))


@dataclass(frozen=True, slots=True)
class LetterBias:
    """How often each letter was chosen and was right; `none` questions got no letter.

    `distance` is the total variation distance between the two shares: 0 no bias, 1 nothing in common.
    """

    chosen: dict[str, int]
    gold: dict[str, int]
    none: int
    distance: float


def letter_bias(predictions: Sequence[Prediction]) -> LetterBias:
    """Choice counts against gold counts of one stage, over the letters that occur."""
    _by_question(predictions)
    chosen = Counter(p.choice for p in predictions if p.choice is not None)
    gold = Counter(p.gold for p in predictions)
    letters = [letter for letter in LETTERS if chosen[letter] or gold[letter]]
    answered = chosen.total()
    gaps = (abs(chosen[x] / answered - gold[x] / len(predictions)) for x in letters)
    distance = sum(gaps) / 2 if answered else 1.0
    none = len(predictions) - answered
    return LetterBias({x: chosen[x] for x in letters}, {x: gold[x] for x in letters}, none, distance)


@dataclass(frozen=True, slots=True)
class Rotations:
    """Answers under all cyclic orders of the options, those of failed questions counted as wrong.

    `accuracy` is over all `answers`; `consistency` is the share of questions whose choice is the same option in every
    order. `letters` is how often each letter was chosen against how often it was right: over all orders equally often.
    `orders` is the most orders that a question had.
    """

    orders: int
    answers: int
    accuracy: float
    consistency: float
    letters: LetterBias


def rotations(predictions: Sequence[Prediction]) -> Rotations | None:
    """What the order of the options changes for one stage; None when only one order was asked."""
    turned = {question: _turn(p) for question, p in _by_question(predictions).items()}
    orders = max(len(p.rotated) for p in predictions)
    if orders == 0:
        return None
    answers = [p for of_question in turned.values() for p, _ in of_question]
    picked = [{option for _, option in of_question} for of_question in turned.values()]
    consistent = sum(len(options) == 1 and None not in options for options in picked)
    right = fmean(p.correct for p in answers)
    return Rotations(orders, len(answers), right, consistent / len(predictions), letter_bias(answers))


def _turn(prediction: Prediction) -> list[tuple[Prediction, int | None]]:
    """The prediction once for every order, with the place of the chosen option in the question's own order."""
    n, gold = max(1, prediction.options), LETTERS.index(prediction.gold)
    turned: list[tuple[Prediction, int | None]] = []
    for by, letter in enumerate(prediction.rotated or "-" * n):
        choice = None if letter == "-" else letter
        place = None if choice is None else (LETTERS.index(choice) + by) % n
        once = replace(prediction, id=f"{prediction.id}#{by}", gold=LETTERS[(gold - by) % n], choice=choice)
        turned.append((once, place))
    return turned


def _by_question(predictions: Iterable[Prediction]) -> dict[QuestionKey, Prediction]:
    found: dict[QuestionKey, Prediction] = {}
    for p in predictions:
        if (p.test, p.id) in found:
            raise ValueError(f"stage {p.stage!r} answers question {(p.test, p.id)} more than once")
        found[p.test, p.id] = p
    if not found:
        raise ValueError("no predictions to score")
    return found


def _stage(predictions: Sequence[Prediction]) -> str:
    names = sorted({p.stage for p in predictions})
    if len(names) != 1:
        raise ValueError(f"predictions of one stage expected, found {', '.join(map(repr, names)) or 'none'}")
    return names[0]


def _by_stage(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    stages: dict[str, list[Prediction]] = {}
    for p in predictions:
        stages.setdefault(p.stage, []).append(p)
    for inside in stages.values():
        _by_question(inside)
    if not stages:
        raise ValueError("no predictions to score")
    return stages
