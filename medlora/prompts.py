"""Every word that a model is shown: record -> Example(prompt, completion).

The prompt is the text of the user's turn; `tokens/encode` puts it into the tokenizer's chat template where it has one.
Templates and `evaluation/answers/letter` are one idea: `extract_answer_letter(example.completion)` gives the record's
answer back in every style.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medlora.records import FIELDS, LETTERS, McqRecord, Record, TextRecord, TranslationRecord

MCQ_STYLES = ("reasoning", "reasoning_full", "answer", "kormedmcqa")
"""`reasoning`: rationale fields, then the letter. `reasoning_full`: the same behind a description of the fields and a
worked example. `answer`: the letter alone. `kormedmcqa`: raw text, byte for byte that of the task `kormedmcqa` v3 of
lm-evaluation-harness (tasks/kormedmcqa/_template_yaml)."""

ANSWER_FIELD = "answer:\n"
"""What a reasoning completion shows right before its letter; scoring places the letter's log-likelihood behind it."""

KORMEDMCQA_FIELD = "정답："
"""What a `kormedmcqa` prompt ends with; a space and the letter follow. The colon is the full-width U+FF1A."""

KORMEDMCQA_STOPS = ("Q:", "</s>", "<|im_end|>", ".", "\n\n")
"""Where the task `kormedmcqa` of lm-evaluation-harness ends what the model writes (`until`)."""

_FIELD_MEANING = {
    "facts": "문제에 주어진 핵심 소견",
    "candidates": "가능한 선택지",
    "criteria": "판단 기준",
    "analysis": "선택지 분석",
    "evaluation": "최종 평가",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn or to answer: the loss is on `completion` only; an empty `prompt` means plain text.

    `chat` is whether the prompt is a user's turn (chat template where the tokenizer has one) or raw text. `shots` are
    solved examples that precede it as turns of their own: (prompt, completion) each; raw text holds its own.
    """

    prompt: str
    completion: str
    chat: bool = True
    shots: tuple[tuple[str, str], ...] = ()


def render_question(record: McqRecord) -> str:
    """The question and its lettered options, one a line."""
    return f"질문: {_render_options(record)}"


def _render_options(record: McqRecord) -> str:
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False))
    return f"{record.question.strip()}\n{options}"


def render_mcq(
    record: McqRecord, style: str = "reasoning", worked: McqRecord | None = None, shots: Sequence[McqRecord] = ()
) -> Example:
    """A question in one of MCQ_STYLES; `worked` is the solved example that `reasoning_full` shows first.

    `shots` are solved questions shown before this one in the same style (few-shot), in their order.
    Raises ValueError for an unknown style, or `reasoning_full` without a worked example.
    """
    if style == "kormedmcqa":
        solved = [f"{_render_kormedmcqa(shot)} {shot.answer}\n\n" for shot in shots]
        return Example("".join(solved) + _render_kormedmcqa(record), f" {record.answer}", chat=False)
    example = _render_chat(record, style, worked)
    # A worked example is shown once: the shots of `reasoning_full` look like those of `reasoning`.
    shown = [_render_chat(shot, "reasoning" if style == "reasoning_full" else style) for shot in shots]
    return replace(example, shots=tuple((shot.prompt, shot.completion) for shot in shown))


def _render_kormedmcqa(record: McqRecord) -> str:
    return f"{_render_options(record)}\n{KORMEDMCQA_FIELD}"


def _render_chat(record: McqRecord, style: str, worked: McqRecord | None = None) -> Example:
    question = render_question(record)
    if style == "answer":
        return Example(f"{question}\n정답:", record.answer)
    if style == "reasoning":
        return Example(f"{question}\n풀이:", _reasoning_completion(record))
    if style == "reasoning_full":
        if worked is None:
            raise ValueError("style reasoning_full needs a worked example")
        fields = [*FIELDS] if not worked.rationale else [name for name in FIELDS if name in worked.rationale]
        described = "\n".join(f"{name}: {_FIELD_MEANING[name]}" for name in fields)
        shown = f"{render_question(worked)}\n풀이:\n{_reasoning_completion(worked)}"
        return Example(
            f"형식:\n{described}\nanswer: 정답\n\n{shown}\n\n{question}\n풀이:", _reasoning_completion(record)
        )
    raise ValueError(f"unknown MCQ prompt style {style!r}; known: {', '.join(MCQ_STYLES)}")


def _reasoning_completion(record: McqRecord) -> str:
    shown = "".join(f"{name}: {record.rationale[name].strip()}\n" for name in FIELDS if name in record.rationale)
    return f"{shown}{ANSWER_FIELD}{record.answer}"


def render_translation(record: TranslationRecord) -> tuple[Example, Example]:
    """Both directions of a pair: English to Korean, then Korean to English."""
    return (
        Example(f"한국어로 번역:\n{record.english.strip()}", record.korean.strip()),
        Example(f"영어로 번역:\n{record.korean.strip()}", record.english.strip()),
    )


def render_text(record: TextRecord) -> Example:
    """A document as it is: no prompt, loss on every token."""
    return Example("", record.text, chat=False)


def render(record: Record, style: str = "reasoning", worked: McqRecord | None = None) -> tuple[Example, ...]:
    """All examples that a record gives: one for a text or a question, two for a translation pair."""
    if isinstance(record, TextRecord):
        return (render_text(record),)
    if isinstance(record, TranslationRecord):
        return render_translation(record)
    return (render_mcq(record, style, worked),)


def version() -> str:
    """A hash that changes exactly when a word of any template changes; part of every phase's fingerprint."""
    mcq = McqRecord("1", "Q", ("a", "b"), "B", rationale={name: name.upper() for name in FIELDS})
    bare = McqRecord("2", "Q", ("a", "b"), "A")
    examples = [render_mcq(record, style, mcq) for style in MCQ_STYLES for record in (mcq, bare)]
    examples += [render_mcq(bare, style, mcq, shots=(mcq,)) for style in MCQ_STYLES]
    examples += [*render_translation(TranslationRecord("3", "e", "k")), render_text(TextRecord("4", "t"))]
    return hashlib.sha256(repr(examples).encode()).hexdigest()[:12]
