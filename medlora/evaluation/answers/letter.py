"""What a model wrote -> the option letter it meant, or None; and how well it followed the completion format.

`parse` reads in three steps, as a careful reader does:

1. *Normalise* (`text.normalise`): an option becomes one character, in any spelling; what only looks like one is removed.
2. *Collect* verdicts: what names an answer, where, and how strongly. One that is denied, conditional, asked or
   shared between two options is none.
3. *Decide*: the strongest kind of verdict speaks. Where verdicts of that kind differ, the last one does if the model
   turned or concluded in between, and nobody otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medlora.evaluation.answers.denials import find_denials
from medlora.evaluation.answers.questions import answers_several
from medlora.evaluation.answers.rules import (
    BARE,
    DENIED_LATER,
    IF,
    LABELLED,
    MIDDLE,
    NOT_MEANT,
    OPENING,
    RETRACTED,
    RIVAL,
    RULES,
    SHARED,
    SHARED_TEXT,
    STRONG,
    Rule,
)
from medlora.evaluation.answers.text import ANY, OPTION, SEVERAL, index_of, normalise, one_turn
from medlora.records import LETTERS


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where an option is named as the answer, which one it is, and how much that weighs."""

    start: int
    end: int
    option: int | None  # None: a verdict that names several options
    strength: int


_OPEN = re.compile(r"\b(?:not|cannot|never|whether|if|depends|unclear|wrong|incorrect)\b|n't", re.I)


def find_verdicts(text: str, rules: Sequence[Rule] = RULES) -> list[Verdict]:
    """What the rules read in a normalised text, in the order of the rules."""
    found = (_weigh_match(match, rule) for rule in rules for match in rule.pattern.finditer(text))
    return [verdict for verdict in found if verdict is not None]


def _weigh_match(match: re.Match[str], rule: Rule) -> Verdict | None:
    """The verdict of one match; None where it is denied, asked, a condition, or an aside about another option."""
    text, groups = match.string, match.groupdict()
    name = next(n for n in ("option", "named", "last", "first", "also", "plain") if groups.get(n))
    end = match.end(name)
    aside = text[match.start() - 1 : match.start()] == "(" and re.fullmatch(
        r"정답\s*", text[match.start() : match.start(name)]
    )
    denied = _OPEN.search(groups.get("gap") or "") or rule.unless.match(text, match.end())
    if denied or aside or IF.search(text, 0, match.start()):
        return None
    shared = SHARED.match(text, end) or SHARED_TEXT.match(text, end)
    return Verdict(match.start(), end, None if shared else index_of(match[name]), rule.strength)


def _find_all(text: str) -> list[Verdict]:
    """All verdicts in `text`, in order of where they end."""
    return sorted([*find_verdicts(text), *_standing_alone(text)], key=lambda verdict: verdict.end)


def _standing_alone(text: str) -> list[Verdict]:
    """Options that are a line of their own, open the output, or label its last line."""
    found: list[Verdict] = []
    for match in BARE.finditer(text):
        whole, last = match.span() == (0, len(text)), match.end() == len(text)
        if (
            match[1] == SEVERAL
            or re.fullmatch(OPTION, match[1])
            or (whole and re.fullmatch("[\ue200-\ue219]", match[1]))
        ):
            found.append(Verdict(match.start(1), match.end(1), index_of(match[1]), STRONG if last else MIDDLE))
    labelled = [index_of(m[1]) for m in LABELLED.finditer(text)]
    opening = OPENING.match(text) if not text.startswith("\ue008.") else None  # "I." numbers a heading
    if opening and not NOT_MEANT.match(text, opening.end(1)):
        in_order = (
            len(labelled) > 1 and labelled[:2] == [labelled[0], (labelled[0] or 0) + 1] and not _OTHERS.search(text)
        )
        if not in_order:
            found.append(Verdict(0, opening.end(1), index_of(opening[1]), MIDDLE))
    head, _, tail = text.rpartition("\n")
    final = LABELLED.match(tail)
    if final and len(labelled) == 1 and index_of(final[1]) != 0 and re.search(r"[.!다요음임]\s*\Z", head):
        start = len(head) + 1
        found.append(Verdict(start, start + final.end(1), index_of(final[1]), MIDDLE))
    return found


_OTHERS = re.compile(r"다른|나머지|오답|틀린|\b(?:other|others|incorrect|wrong)\b", re.I)


TURN = re.compile(
    r"아니[,.…!다요야]|다시(?! 말)|정정|수정|따라서|그러므로|결론|결국|최종|하지만|그러나|그런데|다만|재검토|"
    r"재계산|잠깐|사실은?|오히려|[가-힣]지만|으나|므로\b"
    r"|\b(?:therefore|thus|hence|so|however|but|wait|actually|correction|corrected|reconsider\w*|"
    r"second thought|final|finally|instead|sorry|"
    r"mistake|no)\b",
    re.I,
)


_NEXT_QUESTION = re.compile(
    r"\n\s*#*\s*(?:다음\s*)?(?:질문|문제|문항|\bquestion|"
    r"\bQ)\s*(?:[\d\ue300-\ue309]*\s*(?:\([^()\n]*\))?\s*[:.)]|[\d\ue300-\ue309]+\s*\n)",
    re.I,
)


_QUESTION_NUMBER = re.compile(
    r"(?:질문|문제|문항|question|Q)\s*(\d+)\S{0,2}\s*(?:의)?\s*(?:정답|답|answer)|(\d+)번 (?:문제|"
    r"문항|질문)의? ?(?:정답|답)",
    re.I,
)


