"""When a run ends: by the rates that it measures, by those of earlier runs before, and no word without either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora import events
from medlora.config.evaluation import EvaluationConfig
from medlora.events import Event, PlannedPhase
from medlora.planning.forecast import Forecast
from medlora.planning.rates import find_evaluation_s


class Run:
    """A forecast that is fed with the events of a run, at times of the test's own."""

    def __init__(
        self, *phases: PlannedPhase, evaluates: bool = False, evaluation_s: float | None = None, begins_s: float = 0.0
    ) -> None:
        self.now_s = begins_s
        self.forecast = Forecast(lambda: self.now_s)
        self.take(events.planned(list(phases), evaluates, evaluation_s))

    def take(self, event: Event, at_s: float | None = None) -> str:
        self.now_s = self.now_s if at_s is None else at_s
        self.forecast.take(event)
        return self.forecast.describe()

    def step(self, phase: str, number: int, steps: int, at_s: float, segment: str = "normal") -> str:
        row: dict[str, Any] = {"segment": segment, "step": number, "steps": steps}
        return self.take(events.step(phase, row), at_s)


def phase(name: str, steps: int | None = 100, tokens: int | None = 1000, **more: Any) -> PlannedPhase:
    return {"name": name, "steps": steps, "tokens": tokens, "full_steps": 0, "seconds": None, **more}  # type: ignore[typeddict-item]


def test_the_rate_of_this_run_and_what_is_around_its_steps_are_those_of_later_phases() -> None:
    run = Run(
        phase("00"), phase("01", tokens=3000), phase("02", tokens=500), evaluates=True, evaluation_s=60.0, begins_s=-50
    )
    run.take(events.cluster_found("1 node", True, 50.0), 0)
    assert run.take(events.phase_started("00", "cpu"), 5) == ""
    assert run.take(events.building("00", {"step": 1, "total": 2}), 6) == ""
    assert run.take(events.building("00", {"step": 2, "total": 2}), 106) == ""  # which happens once
    assert run.take(events.training("00", "normal"), 110) == ""
    assert run.step("00", 10, 100, at_s=120) == ""  # nothing is measured before a second report
    # 100 tokens in 10 s: 80 s of this phase, 300 and 50 s of the next two, 10 s around each of them, 60 s of evaluation.
    assert run.step("00", 20, 100, at_s=130) == f"whole run {510 / 60:.0f} min left"
    run.now_s += 430
    assert run.forecast.describe() == "whole run 80 s left"  # as time goes by
    run.step("00", 100, 100, at_s=165)  # faster than before: 900 tokens in 45 s
    assert run.take(events.finished("00", 160), 170) == f"whole run {(150 + 25 + 20 + 60) / 60:.0f} min left"
    assert run.take(events.phase_started("01", "cpu"), 180).startswith("whole run 4 min")
    run.take(events.training("01", "normal"), 200)
    run.step("01", 50, 100, at_s=300)
    # 40 steps of 30 tokens took 120 s, so do 10 more; 2400 tokens a phase 02 of 500 at the mean of both.
    left = 30 + 500 * (120 + 45) / (1200 + 900) + (10 + 30) / 2 + 60
    assert run.step("01", 90, 100, at_s=420) == f"whole run {left / 60:.0f} min left"
    run.take(events.finished("01", 1), 450)
    run.take(events.phase_started("02", "cpu"), 455)
    run.take(events.training("02", "normal"), 460)
    run.step("02", 50, 100, at_s=470)
    assert run.step("02", 100, 100, at_s=480) == "whole run 60 s left"
    run.take(events.finished("02", 1), 480)
    assert run.take(events.phase_started("evaluation", "4 stages"), 480) == ""  # it has a time of its own


def test_before_anything_is_measured_it_is_by_earlier_runs_and_at_least() -> None:
    run = Run(phase("00", seconds=30.0), phase("01", seconds=50.0), evaluates=True, evaluation_s=20.0)
    assert run.forecast.describe() == "whole run at least 100 s left"


