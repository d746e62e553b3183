"""The page: figures equal to the report's, every text escaped, nothing that runs; looked at in a browser where one is."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medlora.evaluation.predictions import Prediction
from medlora.records import McqRecord
from medlora.reporting import svg as shapes
from medlora.reporting.changes import list_changes, select_pairs
from medlora.reporting.page import write_page
from medlora.reporting.report import build_report
from medlora.reporting.results.paper import make_tables
from medlora.reporting.templates import format_p, format_percent, format_points
from tests.support import ROOT
from tests.support.predictions import TWO_TESTS, answer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "img", "link", "input", "hr", "base", "path", "source"}


class Page(HTMLParser):
    """What a page holds: every element with its attributes, all text, and the cells of every table row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} closed out of turn"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["style"], ["script"]):
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_page(
    folder: Path,
    predictions: Sequence[Prediction] = TWO_TESTS,
    about: dict[str, Any] | None = None,
    questions: dict[str, list[McqRecord]] | None = None,
) -> tuple[str, dict[str, Any]]:
    report = build_report(predictions, about or {}, seed=0)
    write_page(folder / "report.html", report, predictions, questions)
    return (folder / "report.html").read_text(encoding="utf-8"), report


def ask(test: str = "", question: str = "다음 중 옳은 것은?") -> list[McqRecord]:
    return [McqRecord(f"q{i}", f"{question} {test}{i}", ("가", "나", "다", "라"), "ABCD"[i % 4]) for i in range(8)]


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(2)">',
    "</style><style>*{display:none}</style>",
    "<!-- </title> ]]> -->",
    "{{ 7 * 7 }} &lt;b&gt; $\\frac{1}{2}$",
    "javascript:alert(3)",
)


def make_hostile(folder: Path) -> str:
    """A page on which every text that comes from outside is hostile."""
    nasty = " ".join(HOSTILE)
    predictions = [
        replace(
            p,
            id=p.id + nasty,
            stage=p.stage + nasty,
            test=p.test + nasty,
            subject=p.subject + nasty,
            text=nasty,
            error=nasty if p.choice is None else "",
            probabilities=(0.4, 0.3, 0.2, 0.1),
        )
        for p in TWO_TESTS
    ]
    options = tuple(f"{x} {nasty}" for x in "가나다라")
    questions = {
        test + nasty: [McqRecord(f"q{i}{nasty}", nasty, options, "ABCD"[i % 4], nasty) for i in range(8)]
        for test in ("one", "two")
    }
    about = {
        "name": nasty,
        "created": nasty,
        "notes": [nasty],
        "prompts": {nasty: nasty},
        "seconds": nasty,
        "questions_per_s": nasty,
        "phase_seconds": {nasty: nasty},
        "config": {nasty: [nasty, {nasty: nasty}]},
        "versions": {nasty: nasty},
        "hashes": {"nested": {nasty: [nasty]}},
        "prompt_shown": {
            "test": TWO_TESTS[0].test + nasty,
            "id": TWO_TESTS[0].id + nasty,
            "text": nasty,
            "template": False,
        },
    }
    return make_page(folder, predictions, about, questions)[0]


def check_harmless(page: Page) -> None:
    known = {
        *[
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "header",
            "section",
            "h1",
            "h2",
            "h3",
            "p",
            "ul",
            "ol",
            "li",
            "dl",
            "dt",
            "dd",
            "div",
            "span",
            "small",
            "b",
            "br",
        ],
        *[
            "table",
            "thead",
            "tbody",
            "tfoot",
            "tr",
            "th",
            "td",
            "figure",
            "figcaption",
            "details",
            "summary",
            "pre",
            "code",
            "nav",
            "a",
            "svg",
            "path",
            "text",
            "rect",
            "button",
            "script",
        ],
    }
    assert {tag for tag, _ in page.elements} <= known
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "srcset", "action", "xlink:href")}
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes.get("href") for _, attributes in page.elements} <= {None, *(f"#{id}" for id in ids)}
    assert len(page.find("style")) == 1 and page.find("script") == [{}]
    for hostile in HOSTILE:
        assert page.text.count(hostile) > 50  # ids, stages, questions, options, answers ...


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = Page(make_hostile(tmp_path))
    check_harmless(page)
    assert page.open == []


