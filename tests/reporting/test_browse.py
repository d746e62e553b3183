"""The page of all questions: complete, escaped, within its size, and filtered in a browser as its marks say."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from medlora.evaluation.predictions import Prediction
from medlora.records import McqRecord
from medlora.reporting.results import browse
from tests.reporting.test_page import CHROMIUM, Page, ask
from tests.reporting.test_page import browse as open_in_browser
from tests.support.predictions import TWO_TESTS, answer

SURE = [
    replace(p, probabilities=tuple(0.1 * (i + 3) if x == p.choice else (0.7 - 0.1 * i) / 3 for x in "ABCD"))
    if p.choice
    else p
    for i, p in enumerate(answer("00", "one", "BBBD-!"[:4], gold="ABCA"))
]


def write(folder: Path, predictions: list[Prediction], questions: dict[str, list[McqRecord]] | None = None) -> str:
    browse.write_browse_page(folder / "questions.html", {"name": "시험"}, predictions, questions or {})
    return (folder / "questions.html").read_text(encoding="utf-8")


def get_cards(html: str) -> list[dict[str, str | None]]:
    return [card for card in Page(html).find("details") if "data-r" in card]


def test_every_question_is_there_with_all_that_was_asked_and_answered(tmp_path: Path) -> None:
    predictions = [replace(p, text=f"풀이 {p.stage} {p.test} {p.id}") for p in TWO_TESTS]
    html = write(tmp_path, predictions, {"one": ask("one"), "two": ask("two")})
    page = Page(html)
    assert page.open == [] and len(get_cards(html)) == 16
    for test in ("one", "two"):
        for i in range(8):
            assert page.text.count(f"다음 중 옳은 것은? {test}{i}") == 2  # in the line and in the card
            assert f"풀이 base {test} q{i}" in page.text and f"풀이 00 {test} q{i}" in page.text
    assert page.text.count("· right answer") == 16 and "(out of memory)" in page.text


def test_marks_say_what_became_of_each_question(tmp_path: Path) -> None:
    one = [p for p in TWO_TESTS if p.test == "one"]
    html = write(tmp_path, one)
    states = {row.id: row.states for row in browse.list_rows(one, {})}
    assert states == {
        **{f"q{i}": "rr" for i in (0, 2, 3, 4)},
        **{"q1": "wr", "q5": "wr", "q6": "ru", "q7": "rf"},
    }
    assert sorted(card["data-r"] or "" for card in get_cards(html)) == sorted(states.values())


def test_confident_wrong_answers_of_the_last_stage_come_first(tmp_path: Path) -> None:
    base = answer("base", "one", "AAAA", gold="ABCA")
    rows = browse.sort_rows(browse.list_rows([*base, *SURE], {}))
    assert [(row.id, row.states) for row in rows] == [("q3", "rw"), ("q2", "ww"), ("q0", "rw"), ("q1", "wr")]
    assert [card["data-c"] for card in get_cards(write(tmp_path, [*base, *SURE]))] == [
        "- 600",
        "- 500",
        "- 300",
        "- 400",
    ]


def test_a_stage_that_was_not_asked_has_no_answer(tmp_path: Path) -> None:
    predictions = [p for p in TWO_TESTS if (p.stage, p.test) != ("00", "two")]
    assert {row.states for row in browse.list_rows(predictions, {}) if row.test == "two"} == {"r-", "w-"}
    assert len(get_cards(write(tmp_path, predictions))) == 16


def test_the_policy_allows_its_own_script_alone(tmp_path: Path) -> None:
    html = write(tmp_path, TWO_TESTS)
    (policy,) = [m["content"] or "" for m in Page(html).find("meta") if m.get("http-equiv")]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}';") and "unsafe-inline' " not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|https?:", script)
    assert not re.search(r"https?://|url\(|@import| on\w+=", html)


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of 3,009 questions and four stages whose answers are too long to be shown whole."""
    text = "<근거> 발열이 있다. & " * 200
    question = "65세 남자가 3일 전부터 시작된 발열과 기침으로 병원에 왔다. 혈압은 정상이었다. " * 8
    records = [McqRecord(f"q{i}", question, (question[:60],) * 5, "A", f"과목 {i % 20}") for i in range(3009)]
    predictions = [
        Prediction(r.id, "t", stage, "A", "AB"[(i + n) % 2], r.subject, (0.6, 0.4, 0, 0, 0), text, "", 5)
        for n, stage in enumerate(("base", "00", "01", "02"))
        for i, r in enumerate(records)
    ]
    return write(tmp_path_factory.mktemp("exam"), predictions, {"t": records})


