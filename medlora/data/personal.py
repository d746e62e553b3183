"""Personal data in training text: which kinds, how often and where, never the value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["resident number", "phone number", "e-mail address", "record number"]


# A number has its pieces apart or not; letters, digits or dashes around it make it a piece of something longer (a hash).
_GAP = r"[-‐‑–—·.\s]?"


_PATTERNS: dict[Kind, re.Pattern[str]] = {
    "resident number": re.compile(
        r"(?<![\d.])(\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])\s?[-‐‑–—]?\s?([1-8])(\d{6})(?!\d)"
    ),
    "phone number": re.compile(
        rf"(?<![A-Za-z\d-])(?<!\d\.)(?:\+?82{_GAP}\(?0?\)?|0)(?:1[016789]{_GAP}\d{{3,4}}|2{_GAP}\d{{3,4}}|[3-6][1-5]{_GAP}\d{{3,4}}|"
        rf"(?:50\d|70|80){_GAP}\d{{3,4}}){_GAP}\d{{4}}(?![A-Za-z\d-])(?!\.\d)"
        r"|(?<![A-Za-z\d-])(?<!\d\.)0(?:1[016789]|2|[3-6][1-5])\)\s?\d{3,4}[-‐‑–—]\d{4}(?!\d)"
    ),
    "e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z\d_-])"),
    "record number": re.compile(
        r"(?:등록\s?번호|차트\s?번호|병록\s?번호|환자\s?번호|\b(?:MRN|chart\s?(?:no|number)|patient\s?id))"
        r"\s*[.:#：은]?\s*[A-Za-z]?\d[\d-]{4,11}(?!\d)",
        re.I,
    ),
}


_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)


_NO_CHECKSUM_SINCE = 2010
"""Year of birth from which on a number may be without checksum. Since October 2020 its last six digits are drawn at
random (Ministry of the Interior and Safety, revised Enforcement Rule of the Resident Registration Act). A person born
earlier who got a number since then, such as a new citizen, is missed: the price of not matching all 13-digit
numbers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that looks like personal data: `line` counts from 1, `start` and `end` are characters of the whole text."""

    kind: Kind
    line: int
    start: int
    end: int


def find_personal(text: str) -> Iterator[Finding]:
    """Every place in `text` that looks like a resident registration, phone or record number or an e-mail address.

    Full-width digits count as digits. A resident registration number needs a date of birth and the right checksum, or a
    birth so late that it has none.
    """
    plain = text.translate(_NARROW)
    taken: list[tuple[int, int]] = []
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(plain):
            if kind == "resident number" and not _is_resident_number(match):
                continue
            if any(match.start() < end and start < match.end() for start, end in taken):
                continue
            taken.append(match.span())
            yield Finding(kind, text.count("\n", 0, match.start()) + 1, *match.span())


_NARROW = {ord(wide): ord(narrow) for wide, narrow in zip("０１２３４５６７８９－＠．", "0123456789-@.", strict=True)}


def _is_resident_number(match: re.Match[str]) -> bool:
    digits = [int(digit) for part in match.groups() for digit in part]
    # 1, 2, 5, 6: born in the 1900s; 3, 4, 7, 8: in the 2000s; from 5 on foreigners.
    year = int(match[1]) + (1900 if match[4] in "1256" else 2000)
    if year >= _NO_CHECKSUM_SINCE:
        return True
    # The checksum of citizens; that of foreigners' numbers adds 2 (Korean Wikipedia, "주민등록번호").
    check = (11 - sum(w * d for w, d in zip(_WEIGHTS, digits, strict=False)) % 11) % 10
    return digits[12] == (check if digits[6] <= 4 else (check + 2) % 10)
