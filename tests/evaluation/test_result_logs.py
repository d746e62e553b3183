from __future__ import annotations

from pathlib import Path

import pytest

from medlora.errors import InputError
from medlora.evaluation import statistics
from medlora.evaluation.logs.result_logs import read_result_log
from tests.support import ROOT

LOGS = ROOT.parent / "shared" / "data" / "kormedmcqa_logs"
HEADER = "id,category,trial,answer,pred,response\n"


@pytest.fixture
def log(tmp_path: Path):
    def write(text: str, header: str = HEADER) -> Path:
        path = tmp_path / "model-x.csv"
        path.write_text(header + text, encoding="utf-8")
        return path

    return write


def test_a_clean_log_becomes_predictions(log) -> None:
    found = read_result_log(log('doctor_0,doctor,0,A,A,A\nnurse_1,nurse,0,B,C,"정답은 C입니다,\n확실합니다"\n'))
    first, second = found.predictions
    assert (first.id, first.test, first.stage, first.gold, first.choice, first.options) == (
        "doctor_0",
        "doctor",
        "model-x",
        "A",
        "A",
        5,
    )
    assert (second.choice, second.correct, second.text) == ("C", False, "정답은 C입니다,\n확실합니다")
    assert (found.counts.rows, found.counts.questions) == (2, 2)
    assert read_result_log(log("d_0,d,0,A,A,A\n"), stage="gpt").predictions[0].stage == "gpt"


def test_rows_that_repeat_count_once_and_rows_that_disagree_give_no_choice(log) -> None:
    found = read_result_log(log("d_0,d,0,A,A,A\nd_0,d,0,A,A,A\nd_1,d,0,B,B,B\nd_1,d,0,B,C,C\nd_1,d,0,B,,\n"))
    same, differing = found.predictions
    assert (same.choice, same.error) == ("A", "")
    assert (differing.choice, differing.error) == (None, "rows disagree: B, C, no choice")
    assert (found.counts.repeated_rows, found.counts.conflicting) == (1, ("d_1",))
    assert statistics.accuracy(found.predictions).failed == 1


def test_blanks_and_other_words_are_unparsed_and_told_apart(log) -> None:
    found = read_result_log(log("d_0,d,0,A,,50\nd_1,d,0,A,None,\nd_2,d,0,A,AB,AB\nd_3,d,0,A,a,a\n"))
    assert [p.choice for p in found.predictions] == [None, None, None, "A"]
    assert (found.counts.blank, found.counts.not_a_letter) == (("d_0", "d_1"), ("d_2",))
    assert statistics.accuracy(found.predictions).unparsed == 3