def test_the_policy_allows_one_script_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    html, _ = make_page(tmp_path)
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    metas = Page(html).find("meta")
    (policy,) = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{known}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    assert html.index("Content-Security-Policy") < html.index("<style")
    assert not re.search(r"https?://|url\(|@import", html)


def check_figures(page: Page, report: dict[str, Any]) -> None:
    shown = [
        (attributes["data-stage"], cells[2:])
        for attributes, cells in page.rows
        if attributes.get("data-stage") is not None
    ]
    assert shown == [
        (
            row["stage"],
            [
                f"{100 * row['accuracy']:.1f}",
                f"{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f}",
                *(f"{row[name]:,}" for name in ("correct", "n", "unparsed", "failed")),
                f"{100 * row['macro']:.1f}",
            ],
        )
        for test in dict.fromkeys(row["test"] for row in report["stages"])
        for row in report["stages"]
        if row["test"] == test
    ]
    overall = [cells[2] for attributes, cells in page.rows if "data-overall" in attributes]
    assert overall == [f"{100 * row['micro']:.1f}" for row in report["overall"]]
    flat = " ".join(page.text.split())
    for pair in select_pairs(report):
        low, high = format_points(pair["low"]), format_points(pair["high"])
        assert (
            f"{pair['after']} against {pair['before']}: {format_points(pair['difference'])} points (95% {low} to {high}), "
            f"McNemar {format_p(pair['p_value'])}, Holm {format_p(pair['p_holm'])}; "
            f"{len(pair['gained'])} gained, {len(pair['lost'])} lost".replace("\xa0", " ")
        ) in flat
    for row in report["stages"]:
        if row["calibration"]:
            assert f"ECE {100 * row['calibration']['ece']:.1f}" in flat


def test_the_figures_are_those_of_the_report(tmp_path: Path) -> None:
    html, report = make_page(tmp_path, [replace(p, probabilities=(0.4, 0.3, 0.2, 0.1)) for p in TWO_TESTS])
    check_figures(Page(html), report)


def test_gained_and_lost_questions_can_be_read(tmp_path: Path) -> None:
    predictions = [replace(p, text=f"풀이 {p.stage} {p.test} {p.id}") for p in TWO_TESTS]
    html, report = make_page(tmp_path, predictions, questions={"one": ask("one"), "two": ask("two")})
    text = Page(html).text
    assert "00 against base: 2 gained" in text and "00 against base: 6 gained" in text
    assert "q1 · base A → 00 B" in text and "q7 · base D → 00 none" in text
    for i in (1, 5, 6, 7):
        assert f"다음 중 옳은 것은? one{i}" in text and f"풀이 base one q{i}" in text and f"풀이 00 one q{i}" in text
    assert "다음 중 옳은 것은? one0" not in text  # right before and after
    assert "(out of memory)" in text


def test_questions_without_text_show_their_letters(tmp_path: Path) -> None:
    text = Page(make_page(tmp_path)[0]).text
    assert "The question's text was not given; the right answer is B." in text and "q1 · base A → 00 B" in text


def test_neighbours_and_ends_are_listed() -> None:
    predictions = [p for stage in ("base", "00", "01", "02") for p in answer(stage, "one", "ABCDABCD")]
    pairs = select_pairs(build_report(predictions, {}, seed=0))
    assert [(p["before"], p["after"]) for p in pairs] == [("base", "00"), ("00", "01"), ("01", "02"), ("base", "02")]


