"""The words themselves: what is asserted here are bytes."""

from __future__ import annotations

import pytest

from medlora.evaluation.answers.letter import extract_answer_letter
from medlora.prompts import MCQ_STYLES, render_mcq
from medlora.records import McqRecord

QUESTION = McqRecord("1", " 열이 나는 이유는? ", ("감염", "수면"), "B")
SHOT = McqRecord("2", "약은?", ("아스피린", "인슐린"), "A", rationale={"analysis": "해열제"})
WORKED = McqRecord("3", "췌장은?", ("인슐린", "위산"), "A", rationale={"analysis": "호르몬"})


def test_kormedmcqa_is_raw_text_with_the_full_width_colon() -> None:
    example = render_mcq(QUESTION, "kormedmcqa")
    assert (example.prompt, example.completion) == ("열이 나는 이유는?\nA. 감염\nB. 수면\n정답：", " B")
    assert not example.chat and example.shots == ()


def test_kormedmcqa_shots_are_solved_with_a_space_and_a_blank_line() -> None:
    example = render_mcq(QUESTION, "kormedmcqa", shots=(SHOT, SHOT))
    shot = "약은?\nA. 아스피린\nB. 인슐린\n정답： A\n\n"
    assert example.prompt == f"{shot}{shot}열이 나는 이유는?\nA. 감염\nB. 수면\n정답："
    assert example.shots == ()


def test_the_other_styles_are_what_adapters_were_trained_with() -> None:
    question = "질문: 열이 나는 이유는?\nA. 감염\nB. 수면"
    assert render_mcq(QUESTION, "answer").prompt == f"{question}\n정답:"
    assert render_mcq(QUESTION, "reasoning").prompt == f"{question}\n풀이:"
    assert render_mcq(SHOT, "reasoning").completion == "analysis: 해열제\nanswer:\nA"
    assert render_mcq(QUESTION, "reasoning_full", WORKED).prompt == (
        "형식:\nanalysis: 선택지 분석\nanswer: 정답\n\n질문: 췌장은?\nA. 인슐린\nB. 위산\n풀이:\n"
        f"analysis: 호르몬\nanswer:\nA\n\n{question}\n풀이:"
    )


@pytest.mark.parametrize(("style", "completion"), [("answer", "A"), ("reasoning", "analysis: 해열제\nanswer:\nA")])
def test_chat_shots_are_turns_of_their_own(style: str, completion: str) -> None:
    example = render_mcq(QUESTION, style, shots=(SHOT,))
    assert example.prompt == render_mcq(QUESTION, style).prompt
    assert example.shots == ((render_mcq(SHOT, style).prompt, completion),)


def test_shots_behind_a_worked_example_do_not_repeat_it() -> None:
    example = render_mcq(QUESTION, "reasoning_full", WORKED, (SHOT,))
    assert example.shots == ((render_mcq(SHOT, "reasoning").prompt, "analysis: 해열제\nanswer:\nA"),)


@pytest.mark.parametrize("style", MCQ_STYLES)
def test_template_and_parser_agree(style: str) -> None:
    for record in (QUESTION, SHOT):
        assert extract_answer_letter(render_mcq(record, style, WORKED).completion, record.letters) == record.answer


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown MCQ prompt style 'poem'; known: .*kormedmcqa"):
        render_mcq(QUESTION, "poem")
