"""Every word that a model is shown: record -> Example(prompt, completion).

The prompt is what stands in the user's turn; `encoding` puts it into the tokenizer's chat template where it has one.
Templates and `answers.parse` are one idea: `parse(example.completion)` gives the record's answer back in every style.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from medlora.records import FIELDS, LETTERS, McqRecord, Record, TextRecord, TranslationRecord

MCQ_STYLES = ("reasoning", "reasoning_full", "answer")
"""`reasoning`: rationale fields, then the letter. `reasoning_full`: the same behind a description of the fields and a
worked example. `answer`: the letter alone."""

ANSWER_FIELD = "answer:\n"
"""What a reasoning completion shows right before its letter; scoring places the letter's log-likelihood behind it."""

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

    `chat` says whether the prompt is a user's turn (chat template where the tokenizer has one) or raw text.
    """

    prompt: str
    completion: str
    chat: bool = True


def render_question(record: McqRecord) -> str:
    """The question and its lettered options, one a line."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False))
    return f"질문: {record.question.strip()}\n{options}"


def render_mcq(record: McqRecord, style: str = "reasoning", worked: McqRecord | None = None) -> Example:
    """A question in one of MCQ_STYLES; `worked` is the solved example that `reasoning_full` shows first.

    Raises ValueError for an unknown style, or `reasoning_full` without a worked example.
    """
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
    """All examples that a record stands for: one for a text or a question, two for a translation pair."""
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
    examples += [*render_translation(TranslationRecord("3", "e", "k")), render_text(TextRecord("4", "t"))]
    return hashlib.sha256(repr(examples).encode()).hexdigest()[:12]
