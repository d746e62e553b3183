"""A report -> one HTML page that needs nothing else: readable offline, on paper, in the dark, without any script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from medlora import plots
from medlora.records import LETTERS, McqRecord, Prediction
from medlora.report import is_by_likelihood

_TIMES = ("seconds", "seconds_to_first_answer", "questions_asked", "questions_per_s")
_ABOUT = (
    "name",
    "created",
    "notes",
    "remarks",
    "prompts",
    *_TIMES,
    "phase_seconds",
    "stage_seconds",
    "config",
    "versions",
    "hashes",
)
"""What a report may hold beside what is computed."""
_PAGE_BYTES = 2_500_000
"""What the questions listed on a page may add to it."""
_CARD_BYTES = 1_200
"""About what the markup of one listed question takes, without its texts."""
_TEXT_LIMIT = 1_500
"""Characters of a stage's raw answer that are shown."""


def write_page(
    path: Path,
    report: Mapping[str, Any],
    predictions: Sequence[Prediction],
    questions: Mapping[str, Sequence[McqRecord]] | None = None,
) -> None:
    """Write the page of a report (`medlora.report.build_report`) and of the predictions it was built from.

    `questions` maps tests to their questions; where one is not there, its letters are shown alone. Every text of the
    report, the predictions and the questions is escaped; the page's policy allows no script and nothing from elsewhere.
    The same arguments give the same bytes.
    """
    environment = make_environment()
    tests = list(dict.fromkeys(row["test"] for row in report["stages"]))
    stages = [row["stage"] for row in report["overall"]]
    text = environment.get_template("page.html").render(
        report={**dict.fromkeys(_ABOUT), **report},
        stages=stages,
        tests=tests,
        rows={test: [row for row in report["stages"] if row["test"] == test] for test in tests},
        draw=Drawings(report, stages),
        times={name: report[name] for name in _TIMES if report.get(name) is not None},
        listing=list_changes(report, predictions, questions or {}),
        text_limit=_TEXT_LIMIT,
        letters=LETTERS,
    )
    # A lone half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a replacement character.
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def make_environment() -> Any:
    """The templates of the pages, everything escaped, with the filters that write numbers."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["by_likelihood"] = is_by_likelihood
    environment.filters |= {
        "percent": format_percent,
        "points": format_points,
        "p": format_p,
        "number": format_number,
        "yaml": lambda value: yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=100),
        "lang": lambda text: "ko" if any("가" <= letter <= "힣" for letter in text) else "en",
        "clean": _clean,
    }
    return environment


def format_percent(share: float | None, digits: int = 1) -> str:
    """0.4523 -> "45.2"; None -> a dash."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.{digits}f}"


def format_points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign: 0.093 -> "+9.3"."""
    if difference is None:
        return "\N{EN DASH}"
    return f"{100 * difference:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")


def format_p(p_value: float, named: str = "p") -> str:
    """A p-value as journals print it: "p < 0.001", "p = 0.012", "p = 0.41"; with `named` empty, without the sign "="."""
    sign, number = ("<", "0.001") if p_value < 0.001 else ("=", f"{p_value:.{3 if p_value < 0.095 else 2}f}")
    words = [named, sign, number] if named else [number] if sign == "=" else [sign, number]
    return "\N{NO-BREAK SPACE}".join(words)


def format_number(value: Any) -> str:
    """An int with separators, a float with up to two decimals, anything else as it is written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


