"""Result files of other tools -> predictions; everything irregular is counted and named.

The format is that of the KorMedMCQA logs of hsr87/evaluate-llm-on-korean-dataset: a csv with the columns id, category,
trial, answer (gold), pred, response. Such files hold duplicates, conflicting rows, blanks and gaps. Nothing is guessed.
A question whose rows disagree has no choice, and its error gives the reason. A question without a usable gold letter is
left out. `LogCounts` names every such question.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medlora.errors import InputError
from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.evaluation.predictions import Prediction
from medlora.records import LETTERS

COLUMNS = ("id", "category", "trial", "answer", "pred", "response")


_BLANK = {"", "none", "nan", "null", "n/a"}


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What a result file held. Numbers count rows; tuples name questions by id, in the order of the file."""

    rows: int
    questions: int  # predictions, missing ones included
    repeated_rows: int  # further rows of a question that repeat its first
    without_id: int  # rows without an id; left out
    conflicting: tuple[str, ...]  # rows give different choices; no choice is taken
    blank: tuple[str, ...]  # no prediction in the file: unparsed
    not_a_letter: tuple[str, ...]  # a prediction that is none of the letters: unparsed
    gold_unusable: tuple[str, ...]  # gold missing, no letter, or different between rows; left out
    missing: tuple[str, ...]  # expected, but not in the file: failed
    unexpected: tuple[str, ...]  # in the file, but not expected; left out
    read_differently: tuple[str, ...]  # extract_answer_letter reads another letter (or none) from the raw response


@dataclass(frozen=True, slots=True)
class ResultLog:
    """One file's predictions, one per question, and what was irregular about it."""

    predictions: tuple[Prediction, ...]
    counts: LogCounts


def read_result_log(
    path: Path,
    stage: str = "",
    letters: str = LETTERS[:5],
    expected: Mapping[str, str] | None = None,
    reparse: bool = False,
    trial: str | None = None,
) -> ResultLog:
    """The predictions of one result file, as stage `stage` (default: the file's name), with tests named by `category`.

    `expected` maps the id of every question that was asked to its gold letter. Questions that the file lacks then become
    failed predictions, so that logs with gaps can be paired. Questions that are not in `expected` are left out. `reparse`
    takes `extract_answer_letter(response)` in place of the file's own `pred`. `trial` picks one of several runs in one file.
    Raises InputError when the file cannot be read, lacks a column, has no rows, or contradicts the gold letters of
    `expected`. It also does so when the file holds several trials and `trial` names none of them.
    """
    rows = _pick_trial(path, list(_rows(path)), trial)
    _refuse_two_meanings(path, rows, letters)
    groups = _group_by_question(rows)
    without_id = len(groups.pop("", []))
    reader = _Reader(path, stage or path.stem, letters, expected, reparse)
    for question, group in groups.items():
        reader.read_question(question, group)
    reader.add_missing(groups)
    if not reader.predictions:
        found = ", ".join(sorted({repr(row["answer"]) for row in rows})[:5])
        raise InputError(
            f"{path}: no row has a right option that can be read; column answer holds {found}; "
            f"write {letters[0]} to {letters[-1]} or 1 to {len(letters)}"
        )
    return ResultLog(tuple(reader.predictions), reader.count(len(rows), without_id))


def _pick_trial(path: Path, rows: list[dict[str, str]], trial: str | None) -> list[dict[str, str]]:
    """The rows of one trial; raises InputError when there are none, or when it is unclear which trial is meant."""
    if not rows:
        raise InputError(f"{path}: no rows behind the header; a result log needs one row per question")
    trials = sorted({row["trial"] for row in rows})
    if trial is None and len(trials) > 1 or trial is not None and trial not in trials:
        raise InputError(f"{path}: trials {', '.join(trials)} found; name one of them, not {trial!r}")
    return [row for row in rows if trial is None or row["trial"] == trial]