def test_a_large_evaluation_stays_a_small_page(tmp_path: Path) -> None:
    count, stages = 3009, ("base", "00", "01", "02")
    question = "65세 남자가 3일 전부터 시작된 발열과 기침으로 병원에 왔다. 혈압은 정상이었다. " * 8
    records = [McqRecord(f"q{i}", question, (question[:90],) * 5, "A", f"과목 {i % 20}") for i in range(count)]
    predictions = [
        Prediction(r.id, "t", stage, "A", "AB"[(i + n) % 2], r.subject, (0.6, 0.4, 0, 0, 0), question * 4, "", 5)
        for n, stage in enumerate(stages)
        for i, r in enumerate(records)
    ]
    html, report = make_page(tmp_path, predictions, {}, {"t": records})
    assert 500_000 < len(html.encode()) < 5_000_000
    listing = list_changes(report, predictions, {"t": records})
    assert listing.limit and f"Each list shows its first {listing.limit} questions" in html
    assert all(len(cards) <= listing.limit for change in listing.changes for cards in (change.gained, change.lost))
    assert f"The first {listing.limit} of 1,50" in html
    assert "(the first 1,500 of " in html  # answers are cut, and it is said


def test_what_is_not_there_takes_no_place(tmp_path: Path) -> None:
    html, _ = make_page(tmp_path, answer("base", "one", "AACDAACD"))
    for section in ("comparisons", "forgetting", "calibration", "rotations", "format", "questions"):
        assert f'id="{section}"' not in html
    assert 'id="accuracy"' in html and 'id="subjects"' in html and "All tests" not in html


def test_what_is_given_is_shown(tmp_path: Path) -> None:
    about = {
        "name": "시험 평가",
        "notes": ["The prompt style was forced."],
        "prompts": "3",
        "seconds_to_first_answer": 12.345,
        "questions_per_s": 1234.5,
        "config": {"evaluation": {"style": "reasoning"}},
        "versions": {"torch": "2.13.0"},
        "hashes": {"phases/00/adapter": "ab12"},
    }
    page = Page(make_page(tmp_path, about=about)[0])
    for expected in (
        "The prompt style was forced.",
        "12.35",
        "1,234.5 questions/s",
        "style: reasoning",
        "ab12",
        "2.13.0",
    ):
        assert expected in page.text
    assert page.text.count("시험 평가") == 2  # title and heading


def test_text_that_html_cannot_hold_is_replaced(tmp_path: Path) -> None:
    question = [replace(q, question="앞\x9d\x0c[31m\x85뒤") for q in ask()]  # what a record may hold
    write_page(tmp_path / "p.html", build_report(TWO_TESTS, {}, 0), TWO_TESTS, {"one": question})
    raw = (tmp_path / "p.html").read_bytes().decode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", raw) and "앞\ufffd\ufffd[31m\ufffd뒤" in raw


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    first, report = make_page(tmp_path)
    script = "import sys; sys.path[:0] = sys.argv[1:3]\nfrom pathlib import Path\nfrom tests.reporting.test_page import make_page\n"
    script += "make_page(Path(sys.argv[3]))"
    (tmp_path / "again").mkdir()
    arguments = [str(ROOT), str(ROOT), str(tmp_path / "again")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    assert (tmp_path / "again" / "report.html").read_text(encoding="utf-8") == first


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0932, "+9.3"), (-0.0932, "−9.3"), (0.0, "0.0"), (-0.0001, "0.0"), (1.0, "+100.0"), (None, "–")],
)
def test_points_carry_their_sign(value: float | None, shown: str) -> None:
    assert format_points(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "p < 0.001"),
        (0.00099, "p < 0.001"),
        (0.001, "p = 0.001"),
        (0.0456, "p = 0.046"),
        (0.41, "p = 0.41"),
        (1.0, "p = 1.00"),
    ],
)
def test_p_values_are_printed_as_in_journals(value: float, shown: str) -> None:
    assert format_p(value).replace("\xa0", " ") == shown
    assert format_p(value, "").replace("\xa0", " ") == shown.removeprefix("p ").removeprefix("= ")


