"""Predictions -> everything that is known of an evaluation, as plain JSON values, and the file of single answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import cast

from medlora.evaluation import statistics
from medlora.evaluation.answers.letter import find_written_letter, score_total
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.reports import ByLikelihood, Kept, OverallRow, PairRow, Report, StageRow
from medlora.records import LETTERS
from medlora.reporting.results.verdict import describe_verdict
from medlora.runs.manifests import as_json

RESAMPLES = 10_000
"""Of the paired bootstrap."""


def build_report(predictions: Sequence[Prediction], about: Mapping[str, object], seed: int) -> Report:
    """What `report.json` holds and the page shows: the same predictions, `about` and `seed` give the same values.

    Computed here: `verdict`, one sentence with interval and n (see `results.verdict`); `stages` (see `summarise`).
    `overall` has one row a stage over all its tests: `micro` weighted by size, `macro` the mean of the tests.
    `comparisons` holds every two stages on every test they share, and with several tests (`test` null) on all of them
    together, with the ids gained and lost as [test, id]. `forgetting` is the stage x test matrix. Holm's correction
    runs over all comparisons on single tests, and apart from them over those on all tests together. `remarks` are
    sentences about the figures themselves, such as a test that all stages pass.

    `about` is added at the top level, as given. The page knows of it, all optional: `name`, `created`,
    `notes` (sentences a reader must know), `prompts` (version), `seconds`, `seconds_to_first_answer`,
    `questions_asked`, `questions_per_s`, `phase_seconds`, `stage_seconds`, `config`, `versions` and `hashes` (of any depth).
    Raises ValueError when `about` names something computed here, when there is nothing to score, or when two stages were asked different questions of one test.
    """
    stages = list(dict.fromkeys(p.stage for p in predictions))
    rows = summarise(predictions)
    # `asdict` gives the fields of a dataclass without their types.
    overall = cast(
        list[OverallRow], [_summarise_tests([p for p in predictions if p.stage == stage], stage) for stage in stages]
    )
    comparisons = cast(list[PairRow], _compare(predictions, seed))
    computed: dict[str, object] = {
        "seed": seed,
        "resamples": RESAMPLES,
        "verdict": describe_verdict(overall, comparisons),
        "stages": rows,
        "overall": overall,
        "comparisons": comparisons,
        "remarks": describe_saturation(rows),
        "forgetting": asdict(statistics.forgetting_matrix(predictions)),
    }
    if taken := sorted(set(computed) & set(about)):
        raise ValueError(f"`about` may not name {', '.join(taken)}: computed from the predictions")
    report: Report = as_json({**about, **computed})
    return report


def summarise(predictions: Sequence[Prediction]) -> list[StageRow]:
    """One row a stage and test: accuracy with its Wilson 95 % interval, n, what failed, accuracy by subject.

    `macro` is the mean over subjects. `calibration` is None where the scoring gives no probabilities; `rotations` is
    None where only one order of the options was asked. `format_score` and `total` (a third format, two thirds right, as
    the replaced scripts had it) are None where no format was asked for. `by_likelihood` (see `count_by_likelihood`) is
    None where no letter was taken by likelihood behind a text that the model wrote. `confusion` maps gold letters to
    counts of what was chosen ("" where no letter was). `format_kept` counts the answers that have every field of the
    asked format.
    """
    rows: list[StageRow] = []
    groups: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault((prediction.stage, prediction.test), []).append(prediction)
    for (stage, test), group in groups.items():
        subjects = statistics.breakdown(group, by="subject")
        calibration, rotations = statistics.calibration(group), statistics.rotations(group)
        rows.append(
            # `asdict` gives the fields of a dataclass without their types.
            cast(
                StageRow,
                {
                    "stage": stage,
                    "test": test,
                    **_describe(subjects.micro),
                    "chance": subjects.chance,
                    "macro": subjects.macro,
                    "subjects": {name: asdict(part) for name, part in subjects.groups.items()},
                    "letters": asdict(statistics.letter_bias(group)),
                    "confusion": count_choices(group),
                    "calibration": calibration and asdict(calibration),
                    "rotations": rotations and asdict(rotations),
                    **_score_formats(group),
                    "by_likelihood": count_by_likelihood(group),
                },
            )
        )
    return rows


def count_choices(group: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """Gold letter -> chosen letter -> how often; "" is no letter, and only what occurs is listed."""
    counted: dict[str, Counter[str]] = {}
    for prediction in group:
        counted.setdefault(prediction.gold, Counter())[prediction.choice or ""] += 1
    return {gold: dict(sorted(counted[gold].items())) for gold in sorted(counted)}


def is_by_likelihood(prediction: Prediction) -> bool:
    """Whether the letter was taken by likelihood behind a text of the model's own that does not give this letter."""
    if not prediction.probabilities or prediction.format_score is None or prediction.choice is None:
        return False
    letters = LETTERS[: prediction.options or len(prediction.probabilities)]
    return find_written_letter(prediction.text, letters) != prediction.choice