@pytest.mark.parametrize(
    ("cell", "letter"),
    [
        *(
            (cell, "C")
            for cell in ("C", "c", "C.", "(C)", "[C]", "Ｃ", "Ⓒ", "3", "3.0", "３", "3번", "(3)", "③", "❸", "다", "㉢")
        ),
        *((cell, "C") for cell in ("C. 혈청 CK", "3번 혈청 CK", "③ 혈청 CK")),
        *(
            (cell, None)
            for cell in ("", "AB", "A, B", "A or B", "C/D", "3,4", "6", "33", "3.5", "C 세포", "정답", "none")
        ),
    ],
)
def test_cells_with_one_meaning_are_read_and_others_are_not(log, cell: str, letter: str | None) -> None:
    found = read_result_log(log(f'd_0,d,0,3,"{cell}",x\n'))
    assert (found.predictions[0].gold, found.predictions[0].choice) == ("C", letter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_0,d,0,0,1,x\nd_1,d,0,1,2,x\n", "column answer holds 0; it has two meanings"),
        ("d_0,d,0,1,0,x\nd_1,d,0,1,2,x\n", "column pred holds 0; it has two meanings"),
        ('d_0,d,0,"A, B",A,x\n', "column answer holds 'A, B', which names several options"),
        ("d_0,d,0,yes,A,x\n", "column answer holds 'yes'; write A to E or 1 to 5"),
    ],
)
def test_what_has_two_meanings_is_refused_by_name(log, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_result_log(log(text))


def test_rows_without_id_or_gold_are_left_out_and_counted(log) -> None:
    found = read_result_log(log(",d,0,A,A,A\nd_1,d,0,,A,A\nd_2,d,0,A,A,A\nd_2,d,0,B,A,A\nd_3,d,0,C,C,C\n"))
    assert [p.id for p in found.predictions] == ["d_3"]
    assert (found.counts.without_id, found.counts.gold_unusable) == (1, ("d_1", "d_2"))


def test_expected_questions_that_are_missing_come_out_as_failed(log) -> None:
    expected = {"d_0": "A", "d_1": "B"}
    found = read_result_log(log("d_0,d,0,A,A,A\nd_9,d,0,A,A,A\n"), expected=expected)
    assert [(p.id, p.test, p.gold, p.choice, p.error) for p in found.predictions] == [
        ("d_0", "d", "A", "A", ""),
        ("d_1", "d", "B", None, "no row in model-x.csv"),
    ]
    assert (found.counts.missing, found.counts.unexpected) == (("d_1",), ("d_9",))
    with pytest.raises(InputError, match="question d_0 has gold A, expected was B"):
        read_result_log(log("d_0,d,0,A,A,A\n"), expected={"d_0": "B"})


def test_responses_can_be_read_anew(log) -> None:
    path = log('d_0,d,0,C,A,"### ANSWER"\nd_1,d,0,C,A,"Beer-Lambert: A = εbc\n\nC"\n')
    assert read_result_log(path).counts.read_differently == ("d_0", "d_1")
    assert [p.choice for p in read_result_log(path).predictions] == ["A", "A"]
    assert [p.choice for p in read_result_log(path, reparse=True).predictions] == [None, "C"]


def test_one_of_several_trials_is_named(log) -> None:
    path = log("d_0,d,0,A,A,A\nd_0,d,1,A,B,B\n")
    assert read_result_log(path, trial="1").predictions[0].choice == "B"
    with pytest.raises(InputError, match=r"trials 0, 1 found; name one of them, not None"):
        read_result_log(path)
    with pytest.raises(InputError, match="not '7'"):
        read_result_log(path, trial="7")


@pytest.mark.parametrize(
    ("header", "text", "message"),
    [
        (HEADER, "", "no rows behind the header"),
        ("", "", "columns id, category, trial, answer, pred, response missing; found none"),
        ("id,answer,pred\n", "1,A,A\n", "columns category, trial, response missing; found id, answer, pred"),
        (HEADER, "d_0,d,0,A,A\n", "model-x.csv:2: a row needs 6 cells"),
        (HEADER, "d_0,d,0,A,A,A,A\n", "model-x.csv:2: a row needs 6 cells"),
        (HEADER, 'd_0,d,0,A,A,"A\n', "not a readable UTF-8 csv file"),
    ],
)
def test_unreadable_files_say_what_is_wrong(log, header: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_result_log(log(text, header))


def test_a_file_that_is_absent_or_not_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.csv"):
        read_result_log(tmp_path / "nothing.csv")
    (tmp_path / "korean.csv").write_bytes((HEADER + "d_0,d,0,A,A,").encode() + "정답".encode("cp949"))
    with pytest.raises(InputError, match=r"korean.csv: not a readable UTF-8 csv file"):
        read_result_log(tmp_path / "korean.csv")


# file: rows, questions, repeated rows, conflicting, blank; counted once with csv and Counter, not by this code.
REAL = {
    "claude-haiku-4-5-2025-12-11": (3025, 3009, 16, 0, 1),
    "claude-sonnet-4-2025-12-11": (24, 24, 0, 0, 0),
    "claude-sonnet-4-5-2025-12-11": (3061, 3009, 52, 0, 1),
    "gpt-4o-2025-12-11": (3001, 2933, 67, 1, 0),
    "gpt-5.1-2025-12-11": (6018, 3009, 2675, 334, 0),
    "nova-2-lite-2025-12-11": (3009, 3009, 0, 0, 394),
    "qwen3-next-2025-12-11": (3253, 3009, 243, 1, 0),
}


@pytest.mark.skipif(not LOGS.is_dir(), reason="../shared/data/kormedmcqa_logs is not here")
def test_the_seven_real_logs() -> None:
    haiku = read_result_log(LOGS / "claude-haiku-4-5-2025-12-11.csv")
    expected = {p.id: p.gold for p in haiku.predictions}
    stages = []
    for name, (rows, questions, repeated, conflicting, blank) in REAL.items():
        log = read_result_log(LOGS / f"{name}.csv", expected=expected)
        counts = log.counts
        assert (counts.rows, counts.repeated_rows) == (rows, repeated), name
        assert (len(counts.conflicting), len(counts.blank)) == (conflicting, blank), name
        assert len(counts.missing) == 3009 - questions and counts.questions == len(log.predictions) == 3009
        assert not counts.gold_unusable and not counts.without_id and not counts.not_a_letter and not counts.unexpected
        stages += log.predictions
    compared = {(c.before, c.after): c for c in statistics.compare_all(stages, seed=0, resamples=200)}
    assert len(compared) == 21
    better = compared["claude-haiku-4-5-2025-12-11", "claude-sonnet-4-5-2025-12-11"]
    assert len(better.gained) - len(better.lost) == 2746 - 2432 and better.low > 0 and better.p_holm < 1e-9