def test_shares_are_percentages() -> None:
    assert (format_percent(0.4523), format_percent(1.0), format_percent(None)) == ("45.2", "100.0", "–")


def test_a_drawing_holds_nothing_that_could_touch_the_page() -> None:
    scale = shapes.make_scale([0, 100])
    drawings = [
        shapes.draw_points([shapes.Point(9, 50, 40, 60), shapes.Point(1, 20, 10, 30)], scale, 20),
        shapes.draw_scale(scale, signed=True),
        shapes.draw_letters({"A": 0.5, "B": 0.5}, [(0, {"A": 1.0})]),
        shapes.draw_reliability([{"count": 3, "accuracy": 1 / 3, "confidence": 0.5}], 2),
        shapes.draw_marker(3),
    ]
    defined = set(
        re.findall(
            r"(--[\w-]+):", (ROOT / "medlora" / "reporting" / "templates" / "page.css").read_text(encoding="utf-8")
        )
    )
    for svg in drawings:
        assert svg.startswith("<svg ") and svg.endswith("</svg>")
        assert not re.search(r"\bid=|href|<style|<defs|url\(|#[0-9a-f]{3}|font-family", svg)
        used = set(re.findall(r"var\((--[\w-]+)\)", svg))
        assert used and used <= defined


def test_every_stage_colour_is_defined_for_light_and_dark() -> None:
    css = (ROOT / "medlora" / "reporting" / "templates" / "page.css").read_text(encoding="utf-8")
    assert all(css.count(f"--stage-{i}:") == 2 for i in range(shapes.COLOURS))


def test_values_are_drawn_where_the_scale_says() -> None:
    scale = shapes.make_scale([0, 100], width=216)  # 8 px of margin, then 2 px for each of 100 points
    assert (scale.ticks[0], scale.ticks[-1]) == (0, 100)
    svg = shapes.draw_points([shapes.Point(0, 50, 25, 75)], scale, None)
    (dot,) = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)', svg)
    assert float(dot[0]) == pytest.approx((8 + 100) * 0.75) and float(dot[1]) == pytest.approx(12 * 0.75)  # px to pt
    ends = [(float(a), float(b)) for a, b in re.findall(r'd="M ([\d.]+) 9 L ([\d.]+) 9 "', svg)]
    assert ends == [(pytest.approx((8 + 50) * 0.75), pytest.approx((8 + 150) * 0.75))]