def test_without_a_rate_of_the_evaluation_it_is_of_the_phases_alone() -> None:
    run = Run(phase("00", seconds=30.0), phase("01", seconds=50.0), evaluates=True)
    assert run.forecast.describe() == "all phases at least 80 s left"
    run.take(events.reused("00"))
    run.take(events.phase_started("01", "cpu"))
    assert run.forecast.describe() == ""  # the last phase says its own time


@pytest.mark.parametrize("unknown", [phase("01", tokens=None), phase("01", steps=None, tokens=None)])
def test_it_says_nothing_where_a_phase_cannot_be_counted(unknown: PlannedPhase) -> None:
    run = Run(phase("00"), unknown, evaluates=True, evaluation_s=1.0)
    run.take(events.phase_started("00", "cpu"))
    run.take(events.training("00", "normal"))
    assert [run.step("00", n, 100, at_s=n) for n in (10, 20, 100)] == ["", "", ""]


def test_the_last_phase_of_a_run_without_evaluation_says_its_own_time_alone() -> None:
    run = Run(phase("00", seconds=30.0))
    assert run.forecast.describe() == "whole run at least 30 s left"  # nothing runs yet
    run.take(events.phase_started("00", "cpu"))
    assert [run.step("00", n, 100, at_s=n) for n in (10, 20)] == ["", ""]


def test_a_segment_that_ends_early_does_not_count_as_trained() -> None:
    run = Run(phase("00", steps=150, tokens=1500, full_steps=50), phase("01"))
    run.take(events.phase_started("00", "cpu"), 0)
    run.take(events.training("00", "full"), 0)
    run.step("00", 10, 50, at_s=10, segment="full")
    # Of 150 steps of 10 tokens 20 are done, at 1 s each.
    assert run.step("00", 20, 50, at_s=20, segment="full") == "whole run 4 min left"
    run.take(events.training("00", "normal"), 20)
    run.step("00", 10, 100, at_s=25)  # the other 30 are skipped
    assert run.step("00", 60, 100, at_s=50) == f"whole run {20 + 1000 * 35 / 600:.0f} s left"


def test_a_resumed_phase_counts_what_it_does_itself() -> None:
    run = Run(phase("00"), phase("01"))
    run.take(events.phase_started("00", "cpu"), 0)
    run.take(events.training("00", "normal"), 10)
    run.step("00", 70, 100, at_s=20)
    assert run.step("00", 80, 100, at_s=30) == "whole run 2 min left"  # 20 s, and 100 s + 10 s of phase 01


def test_a_phase_that_begins_again_has_not_started_workers_for_so_long() -> None:
    run = Run(phase("00"), phase("01"))
    for at_s in (0, 100):  # its worker dies after 20 steps
        run.take(events.phase_started("00", "cpu"), at_s)
        run.take(events.training("00", "normal"), at_s + 10)
        run.step("00", 10, 100, at_s=at_s + 20)
        left = run.step("00", 20, 100, at_s=at_s + 30)
    assert left == "whole run 3 min left"  # 80 s, and 100 s + 10 s of phase 01


def test_answers_take_what_they_took_in_an_evaluation_of_the_same_kind(tmp_path: Path) -> None:
    wanted = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "t.jsonl"}], "scoring": "letter"})
    assert find_evaluation_s(tmp_path, "base", 100, wanted) is None
    report = {
        "config": {"evaluation": wanted.model_dump(mode="json")},
        "hashes": {"base_files": "base", "stages": {"base": [], "00": []}},
        **{"seconds": 30.0, "seconds_to_first_answer": 10.0, "questions_asked": 50},
    }
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    (tmp_path / "run" / "evaluation" / "report.json").write_text(json.dumps(report))
    assert find_evaluation_s(tmp_path, "base", 200, wanted) == 10.0 + 20.0 * 200 / 100
    assert find_evaluation_s(tmp_path, "other", 200, wanted) is None
    other = wanted.model_copy(update={"scoring": "generate"})
    assert find_evaluation_s(tmp_path, "base", 200, other) is None
    (tmp_path / "run" / "evaluation" / "report.json").write_text(json.dumps({**report, "seconds": None}))
    assert find_evaluation_s(tmp_path, "base", 200, wanted) is None
