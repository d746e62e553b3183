"""Logs -> logs in which the same question has the same test and id, and what could not be paired."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from medlora.evaluation.logs.log import Log
from medlora.evaluation.predictions import Prediction
from medlora.records import McqRecord

Key = tuple[str, str]
"""A question's test and id."""

_NO_COUNTERPART = "have no counterpart by id or by text"


@dataclass(frozen=True, slots=True)
class Paired:
    """The predictions of all logs on the questions that they share, and the questions' texts.

    `counts` says how many questions of each test are paired, `notes` what was odd or could not be paired.
    """

    predictions: tuple[Prediction, ...]
    questions: dict[str, list[McqRecord]]
    counts: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Known:
    """The questions met so far: right letter and text of each, and where a text was met first."""

    golds: dict[Key, str] = field(default_factory=dict)
    texts: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    by_text: dict[tuple[str, ...], Key] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)

    def add(self, key: Key, gold: str, text: tuple[str, ...] | None) -> None:
        self.golds[key] = gold
        if text is not None:
            self.texts[key] = text
            self.by_text.setdefault(text, key)
            self.stems.add(text[0])

    def match(self, key: Key, gold: str, text: tuple[str, ...] | None) -> tuple[Key | None, str]:
        """The known question that this one is; None with the reason where it is none of them."""
        if key in self.golds and (text is None or self.texts.get(key, text) == text):
            if self.golds[key] == gold:
                return key, ""
            return None, "have another right letter under the same id"
        if text is None or text not in self.by_text:
            return None, "have a known text with other options" if text and text[0] in self.stems else _NO_COUNTERPART
        found = self.by_text[text]
        return (found, "") if self.golds[found] == gold else (None, "have another right letter under the same text")


def pair_logs(logs: Sequence[Log]) -> Paired:
    """Pair by test and id where the right letter, and the text where it is known, agree; else by question and options.

    Each test keeps the questions that all logs with a part in it share. A log that shares none of a test's questions
    has its own under another name, so that nothing is compared that was not asked of both.
    """
    known, records = _Known(), dict[Key, McqRecord]()
    notes = [note for log in logs for note in log.notes]
    aligned: list[dict[Key, Prediction]] = []
    for log in logs:
        matched, reasons = _align(log, known, records)
        aligned.append(matched)
        total = len(log.predictions)
        if reasons and len(aligned) > 1 and total:
            why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
            notes.append(f"{log.stage}: of its {total:,} questions, {why} in the files before it")
    kept, counts, left_out = _share(aligned, [log.stage for log in logs])
    notes += left_out
    predictions = [p for of_log in kept for p in of_log.values()]
    wanted = dict.fromkeys((p.test, p.id) for p in predictions)
    questions: dict[str, list[McqRecord]] = {}
    for key in wanted:
        if key in records:
            questions.setdefault(key[0], []).append(replace(records[key], id=key[1]))
    return Paired(tuple(predictions), questions, tuple(counts), tuple(dict.fromkeys(notes)))


def describe_text(record: McqRecord) -> tuple[str, ...]:
    """Question and options, whatever their white space and Unicode form."""
    return tuple(" ".join(unicodedata.normalize("NFKC", text).split()) for text in (record.question, *record.options))


def _align(log: Log, known: _Known, records: dict[Key, McqRecord]) -> tuple[dict[Key, Prediction], Counter[str]]:
    """The log's predictions under the keys of the questions known before it, and why others have keys of their own."""
    matched: dict[Key, Prediction] = {}
    reasons: Counter[str] = Counter()
    new: list[tuple[Key, Prediction, tuple[str, ...] | None]] = []
    for prediction in log.predictions:
        key = (prediction.test, prediction.id)
        record = log.questions.get(key)
        text = describe_text(record) if record else None
        found, why = known.match(key, prediction.gold, text)
        if found is not None and found in matched:
            found, why = None, "are asked twice"
        if found is None:
            reasons[why] += 1
            new.append((key, prediction, text))
            continue
        matched[found] = replace(prediction, test=found[0], id=found[1])
        if record is not None:
            records.setdefault(found, record)
    for key, prediction, text in new:
        own = key if key not in known.golds and key not in matched else (key[0], f"{key[1]} ({log.stage})")
        matched[own] = replace(prediction, test=own[0], id=own[1])
        known.add(own, prediction.gold, text)
        if (record := log.questions.get(key)) is not None:
            records.setdefault(own, record)
    return matched, reasons


def _share(
    aligned: Sequence[Mapping[Key, Prediction]], stages: Sequence[str]
) -> tuple[list[dict[Key, Prediction]], list[str], list[str]]:
    """The predictions on shared questions, test by test; how many those are, and what was left out."""
    kept: list[dict[Key, Prediction]] = [{} for _ in aligned]
    counts: list[str] = []
    notes: list[str] = []
    for test in dict.fromkeys(key[0] for of_log in aligned for key in of_log):
        asked = [{key for key in of_log if key[0] == test} for of_log in aligned]
        common, together = _intersect(asked)
        for i, keys in enumerate(asked):
            if not keys:
                continue
            if i in together:
                kept[i] |= {key: p for key, p in aligned[i].items() if key in common}
                if left := len(keys) - len(common):
                    notes.append(
                        f"{stages[i]}: {left:,} of its {len(keys):,} questions of {test} are left out: others lack them"
                    )
                continue
            name = f"{test} ({stages[i]})"
            kept[i] |= {(name, key[1]): replace(p, test=name) for key, p in aligned[i].items() if key in keys}
            notes.append(f"{stages[i]}: shares no question of {test} with the others; its own are test {name}")
        if len(together) > 1:
            counts.append(f"{test}: {len(common):,} questions are paired across {len(together)} stages")
    return kept, counts, notes


def _intersect(asked: Sequence[set[Key]]) -> tuple[set[Key], list[int]]:
    """The questions that logs share, and which logs those are: the first one and all that have some in common."""
    common: set[Key] = set()
    together: list[int] = []
    for i, keys in enumerate(asked):
        if keys and (not together or common & keys):
            common = common & keys if together else set(keys)
            together.append(i)
    return common, together