# An answer field, as in our own templates; one that closes the output outweighs all prose before it.
_FIELD = re.compile(
    rf"^[ \t]*(?:최종\s*)?(?:final\s+)?(?:정답|답|answer)[ \t]*(?::\s*|\n\s*)\(?({ANY})(?=[.)]?\s*$)", re.I | re.M
)


_FIELD_AT_END = re.compile(_FIELD.pattern.replace(r"\s*$", r"\s*\Z"), re.I | re.M)


EXAMPLES = {
    "_OPEN": ("is not", "is nothing"),
    "_OTHERS": ("나머지는 흔하다.", "모두 흔하다."),
    "TURN": ("따라서 그렇다.", "다시 말해 그렇다."),
    "_NEXT_QUESTION": ("B\n문제 2: 다음 중", "B\n문제의 요점은 발열이다."),
    "_QUESTION_NUMBER": ("문제 3의 정답", "문제의 정답"),
    "_FIELD": ("정답: B\n해설: 발열", "정답: B형 간염"),
    "_FIELD_AT_END": ("해설: 발열\n정답: B", "정답: B\n해설: 발열"),
}
"""A text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def _decide(text: str) -> int | None:
    fields = [index_of(option) for option in _FIELD.findall(text)]
    if (closing := _FIELD_AT_END.search(text)) and len(set(fields)) == 1:
        return index_of(closing[1])
    verdicts = _find_all(text)
    if not verdicts:
        return None
    strongest = max(verdict.strength for verdict in verdicts)
    last = [verdict for verdict in verdicts if verdict.strength == strongest][-1]
    for earlier in verdicts[: verdicts.index(last)]:
        # A weaker verdict counts against the last one only where nothing but space lies between, as in "A", "B".
        rival = earlier.strength == strongest or not re.search(r"\w", text[earlier.end : last.start])
        if earlier.option != last.option and rival and not TURN.search(text, earlier.end, last.end):
            return None
    for match in DENIED_LATER.finditer(text, last.end):
        if index_of(match[match.lastindex or 1]) == last.option:
            return None
    after = text[last.end :]
    if RETRACTED.search(after) or _takes_back(after, last.option):
        return None
    for match in RIVAL.finditer(text, last.end):
        if index_of(match[match.lastindex or 1]) != last.option:
            return None
    return last.option


def _takes_back(after: str, option: int | None) -> bool:
    """Whether the text behind a verdict denies its option: outright, or after a word that turns."""
    denials = find_denials(after, option) if option is not None else []
    return any(outright or TURN.search(after, 0, place) for place, outright in denials)


def extract_answer_letter(output: str, letters: str = LETTERS[:5]) -> str | None:
    """The one of `letters` that `output` gives as its answer; None when it gives none or several.

    Never a guess: refusals, outputs that were cut off, echoes of the options and bare values ("50", "2년") are None.
    Option numbers count from 1 ("3번" is C). `letters` are the question's options in order.
    """
    if answers_several(output):
        return None
    text = normalise(output)
    if len({number for pair in _QUESTION_NUMBER.findall(text) for number in pair if number}) > 1:
        return None  # answers several questions, of which one at most was asked
    for question in _NEXT_QUESTION.finditer(text):
        if _find_all(text[: question.start()]):  # what follows a verdict is a question of the model's own
            text = text[: question.start()].strip()
            break
    option = _decide(text)
    return letters[option] if option is not None and option < len(letters) else None


@dataclass(frozen=True, slots=True)
class FormatScore:
    """How much of its format a reasoning answer has: `score` is (fields + answer found) / (fields required + 1)."""

    score: float
    kept: tuple[str, ...]  # required fields with text behind them, in the required order
    missing: tuple[str, ...]  # required fields that are absent, empty or out of order
    answered: bool  # one `answer:`, behind every field, followed by one letter and nothing else


def score_format(output: str, fields: Sequence[str], letters: str = LETTERS[:5]) -> FormatScore:
    """How much of the format of `prompts` an answer has: each of `fields` (of records.FIELDS), then one final letter.

    `score` is in [0, 1]. It does not measure whether the answer is right; `score_total` adds that.
    """
    text = one_turn(output)
    _, *parts = re.split(rf"^[ \t]*({'|'.join((*fields, 'answer'))})[ \t]*:", text, flags=re.M)
    sections = [*zip(parts[::2], parts[1::2], strict=True)]
    place = {name: i for i, name in enumerate(fields)}
    kept: list[str] = []
    for name, body in sections:
        if name in place and body.strip() and all(place[earlier] < place[name] for earlier in kept):
            kept.append(name)
    answers = [body.strip() for name, body in sections if name == "answer"]
    answered = len(answers) == 1 and sections[-1][0] == "answer" and answers[0] in tuple(letters)
    missing = tuple(name for name in fields if name not in kept)
    return FormatScore((len(kept) + answered) / (len(fields) + 1), tuple(kept), missing, answered)


def find_written_letter(text: str, letters: str = LETTERS[:5]) -> str | None:
    """The letter that a reasoning answer itself wrote: in its answer field, or wherever `parse` reads one."""
    _, field, value = one_turn(text).rpartition("answer:")
    written = value.strip().rstrip(".")
    return written if field and written in tuple(letters) else extract_answer_letter(text, letters)


def score_total(format_score: float, correct: bool) -> float:
    """One third format, two thirds correctness: the total of the scripts that medlora replaces (medgemma_korean)."""
    return format_score / 3 + 2 * correct / 3
