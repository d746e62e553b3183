"""The columns of a row decide its schema; a schema names the columns of question, options and answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from medlora.bounds import list_names, name_type
from medlora.config.sources import AnswerColumn, Columns
from medlora.data.rows.exam_columns import match_columns
from medlora.records import LETTERS

LETTER_COLUMNS = tuple(LETTERS)
"""Of options in a column each."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A known shape of rows: `needs` are the columns by which it is known, `columns` where everything is.

    `answer_text` is a column that repeats the answer as text, held against the letter. `pinned`: answers are letters or
    numbers, never texts, so that an option that is a bare letter or number cannot be meant. `cut` is what the question
    repeats of the options.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    columns: Columns
    answer_text: str | None = None
    pinned: bool = False
    cut: str = ""

    @property
    def kind(self) -> str:
        """What its rows become: text, translation or mcq."""
        return "mcq" if self.columns.question else "text" if self.columns.text else "translation"


def _mcq(answer: str, base: object, options: object, question: str = "question", **more: object) -> Columns:
    column = AnswerColumn(column=answer, base=base)
    return Columns(question=question, options=options, answer=column, id="id", **more)


_OPTIONS = ("opa", "opb", "opc", "opd")


SCHEMAS = (
    Schema(
        "medmcqa",
        "MedMCQA: opa..opd, cop from 0 (hub) or 1 (files of MIRAGE), as the data shows",
        ("question", *_OPTIONS, "cop"),
        _mcq("cop", "data", _OPTIONS, subject="subject_name", rationale="exp"),
        pinned=True,
    ),
    Schema(
        "medqa",
        "MedQA: a mapping of options, the answer's letter and its text",
        ("question", "options", "answer_idx"),
        _mcq("answer_idx", 1, "options", subject="meta_info"),
        answer_text="answer",
        pinned=True,
    ),
    Schema(
        "medxpertqa",
        "MedXpertQA: a list of up to ten {letter, content}, a label",
        ("question", "options", "label"),
        _mcq("label", 1, "options", subject="body_system"),
        pinned=True,
        cut=r"\nAnswer Choices: \(A\) .*",
    ),
    Schema(
        "frenchmedmcqa",
        "FrenchMedMCQA: a mapping of answers, a list of the right ones",
        ("question", "answers", "correct_answers"),
        _mcq("correct_answers", 1, "answers", subject="subject_name"),
        pinned=True,
    ),
    Schema(
        "cmexam",
        "CMExam: a list of choices, a list of the right ones",
        ("problem_text", "choices", "answer"),
        _mcq("answer", 1, "choices", "problem_text").model_copy(update={"id": "problem_id"}),
    ),
    Schema(
        "choices",
        "a list of choices, the answer's number, letter or text (MMLU on the hub)",
        ("question", "choices", "answer"),
        _mcq("answer", "data", "choices", subject="subject"),
    ),
    Schema(
        "options",
        "a list or mapping of options, the answer's number from 1, letter or text",
        ("question", "options", "answer"),
        _mcq("answer", 1, "options", subject="subject"),
    ),
    Schema(
        "letters",
        "question, A, B, ..., answer as letter or number from 1 (KorMedMCQA; MMLU's csv without header)",
        ("question", "A", "B", "answer"),
        _mcq("answer", 1, LETTER_COLUMNS, subject="subject"),
    ),
    Schema(
        "arc",
        "ARC, CommonsenseQA: choices as {text, label}, the key of the answer",
        ("question", "choices", "answerKey"),
        _mcq("answerKey", 1, "choices", subject="subject"),
    ),
    Schema(
        "openbookqa",
        "OpenBookQA: as ARC, with question_stem",
        ("question_stem", "choices", "answerKey"),
        _mcq("answerKey", 1, "choices", "question_stem"),
    ),
    Schema(
        "translation", "english, korean", ("english", "korean"), Columns(english="english", korean="korean", id="id")
    ),
    Schema("translation-codes", "en, ko", ("en", "ko"), Columns(english="en", korean="ko", id="id")),
    Schema("text", "text; lines of plain text", ("text",), Columns(text="text", id="id")),
)
"""In the order in which they are looked for; behind them those of EXAMS, which are known by more than one name."""


EXAMS = {
    "exam": Schema(
        "exam",
        "Korean exams: 문제 (문항, 질문), 보기1.. (선택지1, ①, 1번), 정답, also 해설, 과목",
        ("question", "A", "B", "answer"),
        _mcq("answer", 1, LETTER_COLUMNS, subject="subject"),
    ),
    "table": Schema(
        "table",
        "question, option1.. (choice_a), answer; whether numbers begin with 0 or 1 is as the data shows",
        ("question", "A", "B", "answer"),
        _mcq("answer", "data", LETTER_COLUMNS, subject="subject"),
    ),
    "exam-list": Schema(
        "exam-list",
        "Korean exams with all options in one column: 문제, 보기 (선택지), 정답",
        ("question", "options", "answer"),
        _mcq("answer", 1, "options", subject="subject"),
    ),
}


def find_schema(rows: Iterable[object], kind: str = "auto") -> Schema | None:
    """The schema of the first of `rows` that has all columns of one, of that kind; None when no row has."""
    for row in rows:
        if isinstance(row, Mapping):
            for schema in SCHEMAS:
                if (kind == "auto" or schema.kind == kind) and all(column in row for column in schema.needs):
                    return schema
            if kind in ("auto", "mcq") and (renamed := match_columns(tuple(map(str, row)))[0]) is not None:
                korean = not renamed["answer"].isascii()
                return EXAMS["exam-list" if "options" in renamed else "exam" if korean else "table"]
    return None


def make_schema(columns: Columns) -> Schema:
    """The schema of columns that a config names."""
    answer = columns.answer
    wanted = [columns.text, columns.english, columns.korean, columns.question]
    wanted += [columns.subject, columns.rationale, columns.id]
    wanted.append(answer.column if isinstance(answer, AnswerColumn) else answer)
    options = columns.options
    wanted += [options] if isinstance(options, str) or options is None else options
    pinned = isinstance(answer, AnswerColumn) and answer.base != "data"
    return Schema("columns", "as the config says", tuple(column for column in wanted if column), columns, pinned=pinned)


def suggest(name: str, names: Iterable[object]) -> str | None:
    """The one of the first `names` that is spelled most like `name`."""
    short = [str(each) for each in islice(names, 200) if len(str(each)) <= 60]
    return next(iter(difflib.get_close_matches(name, short, 1, 0.7)), None)


def explain_no_schema(row: object, kind: str = "auto") -> str:
    """Why no known schema fits a row: its columns, what is nearest, what is known."""
    if not isinstance(row, Mapping):
        return f"a row is a mapping of columns, found {name_type(row)}"
    known = [schema for schema in SCHEMAS if kind in ("auto", schema.kind)]
    nearest = max(known, key=lambda schema: sum(column in row for column in schema.needs) / len(schema.needs))
    missing = [column for column in nearest.needs if column not in row]
    close = suggest(missing[0], row)
    hint = f" (is it {close}?)" if close else ""
    if twice := match_columns(tuple(map(str, row)))[1]:
        return f"{twice}; name the columns: columns: {{question: ..., options: [...], answer: ...}}"
    near = f"nearest: {nearest.name}, without {', '.join(missing)}{hint}; "
    shapes = " | ".join(", ".join(schema.needs) for schema in known)
    return (
        f"unknown schema (columns {list_names(row) or 'none'}); "
        f"{near if len(missing) < len(nearest.needs) else ''}known: {shapes}; or name the columns: columns: {{...}}"
    )
