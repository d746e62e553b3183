"""The same answers as lm-evaluation-harness's own code gives: its task, its prompts, its HFLM, its extraction.

Where the extraction of letters differs, the last test names each difference and what a reader sees there.

Needs the extra `eval-parity` (lm_eval) and the real questions; skips without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.config.model import BaseModelConfig
from medlora.config.sources import SourceConfig
from medlora.data.sources import read
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import KORMEDMCQA_STOPS, render_mcq
from medlora.records import McqRecord

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval-parity]')")

from benchmarks.harness import LETTERS, ask, load_extraction, read_log_likelihoods, write_tasks  # noqa: E402 - needs lm_eval

QUESTIONS, SHOTS = 16, 5


@pytest.fixture(scope="module")
def harness(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The harness's tasks on real questions of all four subjects, and the folder they are in."""
    folder = tmp_path_factory.mktemp("tasks")
    test, dev = ((real_data / "kormedmcqa" / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("test", "dev"))
    return write_tasks(folder, test.splitlines()[::18][:QUESTIONS], dev.splitlines()[:SHOTS], max_gen_toks=24), folder


@pytest.fixture(scope="module", params=["gemma", "llama"])
def loaded(request: pytest.FixtureRequest, bases: dict[str, str]) -> tuple[Any, Any]:
    config = BaseModelConfig(model=bases[request.param])
    tokenizer = load_tokenizer(config)
    return load_base(config, tokenizer), tokenizer


def ask_harness(harness: Any, loaded: tuple[Any, Any], task: str, shots: int) -> list[dict[str, Any]]:
    return ask(harness[0], *loaded, task, shots, batch_size=4)


def read_records(harness: Any) -> tuple[list[McqRecord], list[McqRecord]]:
    return tuple([*read(SourceConfig(source=str(harness[1] / f"{name}.jsonl")))] for name in ("test", "fewshot"))  # type: ignore


@pytest.mark.parametrize("k", [0, SHOTS])
def test_the_prompt_is_the_harness_s_byte_for_byte(harness: Any, loaded: Any, k: int) -> None:
    records, shots = read_records(harness)
    samples = ask_harness(harness, loaded, "local_generate", k)
    assert len(samples) == len(records) == QUESTIONS
    for record, sample in zip(records, samples, strict=True):
        context, settings = sample["arguments"][0]
        assert render_mcq(record, "kormedmcqa", shots=shots[:k]).prompt.encode() == context.encode()
        assert tuple(settings["until"])[: len(KORMEDMCQA_STOPS)] == KORMEDMCQA_STOPS
        assert sample["target"] == record.answer


@pytest.mark.parametrize("k", [0, SHOTS])
def test_letters_have_the_harness_s_log_likelihoods(harness: Any, loaded: Any, k: int) -> None:
    records, shots = read_records(harness)
    answers = McqAnswerer(*loaded, AnswerSettings(style="kormedmcqa", shots=shots[:k])).answer(records)
    samples = ask_harness(harness, loaded, "local_letters", k)
    for answer, sample in zip(answers, samples, strict=True):
        theirs = read_log_likelihoods(sample)
        assert answer.choice == LETTERS[theirs.index(max(theirs))]
        # A tokenizer that keeps the space apart adds the same number to every letter's.
        gap = theirs[0] - answer.log_likelihoods[0]
        assert [x - gap for x in theirs] == pytest.approx(answer.log_likelihoods, abs=2e-3)
        assert len(loaded[1].tokenize(" A")) == 2 or gap == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("normalisation", "metric"), [("sum", "acc"), ("character", "acc_norm")])
@pytest.mark.parametrize("k", [0, SHOTS])
def test_option_texts_score_as_acc_and_acc_norm(
    harness: Any, loaded: Any, k: int, normalisation: Any, metric: str
) -> None:
    records, shots = read_records(harness)
    answers = McqAnswerer(
        *loaded, AnswerSettings(style="kormedmcqa", shots=shots[:k], scoring="option_text", normalisation=normalisation)
    ).answer(records)
    samples = ask_harness(harness, loaded, "local_texts", k)
    for record, answer, sample in zip(records, answers, samples, strict=True):
        assert answer.log_likelihoods == pytest.approx(read_log_likelihoods(sample), rel=1e-4)
        assert (answer.choice == record.answer) == bool(sample[metric])


@pytest.mark.parametrize("k", [0, SHOTS])
def test_the_generated_text_is_the_harness_s(harness: Any, loaded: Any, k: int) -> None:
    records, shots = read_records(harness)
    answers = McqAnswerer(
        *loaded, AnswerSettings(style="kormedmcqa", shots=shots[:k], scoring="generate", max_tokens=24)
    ).answer(records)
    samples = ask_harness(harness, loaded, "local_generate", k)
    assert [answer.text for answer in answers] == [sample["resps"][0][0] for sample in samples]


@pytest.mark.parametrize("text", [" B", " B.", "B", "정답: C", "정답은 D입니다", " C\n", "A. 편두통", " E ", "정답:A"])
def test_plain_answers_are_extracted_alike(text: str) -> None:
    assert extract_answer_letter(text) == load_extraction()(text)


@pytest.mark.parametrize(
    ("text", "meant", "theirs", "why"),
    [
        (
            "정답：B\n해설: A. 편두통은 아니다",
            "B",
            "A",
            "its colon is ASCII alone: the prompt's own full-width one is no cue",
        ),
        ("B입니다", "B", "", "Hangul is a word character, so that its `\\b` finds no end of the letter"),
        ("C가 정답입니다", "C", "", "the same"),
        ("3번", "C", "", "it knows letters alone"),
        ("비타민 A 결핍", None, "A", "it takes any letter that stands alone"),
        ("A는 아니고 B도 아닙니다", None, "", "nothing is chosen; both say so"),
        ("정답은 A가 아니라 C입니다", "C", "", "its cue wants the letter and nothing between"),
    ],
)
def test_where_extraction_differs_ours_reads_what_was_meant(text: str, meant: str, theirs: str, why: str) -> None:
    assert extract_answer_letter(text) == meant, why
    assert load_extraction()(text) == theirs, why
