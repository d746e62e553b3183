"""What looks like personal data is found, what medicine writes in digits is not, and no value is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from medlora.data.personal import find_personal


def kinds(text: str) -> list[str]:
    return [finding.kind for finding in find_personal(text)]


def number(first_twelve: str, add: int = 0) -> str:
    """A made-up resident number with its checksum, by the rule as it is published."""
    total = sum(int(digit) * weight for digit, weight in zip(first_twelve, [*range(2, 10), *range(2, 6)], strict=True))
    last = ((11 - total % 11) % 10 + add) % 10
    return f"{first_twelve[:6]}-{first_twelve[6:]}{last}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"환자 {number('850612123456')} 내원", "resident number"),
        (number("850612123456").replace("-", ""), "resident number"),
        (number("850612123456").replace("-", " - "), "resident number"),
        (number("850612123456").translate({ord(d): ord("０") + int(d) for d in "0123456789"}), "resident number"),
        (number("850612523456", add=2), "resident number"),
        ("160229-3000000", "resident number"),  # born in 2016: without checksum
        ("연락처 010-1234-5678", "phone number"),
        ("010.1234.5678", "phone number"),
        ("01012345678", "phone number"),
        ("02-345-6789", "phone number"),
        ("(031) 123-4567 또는 031)123-4567", "phone number"),
        ("+82 10-1234-5678", "phone number"),
        ("+82-2-1234-5678", "phone number"),
        ("070-1234-5678", "phone number"),
        ("전화는 010-1234-5678. 그리고", "phone number"),
        ("문의010-1234-5678로", "phone number"),
        ("메일은 hong@example.ac.kr로 보낸다", "e-mail address"),
        ("문의: hong.gildong@example.co.kr 로", "e-mail address"),
        ("등록번호: 12345678", "record number"),
        ("차트번호 A1234567", "record number"),
        ("MRN: 00123456", "record number"),
        ("chart no. 1234567", "record number"),
    ],
)
def test_personal_data_is_found(text: str, kind: str) -> None:
    assert set(kinds(text)) == {kind}


@pytest.mark.parametrize(
    "text",
    [
        number("850612123456")[:-1] + str((int(number("850612123456")[-1]) + 1) % 10),  # wrong checksum
        number("851312123456"),  # no thirteenth month
        number("850612023456"),  # no such century
        f"1{number('850612123456')}",
        "아스피린 100-300 mg 을 하루 2-3 회",
        "혈압 120/80 mmHg, 맥박 72, 체온 36.5",
        "PMID: 31535829, doi:10.1016/S0140-6736(19)32008-2",
        "1995-2003년 1,234명, 95% CI 0.12-0.34",
        "2020.03.04-2020.05.06",
        "NCT01234567890",
        "질병관리청 콜센터 1339, 119",
        "등록번호 없이 진료",
        "감염병 신고 건수 0102345 건",
        "L-form@37 °C",
        "ISBN 978-89-1234-567-8",
        "2c9a0bc041127-1659-41db-909f-71bc5514b02e",
        "d04381853421e7",
        "01-02-2020 에 01:02:34",
    ],
)
def test_what_medicine_writes_in_digits_is_left_alone(text: str) -> None:
    assert kinds(text) == []


def test_the_place_is_told_and_the_value_is_not() -> None:
    text = "첫 줄\n둘째 줄 010-1234-5678\n\n" + number("850612123456")
    found = list(find_personal(text))
    assert sorted((f.kind, f.line, text[f.start : f.end]) for f in found) == [
        ("phone number", 2, "010-1234-5678"),
        ("resident number", 4, number("850612123456")),
    ]
    assert "1234" not in repr(found)


def test_real_medical_text_gives_no_alarm(real_data: Path) -> None:
    """No person's data stands in the real files, though they are full of ids, hashes, doses and dates."""
    found = [
        (path.name, finding.kind)
        for path in sorted(real_data.rglob("*"))
        if path.suffix in (".jsonl", ".json", ".ko", ".en", ".csv") and "logs" not in str(path)
        for finding in find_personal(path.read_text(encoding="utf-8"))
    ]
    assert found == []
