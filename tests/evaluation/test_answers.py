from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlora.evaluation.answers.denials import DENIALS
from medlora.evaluation.answers.letter import extract_answer_letter, find_verdicts, score_format, score_total
from medlora.evaluation.answers.rules import RULES
from medlora.evaluation.answers.text import mark_options, normalise
from medlora.prompts import MCQ_STYLES, render_mcq
from medlora.records import FIELDS, LETTERS, McqRecord
from tests.support import ROOT

DATA = ROOT.parent / "shared" / "data"
CASES_FROM_THE_FIELD = DATA.parent / "cases" / "answers.jsonl"

CASES: dict[str, list[tuple[str | None, str]]] = {}
"""Family -> the letter that a careful reader takes (None for none), and the output; the options are A to E."""
for _line in (Path(__file__).parent / "answer_cases.tsv").read_text(encoding="utf-8").splitlines():
    if _line.startswith("# "):
        _family = CASES.setdefault(_line[2:], [])
    else:
        _letter, _output = _line.split("\t", 1)
        _family.append((None if _letter == "-" else _letter, json.loads(_output)))

# fmt: off
MORE_OPTIONS: dict[str | None, list[str]] = {
    "F": ["I think the answer is F.", "Answer: I would say F.", "The answer is (F) 2.5 mg", "Hence (F).", "(F)"],
    "G": ["⑦", "G. Initiate therapy", "A) x\nB) y\nC) z\nD) w\nE) v\nF) u\nG) t\nH) s\nThe answer is (G)."],
    "H": ["H", "Therefore, the correct answer is H: 3."],
    "I": ["The answer is I.", "The answer is (I)."],
    "J": ["The answer is (J).", "정답은 10번입니다.", "정답: ⑩"],
    None: ["I am not sure.", "I. Introduction\nII. Methods", "H. pylori infection", "The answer is H. pylori.",
           "G6PD deficiency", "The answer is A–J.",
           "The most likely diagnosis is hepatitis E.", "The correct answers are (F) and (J)."],
}
# fmt: on


@pytest.mark.parametrize("family", CASES)
def test_takes_what_a_careful_reader_takes(family: str) -> None:
    wrong = [
        (output, expected, found)
        for expected, output in CASES[family]
        if (found := extract_answer_letter(output)) != expected
    ]
    assert not wrong


def test_every_rule_reads_its_example_and_leaves_the_other() -> None:
    wrong = [
        rule.name
        for rule in RULES
        if [v.option for v in find_verdicts(normalise(rule.reads), (rule,))] != [1]
        or find_verdicts(normalise(rule.leaves), (rule,))
        and [v.option for v in find_verdicts(normalise(rule.leaves), (rule,))] != [None]
    ]
    assert not wrong
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_every_denial_denies_its_example_and_leaves_the_other() -> None:
    wrong = [
        denial.name
        for denial in DENIALS
        if not denial.pattern.search(mark_options(denial.denies))
        or any("B" in match["run"].translate(_BACK) for match in denial.pattern.finditer(mark_options(denial.leaves)))
    ]
    assert not wrong


_BACK = {block + i: chr(65 + i) for block in (0xE000, 0xE100, 0xE200, 0xE300) for i in range(10)}


@pytest.mark.skipif(not CASES_FROM_THE_FIELD.is_file(), reason="../shared/cases is not here")
def test_outputs_from_the_field() -> None:
    cases = [json.loads(line) for line in CASES_FROM_THE_FIELD.read_text(encoding="utf-8").splitlines()]
    assert [(c["output"], extract_answer_letter(c["output"])) for c in cases] == [
        (c["output"], c["expected"]) for c in cases
    ]


def test_long_outputs_take_no_exponential_time() -> None:
    started = time.process_time()
    for output in (
        "A, " * 1_500,
        "1. B\n" * 500,
        "B " * 1_500,
        "정답은 " + " " * 20_000 + "B",
        "A는 아니고 B가 아니며 정답은 C 폐렴이 " * 100,
    ):
        extract_answer_letter(output)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(("output", "expected"), [(o, x) for x, outputs in MORE_OPTIONS.items() for o in outputs])
def test_reads_ten_options(output: str, expected: str | None) -> None:
    assert extract_answer_letter(output, LETTERS) == expected


@pytest.mark.parametrize(("output", "letters"), [("정답: D", "ABC"), ("C", "AB"), ("정답은 3번", "AB"), ("⑤", "ABCD")])
def test_gives_no_letter_that_is_no_option(output: str, letters: str) -> None:
    assert extract_answer_letter(output, letters) is None
    assert extract_answer_letter(output, LETTERS) is not None


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_real_outputs() -> None:
    cases = [json.loads(line) for line in (DATA / "extraction_cases.jsonl").read_text(encoding="utf-8").splitlines()]
    read = [(case["expected"], extract_answer_letter(case["output"], "".join(case["options"]))) for case in cases]
    assert sum(expected == found for expected, found in read) >= 65
    assert not [found for expected, found in read if expected is None and found is not None]