def count_by_likelihood(group: Sequence[Prediction]) -> ByLikelihood | None:
    """How often scoring `reason` took a letter that the text does not give, and accuracy where the format was kept.

    `answers` were all taken by likelihood; the text of `unwritten` of them does not give the letter, and
    `unwritten_correct` of these are right. `kept` answers have every field of the format, and `kept_accuracy` is the
    share of right ones among them (None where there are none). None for other scorings.
    """
    reasoned = [p for p in group if p.probabilities and p.format_score is not None]
    if not reasoned:
        return None
    unwritten = [p for p in reasoned if is_by_likelihood(p)]
    kept = [p for p in reasoned if p.format_score == 1]
    return {
        "answers": len(reasoned),
        "unwritten": len(unwritten),
        "unwritten_correct": sum(p.correct for p in unwritten),
        "kept": len(kept),
        "kept_accuracy": fmean(p.correct for p in kept) if kept else None,
    }


def describe_saturation(rows: Sequence[StageRow]) -> list[str]:
    """A sentence for each test of which all stages answer nearly every question."""
    said = []
    for test in dict.fromkeys(row["test"] for row in rows):
        of_test = [row for row in rows if row["test"] == test]
        if statistics.is_saturated([row["accuracy"] for row in of_test]):
            said.append(
                f"test {test} is saturated: all {len(of_test)} stages answer {statistics.SATURATED:.0%} or more of its "
                f"{of_test[0]['n']:,} questions right, so it hardly tells them apart"
            )
    return said


def _score_formats(group: Sequence[Prediction]) -> dict[str, object]:
    if all(p.format_score is None for p in group):
        return {"format_score": None, "total": None, "format_kept": None}
    # A failed question has written nothing, so it has kept nothing of the format.
    formats = [p.format_score or 0.0 for p in group]
    totals = [score_total(kept, p.correct) for kept, p in zip(formats, group, strict=True)]
    return {"format_score": fmean(formats), "total": fmean(totals), "format_kept": _count_kept(group)}


def _count_kept(group: Sequence[Prediction]) -> Kept:
    kept = [p for p in group if p.format_score == 1]
    correct = sum(p.correct for p in kept)
    return {
        "answers": len(kept),
        "correct": correct,
        "accuracy": correct / len(kept) if kept else None,
        "interval": list(statistics.wilson(correct, len(kept))) if kept else None,
    }


def _summarise_tests(predictions: Sequence[Prediction], stage: str) -> dict[str, object]:
    tests = statistics.breakdown(predictions, by="test")
    micro = {"micro": tests.micro.value, **_describe(tests.micro)}
    del micro["accuracy"]
    return {"stage": stage, "tests": list(tests.groups), **micro, "macro": tests.macro, "chance": tests.chance}


def _describe(accuracy: statistics.Accuracy) -> dict[str, object]:
    return {
        "accuracy": accuracy.value,
        "interval": [accuracy.low, accuracy.high],
        "n": accuracy.total,
        "correct": accuracy.correct,
        "unparsed": accuracy.unparsed,
        "failed": accuracy.failed,
    }


def _compare(predictions: Sequence[Prediction], seed: int) -> list[dict[str, object]]:
    tests = list(dict.fromkeys(p.test for p in predictions))
    pairs = [
        {"test": test, **asdict(pair)}
        for test in tests
        for pair in statistics.compare_all([p for p in predictions if p.test == test], seed, RESAMPLES)
    ]
    for pair, p_holm in zip(pairs, statistics.holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = p_holm
    asked = {(p.stage, p.test) for p in predictions}
    if len(tests) > 1 and len(asked) == len(tests) * len({stage for stage, _ in asked}):
        pairs += [{"test": None, **asdict(pair)} for pair in statistics.compare_all(predictions, seed, RESAMPLES)]
    return pairs
