from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from medlora.answering import answerer as answerer_module
from medlora.answering.answerer import Answer, AnswerSettings, McqAnswerer
from medlora.answering.generation import Sampling, Stops, generate
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter
from medlora.model.tokenizer import letter_token_ids, load_tokenizer
from medlora.prompts import ANSWER_FIELD, render_mcq
from medlora.records import FIELDS, McqRecord
from medlora.tokens.encode import encode_prompts, encode_texts
from tests.support.tiny import FAMILIES

WORDS = ["아스피린", "인슐린", "췌장", "해열", "진통제", "열", "text", "about", "and", "answer", "이다", "나온다"]


def make_question(i: int, options: int = 5) -> McqRecord:
    """Questions of very different lengths; some are shorter than the tiny models' window of 8 tokens, most are not."""
    draw = random.Random(i)
    words = " ".join(draw.choices(WORDS, k=draw.randint(1, 25)))
    texts = tuple(f"{draw.choice(WORDS)} {k} {' '.join(draw.choices(WORDS, k=k % 3))}" for k in range(options))
    rationale = {FIELDS[3]: "인슐린 은 췌장"} if i % 2 else {}
    return McqRecord(f"q{i}", words, texts, "AB"[i % 2], rationale=rationale)


QUESTIONS = [make_question(i, options=2 + i % 9) for i in range(12)]
SHOTS = [make_question(i) for i in range(100, 103)]
WORKED = make_question(201)


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, bases: dict[str, str]) -> tuple[Any, Any]:
    return load(bases[request.param])


@pytest.fixture
def gemma(bases: dict[str, str]) -> tuple[Any, Any]:
    return load(bases["gemma"])


@pytest.fixture
def llama(bases: dict[str, str]) -> tuple[Any, Any]:
    """Its tokenizer gives every text back."""
    return load(bases["llama"])


def load(folder: str) -> tuple[Any, Any]:
    config = BaseModelConfig(model=folder)
    tokenizer = load_tokenizer(config)
    return load_base(config, tokenizer), tokenizer


def shake(model: Any) -> None:
    """An adapter that does something: LoRA starts as nothing."""
    torch.manual_seed(0)
    for key, weight in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.3)