def test_neighbouring_stages_differ_in_colour_and_marker() -> None:
    markers = [shapes.draw_marker(place) for place in range(20)]
    assert len(set(markers)) == 20


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM as a browser has it after running what it allows, and what it wrote into the console."""
    assert CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --v=0"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, encoding="utf-8")
    return result.stdout, "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_the_page_with_its_buttons_and_runs_nothing(tmp_path: Path) -> None:
    make_hostile(tmp_path)
    dom, console = browse(tmp_path / "report.html", tmp_path / "profile")
    check_harmless(Page(dom))
    assert console == ""
    html, report = make_page(tmp_path, questions={"one": ask("one")})
    dom, console = browse(tmp_path / "report.html", tmp_path / "profile")
    check_figures(Page(dom), report)
    assert console == ""
    buttons = Page(dom).find("button")
    assert len(buttons) == 3 and not any("hidden" in button for button in buttons)

    # The other way round, so that silence means something: with a script put into it, the page's policy speaks up.
    (tmp_path / "broken.html").write_text(
        html.replace("</body>", "<script>document.body.id = 'ran'</script></body>"), encoding="utf-8"
    )
    dom, console = browse(tmp_path / "broken.html", tmp_path / "profile")
    assert "Content Security Policy" in console and 'id="ran"' not in dom


def test_format_and_rotations_are_shown_as_the_report_has_them(tmp_path: Path) -> None:
    predictions = [replace(p, format_score=0.5, rotated="ABCD") for p in answer("00", "one", "ABCDABCA")]
    html, report = make_page(tmp_path, predictions)
    cells = [cells for _, cells in Page(html).rows if cells[:2] == ["00", "one"]]
    assert cells[0] == ["00", "one", "50.0", format_percent(0.5 / 3 + 2 / 3 * 7 / 8), "87.5", "0", "–", "–"]
    row = report["stages"][0]["rotations"]
    assert cells[1][2:5] == ["4", format_percent(row["accuracy"]), format_percent(row["consistency"])]
    assert cells[1][5] == "A 8 / 8 · B 8 / 8 · C 8 / 8 · D 8 / 8"


def test_letters_by_likelihood_and_equal_stages_are_named(tmp_path: Path) -> None:
    html, _ = make_page(tmp_path, [*answer("00", "one", "AAAAAAAA"), *(replace(p, stage="01") for p in REASONED_PAGE)])
    assert html.count("by likelihood</span>") == 2  # gained questions that list both stages
    cells = [cells for _, cells in Page(html).rows if cells[:3] == ["01", "one", "8"]]
    assert cells[0][2:7] == ["8", "4", "4", "4", "100.0"]
    same = [*answer("00", "one", "ABCDABCA"), *answer("01", "one", "ABCDABCA")]
    html, report = make_page(tmp_path, same)
    assert "not distinguishable at n = 8" in html and "to 0.0" not in html
    assert report["comparisons"][0]["high"] == pytest.approx(1 - 0.025 ** (1 / 8))


REASONED_PAGE = [
    replace(
        p,
        probabilities=tuple(0.7 if letter == p.choice else 0.1 for letter in "ABCD"),
        text=f"facts: 발열\nanswer:\n{p.choice}" if i % 2 else "facts: 발열이 있다",
        format_score=1.0 if i % 2 else 0.5,
    )
    for i, p in enumerate(answer("00", "one", "ABCDABCD"))
]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_report_is_printed_on_few_pages(tmp_path: Path) -> None:
    assert CHROMIUM
    predictions = [
        replace(p, id=f"{p.id}-{i}", subject=f"과목 {i % 9}")
        for stage, choices in (("base", "AACDAACD"), ("00", "ABCDAB-!"), ("01", "ABCDABCA"), ("02", "ABCDABCD"))
        for test in ("doctor", "nurse", "pharm", "dentist")
        for i in range(20)
        for p in answer(stage, test, choices)
    ]
    curve = [[float(i), 5.0 - i / 50] for i in range(150)]
    phase = {"description": "plain text", "chain": "new", "sources": ["a.jsonl", "b.jsonl"], "replayed": []}
    phase |= {
        "seconds": 51.2,
        "tokens_per_s": 2000.0,
        "peak_memory_mib": 700.0,
        "loss": curve,
        "dev": [[2, 0.5], [9, 0.8]],
    }
    source = {"use": "training", "source": "a.jsonl", "licence": None, "records": 1234, "quarantined": 2}
    config = {
        "config": {f"key{i}": list(range(9)) for i in range(200)},
        "phases": [{**phase, "name": name} for name in ("00", "01", "02")],
        "data": [source] * 8,
        "prompt_shown": {"test": "doctor", "id": "q1-0", "text": "질문: 무엇?\n" * 99, "template": True},
        "versions": {f"library {i}": "1.2.3" for i in range(10)},
        "hashes": {"stages": {name: ["0" * 64] * 2 for name in ("00", "01", "02")}, "tests": {"doctor": "0" * 64}},
        "phase_seconds": {name: 51.2 for name in ("00", "01", "02")},
    }
    make_page(tmp_path, predictions, config, {test: [] for test in ("doctor",)})
    flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path / 'profile'} --no-pdf-header-footer"
    command = [CHROMIUM, *flags.split(), f"--print-to-pdf={tmp_path / 'p.pdf'}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pages = len(re.findall(rb"/Type /Page\b(?!s)", (tmp_path / "p.pdf").read_bytes()))
    assert 1 < pages <= 6


def test_contents_lead_to_every_section(tmp_path: Path) -> None:
    page = Page(make_page(tmp_path)[0])
    sections = [attributes["id"] for attributes in page.find("section")]
    assert [link["href"] for link in page.find("a")] == [f"#{name}" for name in sections] and len(sections) > 4


def test_what_was_forgotten_is_said_in_words(tmp_path: Path) -> None:
    cells = [cells for _, cells in Page(make_page(tmp_path)[0]).rows if cells[:1] == ["Last stage"]]
    assert cells == [["Last stage", "as before", "gained 75.0"]]
    html, _ = make_page(tmp_path, [*TWO_TESTS[16:], *TWO_TESTS[:16]])
    assert ["Last stage", "as before", "lost 75.0"] in [cells for _, cells in Page(html).rows]


def test_choices_are_shown_against_right_letters(tmp_path: Path) -> None:
    html, report = make_page(tmp_path)
    rows = [cells for _, cells in Page(html).rows]
    assert ["", "A", "B", "C", "D", "none"] in rows and ["C", "0", "0", "1", "0", "1"] in rows
    assert report["verdict"] in Page(html).text


def test_phases_are_shown_with_what_they_learned_from(tmp_path: Path) -> None:
    nasty = " ".join(HOSTILE)
    phase = {
        "name": "00",
        "description": f"plain text {nasty}",
        "chain": "new",
        "sources": [f"a.jsonl{nasty}", "b.jsonl"],
        "replayed": [],
        "seconds": 51.2,
        "tokens_per_s": 2000.0,
        "peak_memory_mib": None,
        "loss": [[1, 5.0], [2, 4.0]],
        "dev": [[2, 0.5]],
    }
    data = {"use": "training", "source": f"a.jsonl{nasty}", "licence": None, "records": 1234, "quarantined": 2}
    html, _ = make_page(tmp_path, about={"phases": [phase], "data": [data]})
    assert ["1,234", "2", "not given"] in [cells[2:] for _, cells in Page(html).rows]
    page = Page(html)
    assert "plain text <script>" in page.text and 'id="phases"' in html and html.count("<figure>") >= 4
    assert "dev accuracy in % by step" in page.text and "training loss by step" in page.text
    assert page.find("script") == [{}]  # the page's own


def test_the_tables_can_be_copied_as_the_files_have_them(tmp_path: Path) -> None:
    """Byte for byte, also where names hold markup; the buttons wait for the script."""
    nasty = " ".join(HOSTILE)
    predictions = [replace(p, stage=p.stage + nasty) for p in TWO_TESTS]
    html, report = make_page(tmp_path, predictions)
    tables = make_tables(report)
    shown = [unescape(text) for text in re.findall(r'<pre id="copy-\d">(.*?)</pre>', html, flags=re.S)]
    assert shown == list(tables.values()) and list(tables) == ["table.md", "table.tex", "table.csv"]
    buttons = Page(html).find("button")
    assert [button["data-copy"] for button in buttons] == ["copy-1", "copy-2", "copy-3"]
    assert all("hidden" in button for button in buttons)


def test_one_prompt_is_shown_with_what_each_stage_answered(tmp_path: Path) -> None:
    shown = {"test": "one", "id": "q1", "text": "<start_of_turn>user\n질문: 무엇?", "template": True}
    predictions = [replace(p, text=f"풀이 {p.stage}") for p in TWO_TESTS]
    html, _ = make_page(tmp_path, predictions, {"prompt_shown": shown})
    section = html.split('<section id="prompt"')[1].split("</section>")[0]
    text = Page(section).text
    assert shown["text"] in text and "풀이 base" in text and "풀이 00" in text and "A ✗" in text and "B ✓" in text
    assert 'id="prompt"' not in make_page(tmp_path, predictions)[0]
