"""The one sentence that says what an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence

from medlora.evaluation.reports import OverallRow, PairRow

CLEAR = 0.05
"""A corrected p-value below this is called a clear difference."""


def describe_verdict(overall: Sequence[OverallRow], comparisons: Sequence[PairRow]) -> str:
    """The last stage against the first one, on all tests together where both answered all of them.

    Where they did not, on the largest test that both answered. A stage alone is compared with chance.
    """
    pair = select_main_pair(overall, comparisons)
    if pair is None:
        return _describe_alone(overall[-1])
    where = f"test {pair['test']}" if pair["test"] is not None else "all tests together"
    figures = (
        f"{_points(pair['difference'])} points (95 % interval {_points(pair['low'])} to {_points(pair['high'])}, "
        f"n = {pair['total']:,}, {_p(pair['p_holm'])})"
    )
    if pair["p_holm"] >= CLEAR:
        return f"On {where}, {pair['after']} and {pair['before']} cannot be told apart: {figures}."
    better = "better" if pair["difference"] > 0 else "worse"
    return f"On {where}, {pair['after']} is {better} than {pair['before']}: {figures}."


def select_main_pair(overall: Sequence[OverallRow], comparisons: Sequence[PairRow]) -> PairRow | None:
    """The comparison that the verdict is about; None where there is no pair."""
    ends = (overall[0]["stage"], overall[-1]["stage"])
    pairs = [pair for pair in comparisons if (pair["before"], pair["after"]) == ends] or list(comparisons)
    together = [pair for pair in pairs if pair["test"] is None]
    return max(together or pairs, key=lambda pair: pair["total"], default=None)


def _describe_alone(row: OverallRow) -> str:
    low, high = row["interval"]
    chance = "" if row["chance"] is None else f"; chance is {row['chance']:.1%}"
    return (
        f"{row['stage']} answers {row['micro']:.1%} of {row['n']:,} questions right "
        f"(95 % interval {low:.1%} to {high:.1%}{chance})."
    )


def _points(difference: float) -> str:
    shown = f"{100 * difference:+.1f}"
    return "0.0" if shown in ("+0.0", "-0.0") else shown.replace("-", "\N{MINUS SIGN}")


def _p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.095 else f"p = {p_value:.2f}"