def _group_by_question(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


class _Reader:
    """Makes predictions of the rows of each question, and notes the questions that are irregular."""

    def __init__(self, path: Path, stage: str, letters: str, expected: Mapping[str, str] | None, reparse: bool) -> None:
        self.path, self.stage, self.letters, self.expected, self.reparse = path, stage, letters, expected, reparse
        self.predictions: list[Prediction] = []
        self.irregular: dict[str, list[str]] = {name: [] for name in LogCounts.__slots__ if name not in _NUMBERS}
        self.repeated_rows = 0

    def read_question(self, question: str, group: Sequence[dict[str, str]]) -> None:
        """Add the prediction of one question, unless its gold letter is unusable or it was not expected."""
        gold = self._find_gold(question, group)
        if gold is None:
            return
        choices = self._read_choices(question, group)
        error = ""
        if len(set(choices)) > 1:
            self.irregular["conflicting"].append(question)
            error = f"rows disagree: {', '.join(choice or 'no choice' for choice in dict.fromkeys(choices))}"
        elif choices[0] is None:
            blank = self.reparse or all(row["pred"].lower() in _BLANK for row in group)
            self.irregular["blank" if blank else "not_a_letter"].append(question)
        self.repeated_rows += sum(choice == choices[0] for choice in choices[1:])
        first, choice = group[0], None if error else choices[0]
        self._add(question, first["category"], gold, choice, error, first["response"])

    def _find_gold(self, question: str, group: Sequence[dict[str, str]]) -> str | None:
        """The gold letter on which all rows agree; None, with a note why, when the question is left out."""
        golds = {_read_choice(row["answer"], self.letters) or row["answer"] for row in group}
        if self.expected is not None and question not in self.expected:
            self.irregular["unexpected"].append(question)
            return None
        if len(golds) > 1 or not _is_letter(gold := next(iter(golds)), self.letters):
            self.irregular["gold_unusable"].append(question)
            return None
        if self.expected is not None and self.expected[question] != gold:
            raise InputError(
                f"{self.path}: question {question} has gold {gold}, expected was {self.expected[question]}"
            )
        return gold

    def _read_choices(self, question: str, group: Sequence[dict[str, str]]) -> Sequence[str | None]:
        """The choice of each row: the file's own, or with `reparse` the one in the raw response."""
        parsed = [extract_answer_letter(row["response"], self.letters) for row in group]
        stated = [_read_choice(row["pred"], self.letters) for row in group]
        if parsed != stated:
            self.irregular["read_differently"].append(question)
        return parsed if self.reparse else stated

    def add_missing(self, found: Container[str]) -> None:
        """Add a failed prediction for every expected question that the file lacks."""
        for question, gold in (self.expected or {}).items():
            if question not in found:
                self.irregular["missing"].append(question)
                self._add(question, question.rpartition("_")[0], gold, None, f"no row in {self.path.name}")

    def _add(self, question: str, test: str, gold: str, choice: str | None, error: str, text: str = "") -> None:
        options = len(self.letters)
        self.predictions.append(
            Prediction(question, test, self.stage, gold, choice, test, text=text, error=error, options=options)
        )

    def count(self, rows: int, without_id: int) -> LogCounts:
        """What the file held."""
        irregular = {name: tuple(questions) for name, questions in self.irregular.items()}
        return LogCounts(rows, len(self.predictions), self.repeated_rows, without_id, **irregular)


_NUMBERS = ("rows", "questions", "repeated_rows", "without_id")


def _rows(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # raw responses pass the default of 131,072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError(
                    f"{path}: columns {', '.join(absent)} missing; found {found}; needed {', '.join(COLUMNS)}"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}:{reader.line_num}: a row needs {len(reader.fieldnames or ())} cells")
                yield {name: row[name] if name == "response" else row[name].strip() for name in COLUMNS}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable UTF-8 csv file: {error}") from error


def _is_letter(text: str, letters: str) -> bool:
    return len(text) == 1 and text in letters


_CIRCLED = str.maketrans(
    {
        mark: f"{i}번"
        for row in ("①②③④⑤⑥⑦⑧⑨⑩", "❶❷❸❹❺❻❼❽❾❿", "㉠㉡㉢㉣㉤㉥㉦㉧㉨㉩", "㉮㉯㉰㉱㉲㉳㉴㉵㉶㉷")
        for i, mark in enumerate(row, 1)
    }
    | {0x24B6 + i: chr(65 + i) for i in range(10)}
    | {0x24D0 + i: chr(65 + i) for i in range(10)}
)


_CELL = re.compile(
    r"[(\[{<]?\s*(?:(?P<letter>[A-Ja-j])|(?P<number>10|[1-9])(?:\.0+)?|(?P<syllable>[가나다라마바사아자차]))\s*(?:번|[)\]}>.:])*(?P<text>\s+\S.*)?",
    re.S,
)


def _read_choice(cell: str, letters: str) -> str | None:
    """The letter that a cell gives: `C`, `c.`, `(C)`, `Ｃ`, `3`, `3.0`, `3번`, `③`, `다`, `C. aspirin`; None for all else.

    Numbers count from 1. Text behind the option is read only where the option is marked (`C.`, `3번`), and only where
    it names no other option.
    """
    text = unicodedata.normalize("NFKC", cell.translate(_CIRCLED)).strip().strip("\"'`* ")
    found = _CELL.fullmatch(text)
    if not found:
        return None
    behind = found["text"] or ""
    marked = bool(re.search(r"[번)\]}>.:]\s*\Z", text[: found.start("text")])) if behind else True
    if not marked or behind and extract_answer_letter(f"정답: {text}", letters) is None:
        return None
    place = (
        int(found["number"]) - 1
        if found["number"]
        else ord(found["letter"].upper()) - 65
        if found["letter"]
        else "가나다라마바사아자차".index(found["syllable"])
    )
    return letters[place] if place < len(letters) else None


def _refuse_two_meanings(path: Path, rows: Sequence[Mapping[str, str]], letters: str) -> None:
    """Raise InputError where a column counts its options in a way that cannot be known."""
    for name in ("answer", "pred"):
        cells = {row[name] for row in rows}
        numbers = {cell for cell in cells if re.fullmatch(r"\d+(?:\.0+)?", cell)}
        if numbers & {"0", "0.0"} and 2 * len(numbers) > len({cell for cell in cells if cell.lower() not in _BLANK}):
            raise InputError(
                f"{path}: column {name} holds 0; it has two meanings: options counted from 0, or no answer. "
                f"Write 1 to {len(letters)} or {letters[0]} to {letters[-1]}, and leave unanswered questions blank"
            )
        several = sorted(cell for cell in cells if _SEVERAL.fullmatch(unicodedata.normalize("NFKC", cell).strip()))
        if name == "answer" and several:
            raise InputError(
                f"{path}: column answer holds {several[0]!r}, which names several options; a question needs one right option"
            )


_SEVERAL = re.compile(r"[A-Ja-j1-9]번?(?:\s*[,/;&+]\s*[A-Ja-j1-9]번?)+")