@torch.no_grad()
def log_likelihoods(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of every next token after every token of one sequence alone: no batch, no padding, no cache."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().log_softmax(-1)


def naive_letters(model: Any, tokenizer: Any, record: McqRecord, style: str, shots: Any, worked: Any) -> list[float]:
    (ids,) = encode_prompts(tokenizer, [render_mcq(record, style, worked, shots)])
    before, space = {"answer": ("", ""), "kormedmcqa": ("정답：", " ")}.get(style, (ANSWER_FIELD, ""))
    if style.startswith("reasoning"):
        ids += encode_texts(tokenizer, [ANSWER_FIELD])[0]
    if space and len(tokenizer.tokenize(" A")) == 2:
        ids += encode_texts(tokenizer, [space])[0]
        before, space = before + space, ""
    letters = letter_token_ids(tokenizer, [space + letter for letter in record.letters], before)
    return log_likelihoods(model, ids)[-1][letters].tolist()


def same(a: Answer, b: Answer) -> bool:
    return (a.choice, a.text, a.samples) == (b.choice, b.text, b.samples) and all(
        x == pytest.approx(y, abs=1e-4)
        for x, y in ((a.log_likelihoods, b.log_likelihoods), (a.probabilities, b.probabilities))
    )


@pytest.mark.parametrize(
    ("style", "shots", "worked"),
    [
        ("answer", (), None),
        ("answer", SHOTS, None),
        ("reasoning", SHOTS, None),
        ("reasoning_full", (), WORKED),
        ("kormedmcqa", SHOTS, None),
    ],
)
def test_letters_are_scored_as_one_question_at_a_time_would_be(
    loaded: Any, style: Any, shots: Any, worked: Any
) -> None:
    model, tokenizer = loaded
    answerer = McqAnswerer(model, tokenizer, AnswerSettings(style=style, shots=shots, worked=worked, token_budget=200))
    # The byte-level tokenizer has " A" to " E" alone; the marked one keeps the space apart.
    questions = [make_question(i) for i in range(12)] if style == "kormedmcqa" else QUESTIONS
    for record, answer in zip(questions, answerer.answer(questions), strict=True):
        expected = naive_letters(model, tokenizer, record, style, shots, worked)
        assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert answer.choice == record.letters[expected.index(max(expected))]
        assert sum(answer.probabilities) == pytest.approx(1)
        first, second = sorted(answer.probabilities, reverse=True)[:2]
        assert answer.margin == pytest.approx(first - second)
    if shots or worked:
        assert answerer._prefix is not None and len(answerer._prefix.ids) > 16


SCORINGS = [("letter", "reasoning"), ("generate", "kormedmcqa"), ("reason", "reasoning"), ("option_text", "answer")]


@pytest.mark.parametrize(("scoring", "style"), SCORINGS)
def test_neither_the_budget_nor_the_order_changes_an_answer(gemma: Any, scoring: Any, style: Any) -> None:
    model, tokenizer = gemma
    expected: list[Answer] | None = None
    for budget, order in ((1, 1), (150, -1), (100_000, 1)):
        answerer = McqAnswerer(
            model,
            tokenizer,
            AnswerSettings(scoring=scoring, style=style, shots=SHOTS, max_tokens=12, token_budget=budget),
        )
        answers = answerer.answer(QUESTIONS[::order])[::order]
        expected = expected or answers
        assert all(same(a, b) for a, b in zip(answers, expected, strict=True))


def test_a_switch_of_stage_computes_the_prefix_anew_and_leaves_the_others_alone(gemma: Any) -> None:
    model, tokenizer = gemma
    model = add_adapter(model, "one", LoraSettings(r=2), [], 0)
    shake(model)
    answerer = McqAnswerer(model, tokenizer, AnswerSettings(style="answer", shots=SHOTS))
    seen = []
    for stage in (["one"], [], ["one"]):
        activate(model, stage)
        answers = answerer.answer(QUESTIONS)
        for record, answer in zip(QUESTIONS, answers, strict=True):
            expected = naive_letters(model, tokenizer, record, "answer", SHOTS, None)
            assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
        seen.append([answer.log_likelihoods for answer in answers])
    assert seen[0] == seen[2] != seen[1]


def test_a_trained_step_computes_the_prefix_anew_and_a_second_call_does_not(
    gemma: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = gemma
    model = add_adapter(model, "one", LoraSettings(r=2), [], 0)
    shake(model)
    computed: list[int] = []
    compute = answerer_module.compute_prefix
    monkeypatch.setattr(answerer_module, "compute_prefix", lambda *a: (computed.append(1), compute(*a))[1])
    answerer = McqAnswerer(model, tokenizer, AnswerSettings(style="answer", shots=SHOTS))
    first = answerer.answer(QUESTIONS)
    kept = [tensor.clone() for layer in answerer._prefix.layers for tensor in layer]  # type: ignore[union-attr]
    assert answerer.answer(QUESTIONS) == first and len(computed) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (t for pair in answerer._prefix.layers for t in pair), strict=True)
    )  # type: ignore[union-attr]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.5)
    changed = answerer.answer(QUESTIONS[:1])[0]
    assert len(computed) == 2
    assert changed.log_likelihoods == pytest.approx(
        naive_letters(model, tokenizer, QUESTIONS[0], "answer", SHOTS, None), abs=1e-4
    )


@torch.no_grad()
def write_alone(model: Any, tokenizer: Any, ids: list[int], max_tokens: int) -> list[int]:
    """Greedy, without a cache, a batch or padding."""
    ids, start = list(ids), len(ids)
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[len(tokenizer) :] = -torch.inf
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["0-shot", "3-shot"])
def test_a_generated_text_is_the_one_a_model_writes_alone(loaded: Any, shots: Any) -> None:
    model, tokenizer = loaded
    answerer = McqAnswerer(
        model, tokenizer, AnswerSettings(scoring="generate", style="answer", shots=shots, max_tokens=12)
    )
    answers = answerer.answer(QUESTIONS[:6])
    for record, answer in zip(QUESTIONS[:6], answers, strict=True):
        (ids,) = encode_prompts(tokenizer, [render_mcq(record, "answer", shots=shots)])
        alone = write_alone(model, tokenizer, ids, 12)
        assert answer.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert answer.tokens == len(alone) + (len(alone) < 12)
        assert answer.probabilities == () and answer.margin is None


def bend_to_write(model: Any, tokenizer: Any, text: str) -> None:
    """Make the model answer every prompt with `text` and a stop token, by replacing what its forward returns."""
    script = [*encode_texts(tokenizer, [text])[0], tokenizer.eos_token_id]
    forward = model.forward

    def scripted(**inputs: Any) -> Any:
        out = forward(**inputs)
        if inputs.get("use_cache") and inputs["input_ids"].shape[1] > 1:
            scripted.steps = 0  # type: ignore[attr-defined]
        out.logits.zero_()
        out.logits[..., script[min(scripted.steps, len(script) - 1)]] = 9.0  # type: ignore[attr-defined]
        scripted.steps += 1  # type: ignore[attr-defined]
        return out

    model.forward = scripted


