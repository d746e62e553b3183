"""Predictions of two stages on two tests."""

from __future__ import annotations

from medlora.evaluation.predictions import Prediction


def answer(stage: str, test: str, choices: str, gold: str = "ABCDABCD") -> list[Prediction]:
    """One stage's answers to one test; "-" is unparsed, "!" failed. Odd questions are of subject y, even ones of x."""
    return [
        Prediction(
            id=f"q{i}",
            test=test,
            stage=stage,
            gold=right,
            choice=None if choice in "-!" else choice,
            subject="xy"[i % 2],
            error="out of memory" if choice == "!" else "",
            options=4,
        )
        for i, (choice, right) in enumerate(zip(choices, gold, strict=True))
    ]


TWO_TESTS = [
    *answer("base", "one", "AACDAACD"),  # 6 of 8
    *answer("base", "two", "DDDDDDDD"),  # 2 of 8
    *answer("00", "one", "ABCDAB-!"),  # 6 of 8
    *answer("00", "two", "ABCDABCD"),  # 8 of 8
]
