"""What a run prints while it works: places, losses, dev scores and times in words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from medlora.config.phase import PhaseConfig
from medlora.events import Event, finished, planned
from medlora.reporting.progress import Display, describe_times
from medlora.reporting.results.story import describe_phases
from medlora.runs.files import append_json
from medlora.runs.folders import RunFolder


def step(number: int, loss: float) -> Event:
    return {
        **{"event": "step", "phase": "01", "segment": "normal", "step": number, "steps": 9, "loss": loss},
        **{"learning_rate": 1.0, "grad_norm": 1.0, "tokens_per_s": 9.0, "peak_memory_mib": 1.0},
    }  # type: ignore[return-value]


def dev(number: int, accuracy: float) -> Event:
    shown = {"accuracy": accuracy, "score": accuracy, "questions": 32, "seconds": 1.0}
    return {"event": "validation", "phase": "01", "segment": "normal", "step": number, **shown}  # type: ignore[return-value]


def test_a_phase_is_told_by_place_losses_and_dev(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Console(width=120, highlight=False), phases={"00": "", "01": "questions [b]"})
    events: list[Event] = [
        {"event": "phase", "phase": "01", "device": "cpu"},
        *(step(1, 5.0), dev(1, 0.625), step(2, 3.5), dev(2, 0.5), dev(3, 0.75)),
        {"event": "finished", "phase": "01", "seconds": 16.0, "around_s": 2.0},
    ]
    for event in events:
        display.show(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "01  phase 2 of 2 (questions [b]), on cpu",
        "01  dev at step 1: accuracy 62.5 % (n 32)",
        "01  dev at step 2: accuracy 50.0 % (n 32)  best so far 62.5 %",
        "01  dev at step 3: accuracy 75.0 % (n 32)  best so far",
        "01  done in 16 s: loss 5.000 -> 3.500, and 2 s to start and end its workers",
    ]


def test_times_have_their_words() -> None:
    assert describe_times(16.2, 1.1) == "16 s, 1 s left"
    assert describe_times(600, None) == "10 min" and describe_times(0, 9000) == "0 s, 2.5 h left"


def test_a_description_is_no_part_of_a_dump_that_does_not_use_it() -> None:
    plain = PhaseConfig.model_validate({"name": "00", "chain": "new", "sources": [{"source": "a.jsonl"}]})
    assert "description" not in plain.model_dump(mode="json")
    described = plain.model_copy(update={"description": "plain text"})
    assert described.model_dump(mode="json")["description"] == "plain text"


def test_curves_of_two_segments_are_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folder = run.phase("02")
    folder.root.mkdir(parents=True)
    for segment, number, loss in (("full", 5, 5.0), ("full", 10, 4.0), ("normal", 5, 3.0)):
        append_json(folder.metrics, {"segment": segment, "step": number, "loss": loss, "tokens_per_s": 7.0})
    append_json(folder.validation, {"segment": "normal", "step": 5, "accuracy": 0.5, "score": 0.5})
    phase = PhaseConfig.model_validate(
        {"name": "02", "description": "d", "chain": "new", "sources": [{"source": "a.jsonl"}]}
    )
    counts = {"full": {"0:a": {"tokens": 50}}, "normal": {"0:a": {"tokens": 90}, "00.0:b": {"tokens": 10}}}
    manifest = {"seconds": {"all": 9.0, "base": 1.0}, "counts": counts}
    (row,) = describe_phases(run, [phase], {"02": manifest})
    assert row["loss"] == [[5, 5.0], [10, 4.0], [15, 3.0]] and row["dev"] == [[5, 0.5]]
    assert (row["seconds"], row["tokens_per_s"], row["description"]) == (8.0, 7.0, "d")
    assert row["tokens"] == 90 + 10


def test_a_terminal_shows_that_workers_start_until_the_first_step() -> None:
    display = Display(Console(file=io.StringIO(), force_terminal=True, width=120), phases={"01": ""})

    def read_bars() -> list[tuple[str, float | None, str]]:
        return [(task.description, task.total, task.fields["figures"]) for task in display.progress.tasks]

    display.show({"event": "note", "phase": "data", "text": "read"})
    assert read_bars() == []
    display.show({"event": "note", "phase": "01", "text": "starting 1 worker"})
    assert read_bars() == [("01", None, "workers start")]
    display.show({"event": "phase", "phase": "01", "device": "cpu"})
    assert read_bars() == [("01", None, "workers start")]
    display.progress.get_renderable()
    display.show(step(1, 5.0))
    ((name, total, figures),) = read_bars()
    assert (name, total) == ("01", 9) and figures.startswith("loss 5.000")
    display.show({"event": "finished", "phase": "01", "seconds": 16.0, "around_s": 2.0})
    assert read_bars() == []


class Fixed:
    """An outlook that always says the same."""

    def take(self, event: Event) -> None:
        self.seen = event["event"]

    def describe(self) -> str:
        return "whole run 3 min left"


def test_the_end_of_the_whole_run_is_told_in_the_same_words_on_a_terminal_and_when_piped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display(Console(width=120, highlight=False), phases={"01": ""}, outlook=Fixed())
    for event in (planned([], False, None), step(9, 5.0), finished("01", 16.0)):
        display.show(event)
    assert capsys.readouterr().out.splitlines() == [
        "plan  whole run 3 min left, by what earlier runs measured",
        "01  9/9  loss 5.000  9 tokens/s  1 MiB  0 s, whole run 3 min left",
        "01  done in 16 s; whole run 3 min left",
    ]
    shown = io.StringIO()
    display = Display(Console(file=shown, force_terminal=True, width=120), phases={"01": ""}, outlook=Fixed())
    display.show(step(5, 5.0))
    Console(file=shown, width=160).print(display.progress.get_renderable())
    assert "0 s, whole run 3 min left" in shown.getvalue()