@pytest.mark.parametrize(("text", "choice"), [("answer: B", "B"), ("text about", None), ("answer: A or B", None)])
def test_what_says_no_letter_gets_none(llama: Any, text: str, choice: str | None) -> None:
    model, tokenizer = llama
    bend_to_write(model, tokenizer, text)
    answerer = McqAnswerer(model, tokenizer, AnswerSettings(scoring="generate", style="answer", max_tokens=30))
    (answer,) = answerer.answer(QUESTIONS[4:5])
    assert (answer.choice, answer.text) == (choice, text)


def test_the_words_of_the_harness_end_a_text_and_are_cut(llama: Any) -> None:
    model, tokenizer = llama
    bend_to_write(model, tokenizer, " B. text about")
    (answer,) = McqAnswerer(model, tokenizer, AnswerSettings(scoring="generate", style="kormedmcqa")).answer(
        QUESTIONS[4:5]
    )
    assert (answer.text, answer.choice) == (" B", "B")
    assert answer.tokens < len(encode_texts(tokenizer, [" B. text about"])[0])


def test_reasoning_goes_on_a_few_tokens_after_the_mark_and_always_ends_in_a_letter(llama: Any) -> None:
    model, tokenizer = llama
    bend_to_write(model, tokenizer, "analysis: text\nanswer:\nB" + " text" * 30)
    (answer,) = McqAnswerer(model, tokenizer, AnswerSettings(scoring="reason", max_tokens=60)).answer(QUESTIONS[4:5])
    assert answer.text.startswith("analysis: text\nanswer:\nB")
    assert answer.tokens < len(encode_texts(tokenizer, ["analysis: text\nanswer:\nB"])[0]) + 9
    assert answer.choice in QUESTIONS[4].letters and len(answer.probabilities) == len(QUESTIONS[4].options)


def test_the_letter_is_scored_behind_the_model_s_own_reasoning(gemma: Any) -> None:
    model, tokenizer = gemma
    answers = McqAnswerer(model, tokenizer, AnswerSettings(scoring="reason", max_tokens=10, shots=SHOTS)).answer(
        QUESTIONS
    )
    for record, answer in zip(QUESTIONS, answers, strict=True):
        (ids,) = encode_prompts(tokenizer, [render_mcq(record, "reasoning", shots=SHOTS)])
        reasoning = answer.text.split("answer:")[0].strip()
        ids += encode_texts(tokenizer, [f"{reasoning}\n{ANSWER_FIELD}" if reasoning else ANSWER_FIELD])[0]
        expected = log_likelihoods(model, ids)[-1][letter_token_ids(tokenizer, record.letters)].tolist()
        assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)


def test_samples_follow_the_seed_and_not_the_batch(gemma: Any) -> None:
    model, tokenizer = gemma

    def draw(seed: int, budget: int, records: Sequence[McqRecord] = QUESTIONS) -> list[Answer]:
        settings = AnswerSettings(
            scoring="generate", style="answer", max_tokens=8, samples=3, temperature=1.0, seed=seed, token_budget=budget
        )
        return McqAnswerer(model, tokenizer, settings).answer(records)

    one = draw(1, 5000)
    assert one == draw(1, 1) and draw(1, 300, QUESTIONS[3:]) == one[3:]
    assert [answer.text for answer in draw(2, 5000)] != [answer.text for answer in one]


def test_sampling_follows_the_model_s_probabilities(gemma: Any) -> None:
    model, tokenizer = gemma
    prompt = encode_texts(tokenizer, ["text about"])[0]
    logits = log_likelihoods(model, prompt)[-1][: len(tokenizer)] / 2
    expected = logits.softmax(-1)
    made = generate(model, tokenizer, [prompt] * 2000, 1, sampling=Sampling(2.0, range(2000)))
    token = int(expected[6:].argmax()) + 6
    share = sum(one.text == tokenizer.decode([token]) for one in made) / 2000
    twins = sum(
        float(p)
        for i, p in enumerate(expected)
        if tokenizer.decode([i], skip_special_tokens=True) == tokenizer.decode([token])
    )
    assert share == pytest.approx(twins, abs=0.035)


