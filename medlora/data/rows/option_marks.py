"""Marks that options and answers carry in their own text: ①, 3번, (C), 가., 2); read, taken off, or refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medlora.records import RecordError

HANGUL, JAMO = "가나다라마바사아자차", "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊ"


_ENCLOSED = {
    char: place
    for row in ("①②③④⑤⑥⑦⑧⑨⑩", "❶❷❸❹❺❻❼❽❾❿", "➀➁➂➃➄➅➆➇➈➉", "➊➋➌➍➎➏➐➑➒➓", "⓵⓶⓷⓸⓹⓺⓻⓼⓽⓾", "⑴⑵⑶⑷⑸⑹⑺⑻⑼⑽")
    for place, char in enumerate(row, 1)
}


_ENCLOSED |= {
    chr(first + i): i + 1
    for first in (0x24B6, 0x24D0, 0x249C, 0x1F150, 0x1F170, 0x1F130, 0x3260, 0x326E, 0x3200, 0x320E, 0x2160)
    for i in range(10)
}
"""Also Ⓐ ⓐ ⒜ and their like, ㉠, ㉮, ㈀, ㈎ and Ⅰ."""


HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width letters, digits and brackets; every one stays one character, so places in the text stay, too."""


_SIGN = rf"(?P<digit>10|[1-9])|(?P<letter>[A-Ja-j])|(?P<hangul>[{HANGUL}])|(?P<jamo>[{JAMO}])"


_IN_BRACKETS = re.compile(rf"\s*[(\[<]\s*(?:{_SIGN})\s*번?\s*[)\]>](?:\s?번(?![가-힣]))?\s*[.:]?")


_NUMBERED = re.compile(r"\s*(?P<digit>10|[1-9])\s?번(?![가-힣])\s*[.):]?")


_BEFORE_A_STOP = re.compile(rf"\s*(?:{_SIGN})\s?(?:[):](?!\d)|\.(?!\d)|、)")


_CUE = re.compile(
    r"\s*(?:\[?\s*(?:최종\s*)?(?:정답|답안?|answer|ans)(?![A-Za-z])\s*\]?|보기|선택지|선지|옵션|option|choice)\s*(?:은|는|:|=|\.)?\s*",
    re.I,
)


_BEFORE_TEXT = re.compile(rf"\s*(?:{_SIGN})\s+(?=\S)")


EXAMPLES = {
    "_IN_BRACKETS": ("(C) 폐렴", "(CT) 촬영"),
    "_NUMBERED": ("3번 폐렴", "30번 환자"),
    "_BEFORE_A_STOP": ("가. 폐렴", "3.5 mg"),
    "_CUE": ("정답: C", "정상: C"),
    "_BEFORE_TEXT": ("C 폐렴", "CT 촬영"),
}
"""A text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


STRONG = {"enclosed", "numbered"}
"""Families that are hardly ever the beginning of an option's own text."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark at the beginning of a text: its place from 1, its family, what follows it."""

    place: int
    family: str
    rest: str


def read_mark(text: str) -> Mark | None:
    """The mark that a text begins with; None where it begins with none."""
    plain = text.translate(HALF_WIDTH)
    begin = len(plain) - len(plain.lstrip())
    if (sign := plain[begin : begin + 1]) in _ENCLOSED and sign:
        rest = text[begin + 1 :].lstrip(" .):번" if text[begin + 1 : begin + 2] == "번" else " .):\u3000")
        return Mark(_ENCLOSED[sign], "enclosed", rest.strip())
    for pattern, bracketed in ((_IN_BRACKETS, True), (_NUMBERED, False), (_BEFORE_A_STOP, False)):
        if found := pattern.match(plain):
            family = "numbered" if pattern is _NUMBERED else next(k for k, v in found.groupdict().items() if v)
            sign = next(value for value in found.groupdict().values() if value)
            place = int(sign) if sign.isdigit() else 1 + _order_of(sign)
            return Mark(place, f"({family})" if bracketed else family, text[found.end() :].strip())
    return None


def _order_of(sign: str) -> int:
    return next(row.index(sign.upper()) for row in ("ABCDEFGHIJ", HANGUL, JAMO) if sign.upper() in row)