def test_the_old_name_reads_the_same() -> None:
    assert extract_answer_letter("**정답: D**") == "D"


# A token of the tokenizer's own, such as <|end|>, is no text: what a model writes ends there.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: bool(text.strip()) and not re.search(r"<[|/a-z]", text)
)
# fmt: off
SENTENCES = st.lists(
    st.sampled_from(
        [
            "A는 금기이다.", "B가 가장 적절하다.", "(C)는 드물다.", "비타민 D가 낮다.", "A. 아스피린", "B. 와파린", "D",
            "따라서 정답은 E이다.", "The answer is A.", "Option B is wrong.", "1번은 틀리다.", "점수표: A=1, B=3", "\n",
            "**E**", "τ = F/A", "answer", "다음과 같다:",
        ]
    ),
    min_size=1,
    max_size=6,
).map(" ".join).filter(str.strip)
# fmt: on


@st.composite
def records(draw: st.DrawFn, text: st.SearchStrategy[str]) -> McqRecord:
    options = tuple(draw(st.lists(text, min_size=2, max_size=10)))
    rationale = draw(st.dictionaries(st.sampled_from(FIELDS), text))
    return McqRecord("1", draw(text), options, draw(st.sampled_from(LETTERS[: len(options)])), rationale=rationale)


@settings(deadline=None)  # the machine may be busy
@given(record=records(TEXT) | records(SENTENCES), style=st.sampled_from(MCQ_STYLES))
def test_reads_back_every_completion_that_the_prompts_render(record: McqRecord, style: str) -> None:
    completion = render_mcq(record, style, worked=record).completion
    assert extract_answer_letter(completion, record.letters) == record.answer
    assert extract_answer_letter(completion + "<end_of_turn>\n", record.letters) == record.answer


@settings(deadline=None)  # the machine may be busy
@given(st.text() | SENTENCES, st.sampled_from(["AB", "ABCDE", LETTERS]))
def test_any_output_gives_an_option_or_none(output: str, letters: str) -> None:
    assert extract_answer_letter(output, letters) in {None, *letters}
    assert 0 <= score_format(output, FIELDS, letters).score <= 1


@settings(deadline=None)  # the machine may be busy
@given(record=records(TEXT))
def test_rendered_completions_keep_the_whole_format(record: McqRecord) -> None:
    plain = McqRecord("1", "q", record.options, record.answer, rationale={name: "근거" for name in record.rationale})
    fields = [name for name in FIELDS if name in plain.rationale]
    found = score_format(render_mcq(plain).completion, fields, plain.letters)
    assert (found.score, found.kept, found.missing, found.answered) == (1.0, tuple(fields), (), True)


@pytest.mark.parametrize(
    ("output", "score", "kept", "answered"),
    [
        ("facts: 발열\nanalysis: B가 맞다\nanswer:\nB", 1.0, ("facts", "analysis"), True),
        ("facts: 발열\nanalysis:\nB가 맞다\nanswer: B\n", 1.0, ("facts", "analysis"), True),
        ("facts:\nanalysis: B가 맞다\nanswer:\nB", 2 / 3, ("analysis",), True),
        ("analysis: B가 맞다\nfacts: 발열\nanswer:\nB", 2 / 3, ("analysis",), True),
        ("facts: 발열\nanalysis: B\nanswer:\nB\nanswer:\nC", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanalysis: B\nanswer:\nB, C", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanalysis: B\nanswer:\nF", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanswer:\nB\nanalysis: 발열", 2 / 3, ("facts", "analysis"), False),
        ("answer:\nB", 1 / 3, (), True),
        ("정답은 B입니다", 0.0, (), False),
        ("", 0.0, (), False),
    ],
)
def test_format_score_by_hand(output: str, score: float, kept: tuple[str, ...], answered: bool) -> None:
    found = score_format(output, ("facts", "analysis"))
    assert (found.score, found.kept, found.answered) == (pytest.approx(score), kept, answered)
    assert {*found.kept, *found.missing} == {"facts", "analysis"}


def test_total_weighs_the_format_one_third() -> None:
    totals = [score_total(kept, right) for kept, right in ((1, True), (1, False), (0, True), (0.5, False))]
    assert totals == pytest.approx([1, 1 / 3, 2 / 3, 1 / 6])


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("One might think the answer is A, but it is C.", "C"),
        ("You might assume the answer is B. Actually, the answer is D.", "D"),
        ("I would guess the answer is B", "B"),
        ("정답을 B로 오인할 수 있으나 정답은 E이다.", "E"),
        ("정답은 A라고 생각할 수 있지만 그렇지 않다.", None),
    ],
)
def test_what_others_might_think_is_no_verdict(output: str, letter: str | None) -> None:
    assert extract_answer_letter(output, "ABCDE") == letter