def test_the_majority_of_the_samples_wins_and_silence_does_not_vote() -> None:
    def read(*texts: str) -> Answer:
        return answerer_module._vote([answerer_module.Generated(text, 3) for text in texts], "ABCDE")

    voted = read("음", "정답: C", "모름", "정답: B", "답은 C")
    assert (voted.choice, voted.text, voted.tokens) == ("C", "정답: C", 15)
    assert voted.samples == (None, "C", None, "B", "C")
    assert read("정답: D", "정답: A").choice == "D"
    assert read("음", "모름").choice is None


@pytest.mark.parametrize("normalisation", ["sum", "token", "character"])
@pytest.mark.parametrize("style", ["answer", "reasoning", "kormedmcqa"])
def test_option_texts_are_scored_by_their_own_tokens(gemma: Any, normalisation: Any, style: Any) -> None:
    model, tokenizer = gemma
    answerer = McqAnswerer(
        model,
        tokenizer,
        AnswerSettings(scoring="option_text", style=style, shots=SHOTS, normalisation=normalisation, token_budget=300),
    )
    space = " " if style == "kormedmcqa" else ""
    choices = []
    for record, answer in zip(QUESTIONS, answerer.answer(QUESTIONS), strict=True):
        (context,) = encode_prompts(tokenizer, [render_mcq(record, style, shots=SHOTS)])
        context += encode_texts(tokenizer, [ANSWER_FIELD])[0] if style == "reasoning" else []
        expected, scores = [], []
        for option in record.options:
            ids = encode_texts(tokenizer, [space + option])[0]
            following = log_likelihoods(model, context + ids)[len(context) - 1 : -1]
            expected.append(float(following[range(len(ids)), ids].sum()))
            scores.append(expected[-1] / {"sum": 1, "token": len(ids), "character": len(option)}[normalisation])
        assert answer.log_likelihoods == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert answer.choice == record.letters[scores.index(max(scores))]
        choices.append(answer.choice)
    assert len({*choices}) > 1


def test_out_of_memory_halves_the_batch_and_is_said_once(gemma: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = gemma
    expected = McqAnswerer(model, tokenizer, AnswerSettings(style="answer")).answer(QUESTIONS)
    forward, sizes = model.forward, []

    def limited(**inputs: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 400 and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    model.forward = limited
    answerer = McqAnswerer(model, tokenizer, AnswerSettings(style="answer", token_budget=100_000))
    with caplog.at_level(logging.WARNING):
        answers = answerer.answer(QUESTIONS)
        failures = sum(size > 400 for size in sizes)
        answerer.answer(QUESTIONS)
    assert all(same(a, b) for a, b in zip(answers, expected, strict=True))
    assert failures >= 2 and len([r for r in caplog.records if "out of memory" in r.message]) == 1
    assert sum(size > 400 for size in sizes) == failures, "the second call knows what fits"


def test_one_question_that_does_not_fit_is_not_swallowed(gemma: Any) -> None:
    model, tokenizer = gemma

    def full(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        McqAnswerer(model, tokenizer, AnswerSettings(style="answer")).answer(QUESTIONS)


@pytest.mark.parametrize("style", ["answer", "kormedmcqa"])
def test_reason_needs_a_style_that_reasons(gemma: Any, style: Any) -> None:
    with pytest.raises(InputError, match="needs a reasoning style"):
        McqAnswerer(*gemma, AnswerSettings(scoring="reason", style=style))


def test_greedy_samples_are_refused(gemma: Any) -> None:
    with pytest.raises(InputError, match="temperature above 0"):
        McqAnswerer(*gemma, AnswerSettings(scoring="generate", samples=3))


def test_no_questions_no_answers(gemma: Any) -> None:
    assert McqAnswerer(*gemma).answer([]) == []
    assert generate(*gemma, [], 5, stops=Stops()) == []


def test_no_letter_is_chosen_among_numbers_that_are_none() -> None:
    with pytest.raises(FloatingPointError, match="log-likelihoods of AB are \\[-1.0, nan\\]"):
        answerer_module._choose("AB", [-1.0, float("nan")], [])


def test_letters_that_the_tokenizer_lacks_are_refused_before_the_model_is_loaded(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlora.answering.stage_model import StageModel
    from medlora.config.evaluation import EvaluationConfig

    def load(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("medlora.answering.stage_model.load_base", load)
    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "t.jsonl"}]})
    with pytest.raises(InputError, match="the tokenizer cannot answer '가'"):
        StageModel(BaseModelConfig(model=bases["gemma"]), {"base": ()}, config, letters="A가")