def _clean(text: str) -> str:
    """Text without control characters, which HTML cannot hold."""
    return "".join(
        c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Drawings:
    """The page's figures, asked for by the template: SVG that needs no escaping, for it holds none of the data's text."""

    def __init__(self, report: Mapping[str, Any], stages: Sequence[str]) -> None:
        self.places = {stage: place for place, stage in enumerate(stages)}
        scored = [*report["stages"], *report["overall"]]
        ends = [end for row in scored for end in row["interval"]]
        chances = [row["chance"] for row in scored if row["chance"] is not None]
        self.accuracy = plots.make_scale([100 * x for x in [*ends, *chances]])
        pairs = report["comparisons"]
        self.difference = plots.make_scale([0, *(100 * end for pair in pairs for end in (pair["low"], pair["high"]))])
        self.subject = plots.make_scale([0, 100])

    def accuracy_of(self, row: Mapping[str, Any]) -> Any:
        """One stage's accuracy with its interval; dashed: chance."""
        return _safe(plots.draw_points([self._point(row["stage"], row)], self.accuracy, _percent(row["chance"])))

    def subject_of(self, rows: Iterable[Mapping[str, Any]], subject: str) -> Any:
        """All stages' accuracies on one subject."""
        given = [row for row in rows if subject in row["subjects"]]
        points = [
            plots.Point(
                self.places[row["stage"]], *(100 * row["subjects"][subject][x] for x in ("value", "low", "high"))
            )
            for row in given
        ]
        return _safe(plots.draw_points(points, self.subject, _percent(given[0]["chance"])))

    def difference_of(self, pair: Mapping[str, Any]) -> Any:
        """A difference with its interval; dashed: none."""
        ends = (100 * pair["difference"], 100 * pair["low"], 100 * pair["high"])
        return _safe(plots.draw_points([plots.Point(self.places[pair["after"]], *ends)], self.difference, 0))

    def scale_of(self, name: str) -> Any:
        """The numbers under a column of one of the three kinds above."""
        return _safe(plots.draw_scale(getattr(self, name), signed=name == "difference"))

    def letters_of(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Chosen against gold letters of all stages on one test."""
        golds = rows[0]["letters"]["gold"]
        names = [x for x in LETTERS if any(x in row["letters"]["gold"] for row in rows)]
        gold = {x: golds.get(x, 0) / (sum(golds.values()) or 1) for x in names}
        chosen = [(self.places[row["stage"]], _shares(row["letters"]["chosen"])) for row in rows]
        return _safe(plots.draw_letters(gold, chosen))

    def reliability_of(self, row: Mapping[str, Any]) -> Any:
        """Accuracy against confidence of one stage on one test."""
        return _safe(plots.draw_reliability(row["calibration"]["bins"], self.places[row["stage"]]))

    def marker_of(self, stage: str) -> Any:
        """The stage's sign."""
        return _safe(plots.draw_marker(self.places[stage]))

    def _point(self, stage: str, row: Mapping[str, Any]) -> plots.Point:
        value = row["accuracy"] if "accuracy" in row else row["micro"]
        return plots.Point(self.places[stage], 100 * value, *(100 * end for end in row["interval"]))


def _safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {letter: count / total for letter, count in counts.items()}


@dataclass(frozen=True, slots=True)
class Card:
    """A question as it is listed: what was asked, if known, and what every stage answered."""

    id: str
    gold: str
    question: McqRecord | None
    answers: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What one comparison gained and lost: how many, and the first of them as cards."""

    pair: Mapping[str, Any]
    gained: tuple[Card, ...]
    lost: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """The changes a page lists; `limit` is how many questions each of their lists may hold, None where all fit."""

    changes: tuple[Change, ...]
    limit: int | None


def list_changes(
    report: Mapping[str, Any], predictions: Sequence[Prediction], questions: Mapping[str, Sequence[McqRecord]]
) -> Listing:
    """Each stage against the one before it and the last against the first, on every test, as much as a page can hold."""
    records = {(test, record.id): record for test, inside in questions.items() for record in inside}
    answers: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        answers.setdefault((prediction.test, prediction.id), []).append(prediction)

    def make_card(key: Sequence[str]) -> Card:
        test, id = key
        given = tuple(answers[test, id])
        return Card(id, given[0].gold, records.get((test, id)), given)

    pairs = select_pairs(report)
    changes = [
        Change(pair, tuple(map(make_card, pair["gained"])), tuple(map(make_card, pair["lost"]))) for pair in pairs
    ]
    limit = _fit([cards for change in changes for cards in (change.gained, change.lost)], _measure)
    return Listing(tuple(Change(c.pair, c.gained[:limit], c.lost[:limit]) for c in changes), limit)


def select_pairs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the comparisons on single tests: each stage against the one before it, and the last against the first."""
    found = []
    for test in dict.fromkeys(row["test"] for row in report["stages"]):
        stages = [row["stage"] for row in report["stages"] if row["test"] == test]
        wanted = [*pairwise(stages), *([(stages[0], stages[-1])] if len(stages) > 2 else [])]
        by_names = {(p["before"], p["after"]): p for p in report["comparisons"] if p["test"] == test}
        found += [by_names[names] for names in wanted]
    return found


def _fit(lists: Sequence[Sequence[Card]], measure: Callable[[Card], int]) -> int | None:
    sizes = [[measure(card) for card in cards] for cards in lists]
    longest = max(map(len, sizes), default=0)
    for limit in (longest, 200, 100, 50, 25, 10, 5, 2, 1):
        if sum(sum(inside[:limit]) for inside in sizes) <= _PAGE_BYTES:
            break
    return limit if limit < longest else None


def _measure(card: Card) -> int:
    asked = [card.question.question, *card.question.options] if card.question else []
    texts = [*asked, *(answer.text[:_TEXT_LIMIT] + answer.error for answer in card.answers)]
    return _CARD_BYTES + sum(len(text.encode("utf-8", "replace")) for text in texts)