def read_answer(text: str) -> Mark | None:
    """The mark that an answer is, or begins with: a bare letter or 가, ③, 3번, (C), `C. text`, also behind `정답:`."""
    answer = text[found.end() :] if (found := _CUE.match(text)) else text
    plain = answer.translate(HALF_WIDTH).strip().rstrip(".")
    if re.fullmatch(rf"[A-Ja-j]번?|[{HANGUL}]|[{JAMO}]", plain):
        plain = plain[0]
        family = "letter" if plain.isascii() else "hangul"
        return Mark(1 + _order_of(plain), family, "")
    if found and re.fullmatch(r"10|[0-9](?:\.0+)?", plain):
        return Mark(int(float(plain)), "digit", "")
    if mark := read_mark(answer):
        return mark
    if bare := _BEFORE_TEXT.match(answer.translate(HALF_WIDTH)):
        family, sign = next((kind, each) for kind, each in bare.groupdict().items() if each)
        place = int(sign) if sign.isdigit() else 1 + _order_of(sign)
        return Mark(place, family, answer[bare.end() :].strip())
    return None


def names_several(text: str) -> bool:
    """Whether a text is a list of marks and nothing else: `A, C`, `①③`, `1, 3`, `가/다`."""
    plain = text.translate(HALF_WIDTH).strip()
    sign = rf"(?:[A-J]|10|[1-9]번?|[{HANGUL}]|[{JAMO}]|[{re.escape(''.join(_ENCLOSED))}]|\([A-J1-9]\))"
    return bool(
        re.fullmatch(rf"{sign}(?:\s*(?:[,;/·&+]|and|와|과|및|또는|or)\s*{sign})+", plain)
        or re.fullmatch(rf"[A-J]{{2,}}|[{re.escape(''.join(_ENCLOSED))}]{{2,}}|[A-J](?:\s+[A-J])+", plain)
    )


def strip_marks(options: Sequence[object]) -> tuple[tuple[Any, ...], bool]:
    """Options without marks that agree with their order, and whether there were any.

    Raises RecordError where marks and places disagree: an answer might then mean either.
    """
    marks = [read_mark(option) if isinstance(option, str) else None for option in options]
    found = [(place, mark) for place, mark in enumerate(marks, 1) if mark and mark.rest]
    families = {mark.family for _, mark in found}
    if len(found) < 2 or len(families) > 1 or any(_is_combination(mark) for _, mark in found):
        return tuple(options), False
    whole, (family,) = len(found) == len(options), families
    places = [mark.place for _, mark in found]
    agreeing = sum(place == mark.place for place, mark in found)
    if not whole and family not in STRONG and agreeing < 3:
        return tuple(options), False
    if agreeing == len(found):
        kept = [mark.rest if mark and mark.rest else option for mark, option in zip(marks, options, strict=True)]
        return tuple(kept), True
    if family not in STRONG and agreeing < 3 and (not whole or len(set(places)) < len(places)):
        return tuple(options), False  # "1) a, 2) b" in every option: the parts of an order, no marks
    in_a_row = sorted(places) == list(range(min(places), min(places) + len(places)))
    if family == "letter" and not in_a_row and agreeing < 3:
        return tuple(options), False  # "E. coli": an initial, no mark
    wrong = next((place, mark) for place, mark in found if place != mark.place)
    raise RecordError(
        f"option {wrong[0]} carries the mark of option {wrong[1].place} in its text; put the options into the order of "
        "their marks, or take the marks out",
        "mark and place disagree",
    )


def _is_combination(mark: Mark) -> bool:
    """Whether a text lists statements by their marks (`ㄱ, ㄴ`, `① + ③`) instead of carrying one."""
    if mark.family == "enclosed":
        return any(char in _ENCLOSED for char in mark.rest)
    if mark.family in ("jamo", "hangul", "(jamo)", "(hangul)"):
        return bool(re.match(rf"[,·+&/]|[와과]\s|(?:[,·+&/\s(]*[{HANGUL}{JAMO}][.)]*)+$", mark.rest))
    following = rf"(?<![\d.]){mark.place + 1}\s?[-–.):]\s" if "digit" in mark.family else r"(?!)"
    return bool(re.match(r"[,·+&/]", mark.rest) or re.search(following, mark.rest))
