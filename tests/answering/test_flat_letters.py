"""Letters from flat batches are those of padded ones."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.likelihoods import flat_letters
from medlora.answering.likelihoods.flat_letters import FlatScorer, lay_out
from medlora.model.chain import activate
from tests.answering.test_answerer import QUESTIONS, SHOTS
from tests.answering.test_decoder import load
from tests.support.tiny import FAMILIES


def test_contexts_lie_one_after_another_behind_what_they_share() -> None:
    start = list(range(100, 120))
    flat = lay_out([[*start, 1, 2, 3], [*start, 4], [*start, 5, 6]])
    assert flat.ids == [*start, 1, 2, 3, 4, 5, 6]
    assert flat.positions == [*range(20), 20, 21, 22, 20, 20, 21]
    assert flat.segments == [(0, 20, 0), (20, 23, 20), (23, 24, 20), (24, 26, 20)]
    assert [flat.ids[i] for i in flat.last] == [3, 4, 6]


def test_a_context_that_all_others_begin_with_has_a_last_token_of_its_own() -> None:
    start = list(range(20))
    flat = lay_out([start, [*start, 7]])
    assert flat.segments == [(0, 19, 0), (19, 20, 19), (20, 22, 19)] and [flat.ids[i] for i in flat.last] == [19, 7]


def test_a_short_beginning_is_computed_for_each() -> None:
    assert lay_out([[1, 2, 3], [1, 2, 4]]).segments == [(0, 3, 0), (3, 6, 0)]
    assert lay_out([list(range(30))]).segments == [(0, 30, 0)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("style", "shots"), [("answer", ()), ("kormedmcqa", SHOTS)])
def test_letters_are_those_of_padded_batches(bases: dict[str, str], family: str, style: Any, shots: Any) -> None:
    """A prefix beyond the sliding window of 8, stacked adapters, passes of several sizes."""
    model, tokenizer = load(bases[family])
    questions = [q for q in QUESTIONS if len(q.options) <= 5]
    fast = FastPaths(model)
    assert fast.keeps_contexts_apart()
    fast.is_flat = True
    for stage in ([], ["a", "b"]):
        activate(model, stage)
        plain = McqAnswerer(model, tokenizer, AnswerSettings(style=style, shots=shots)).answer(questions)
        for budget in (None, 300, 1):
            settings = AnswerSettings(style=style, shots=shots, token_budget=budget)
            found = McqAnswerer(model, tokenizer, settings, fast).answer(questions)
            for a, b in zip(found, plain, strict=True):
                assert a.choice == b.choice and a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=1e-4)


def test_passes_are_full_and_contexts_are_taken_when_they_are_needed() -> None:
    scorer = FlatScorer(torch.nn.Linear(1, 1), tokens=100)  # type: ignore[arg-type]
    taken = []

    def stream() -> Any:
        for i in range(10):
            taken.append(i)
            yield [*range(50), *[100 + i] * 10]

    seen = []
    for batch in scorer._cut(stream()):
        seen.append((len(batch), len(taken)))
    assert seen == [(5, 6), (5, 10)]


def test_out_of_memory_halves_the_passes_and_is_said_once(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(bases["gemma"])
    contexts = [[7 + i, 8, 9, 10] for i in range(8)]
    letters = [[20, 21 + i] for i in range(8)]
    expected = FlatScorer(model, 1000).score(contexts, letters)
    compute, sizes = flat_letters.compute_flat_logits, []

    def limited(model: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, batch)

    monkeypatch.setattr(flat_letters, "compute_flat_logits", limited)
    with caplog.at_level(logging.WARNING):
        found = FlatScorer(model, 1000).score(iter(contexts), letters)
    assert sizes == [8, 4, 2, 2, 4, 2, 2] and len(caplog.records) == 1
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    monkeypatch.setattr(flat_letters, "compute_flat_logits", lambda *a: limited(model, [0, 1, 2]))
    with pytest.raises(torch.OutOfMemoryError):
        FlatScorer(model, 1).score(contexts, letters)