def test_a_whole_exam_of_four_stages_stays_below_15_megabytes(exam: str) -> None:
    assert 3_000_000 < len(exam.encode()) < 15_000_000
    assert len(get_cards(exam)) == 3009 and re.search(r"Raw answers are cut after \d+ characters", exam)


def test_what_cannot_fit_is_left_out_from_the_end_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browse, "PAGE_BYTES", 6_000)
    html = write(tmp_path, TWO_TESTS, {"one": ask("one"), "two": ask("two")})
    cards = get_cards(html)
    assert 0 < len(cards) < 16 and f"The page holds {len(cards)} of 16 questions" in html
    assert (cards[0]["data-r"] or "").endswith(("w", "u", "f"))


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path, TWO_TESTS, {"one": ask()}) == write(tmp_path, TWO_TESTS, {"one": ask()})


DRIVE = """
<script>
const set = (id, value) => { const node = document.getElementById(id); node.value = value; node.dispatchEvent(new Event("change")); };
const seen = () => Array.from(document.querySelectorAll("#list > details:not([hidden]) > summary"), (n) => n.textContent.split(" ")[0]);
const out = [];
out.push(["all", seen().length]);
set("state", "w"); out.push(["wrong", seen()]);
set("state", "u"); out.push(["unparsed", seen()]);
set("state", ""); set("change", "gained"); out.push(["gained", seen()]);
set("change", "lost"); out.push(["lost", seen()]);
set("change", ""); set("test", "1"); out.push(["test", seen().length]);
set("test", ""); set("subject", "1"); out.push(["subject", seen().length]);
document.body.dataset.out = JSON.stringify(out);
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_runs_the_filters_and_nothing_else(tmp_path: Path) -> None:
    html = write(tmp_path, TWO_TESTS, {"one": ask("one"), "two": ask("two")})
    dom, console = open_in_browser(tmp_path / "questions.html", tmp_path / "profile")
    assert console == "" and "16 of 16 questions" in dom
    # A script that is not its own is refused: silence above means something.
    (tmp_path / "foreign.html").write_text(html.replace("</body>", DRIVE), encoding="utf-8")
    dom, console = open_in_browser(tmp_path / "foreign.html", tmp_path / "profile")
    assert "Content Security Policy" in console and "data-out" not in dom
    # With the policy taken off, the driver above uses the controls.
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", DRIVE)
    (tmp_path / "driven.html").write_text(open_page, encoding="utf-8")
    dom, _ = open_in_browser(tmp_path / "driven.html", tmp_path / "profile")
    out = re.search(r'data-out="([^"]*)"', dom)
    assert out is not None
    assert out[1].replace("&quot;", '"') == (
        '[["all",16],["wrong",[]],["unparsed",["q6"]],["gained",["q1","q5","q0","q1","q2","q4","q5","q6"]],'
        '["lost",["q6","q7"]],["test",8],["subject",8]]'
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_whole_exam_opens_quickly(exam: str, tmp_path: Path) -> None:
    measure = "<script>document.body.dataset.ms = Math.round(performance.now())</script></body>"
    html = re.sub(r"<meta http-equiv[^>]*>", "", exam).replace("</body>", measure)
    (tmp_path / "timed.html").write_text(html, encoding="utf-8")
    began = time.monotonic()
    dom, _ = open_in_browser(tmp_path / "timed.html", tmp_path / "profile")
    found = re.search(r'data-ms="(\d+)"', dom)
    assert found is not None and "3,009 of 3,009 questions" in dom
    # Two seconds are the aim on a machine of its own; a shared one may take longer.
    assert int(found[1]) < 6_000, f"{found[1]} ms of {time.monotonic() - began:.1f} s"
