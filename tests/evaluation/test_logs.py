"""Answers from anywhere: read, named, paired by id or by text, and written as lm-evaluation-harness writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from medlora.cli.compare import main
from medlora.errors import InputError
from medlora.evaluation.logs import lm_eval
from medlora.evaluation.logs.inputs import Input, Reading, parse_input, read_inputs
from medlora.evaluation.logs.lm_eval_files import write_lm_eval
from medlora.evaluation.logs.log import Log
from medlora.evaluation.logs.pairing import pair_logs
from medlora.evaluation.predictions import Prediction, write_predictions
from medlora.records import McqRecord
from medlora.reporting.report import build_report
from tests.support.predictions import TWO_TESTS, answer

DATE = "2026-11-26T10-00-00.123456"


def ask(n: int = 4, test: str = "one") -> list[McqRecord]:
    return [McqRecord(f"q{i}", f"질문 {test} {i}?", ("가", "나", "다", "라"), "ABCD"[i % 4]) for i in range(n)]


def write_scored(folder: Path, task: str, rows: Sequence[tuple[McqRecord, str]], by_text: bool = False) -> Path:
    """Samples of a multiple-choice task as lm-eval writes them: every number is text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (record, choice) in enumerate(rows):
        values = [-0.5 if letter == choice else -2.0 for letter in record.letters]
        lines.append(
            {
                "doc_id": i,
                "doc": {"question": record.question, "options": list(record.options), "answer": record.answer},
                "target": record.answer if by_text else str("ABCD".index(record.answer)),
                "arguments": {f"gen_args_{j}": {"arg_0": "…", "arg_1": f" {x}"} for j, x in enumerate("ABCD")},
                "resps": [[[str(value), "False"]] for value in values],
                "filtered_resps": [[str(value), "False"] for value in values],
                "filter": "none",
                "metrics": ["acc"],
                "acc": float(choice == record.answer),
            }
        )
    path = folder / f"samples_{task}_{DATE}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_generated(folder: Path, rows: Sequence[tuple[str, str, float]], **more: Any) -> Path:
    """Samples of task kormedmcqa: target, what was extracted, and the metric."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_kormedmcqa_doctor_{DATE}.jsonl"
    lines = [
        {
            "doc_id": i,
            "doc": {
                "question": f"질문 {i}",
                **dict(zip("ABCDE", "가나다라마", strict=True)),
                "answer": "ABCDE".index(gold) + 1,
            },
            "target": gold,
            "resps": [[f"정답: {text}"]],
            "filtered_resps": [text],
            "filter": "none",
            "exact_match": right,
            **more,
        }
        for i, (gold, text, right) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("by_text", [False, True])
def test_samples_of_multiple_choice_are_read(tmp_path: Path, by_text: bool) -> None:
    log = lm_eval.read_samples(
        write_scored(tmp_path / "model", "kor_doctor", list(zip(ask(), "ABDD", strict=True)), by_text)
    )
    assert (log.stage, {p.test for p in log.predictions}) == ("model", {"kor_doctor"})
    assert [(p.gold, p.choice) for p in log.predictions] == [("A", "A"), ("B", "B"), ("C", "D"), ("D", "D")]
    for p in log.predictions:
        assert math.isclose(sum(p.probabilities), 1) and p.options == 4 and p.margin and p.margin > 0.4
    assert log.questions["kor_doctor", "2"].question == "질문 one 2?"


def test_options_that_are_numbers_are_no_trap(tmp_path: Path) -> None:
    """With the options 1 to 4, target "2" may be a place or a text; the file's own acc tells."""
    path = write_scored(tmp_path / "m", "t", list(zip(ask(), "ABDD", strict=True)))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["arguments"] = {f"g{j}": {"arg_0": "", "arg_1": f" {j + 1}"} for j in range(4)}
        row["target"] = str("ABCD".index(row["doc"]["answer"]) + 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [p.gold for p in lm_eval.read_samples(path).predictions] == list("ABCD")


def test_samples_of_generated_answers_are_read_as_their_metric_has_them(tmp_path: Path) -> None:
    path = write_generated(tmp_path / "m", [("A", "A", 1.0), ("B", "C", 0.0), ("C", "C입니다", 0.0), ("D", "", 0.0)])
    log = lm_eval.read_samples(path)
    assert [p.choice for p in log.predictions] == ["A", "C", None, None]
    assert any("1 answers that medlora reads differently" in note for note in log.notes)
    assert [p.choice for p in lm_eval.read_samples(path, reparse=True).predictions][:3] == ["A", "C", "C"]


def test_of_several_filters_one_is_taken_and_named(tmp_path: Path) -> None:
    path = write_generated(tmp_path / "m", [("A", "B", 0.0)])
    row = json.loads(path.read_text(encoding="utf-8"))
    rows = [{**row, "filter": "extract_answer", "filtered_resps": ["A"], "exact_match": 1.0}, {**row, "filter": "raw"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    log = lm_eval.read_samples(path)
    assert [p.choice for p in log.predictions] == ["A"] and "filter extract_answer was taken" in log.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no samples in it"),
        ("{]\n", "not a readable file of JSON lines"),
        ("[1]\n", ":1: no sample of lm-evaluation-harness"),
        ('{"doc": {}, "target": "x"}\n', ":1: target 'x' is no letter"),
    ],
)
def test_what_is_no_sample_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / f"samples_t_{DATE}.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="samples_t") as caught:
        lm_eval.read_samples(path)
    assert said in str(caught.value)


def test_results_give_sums_with_their_numbers(tmp_path: Path) -> None:
    content = {
        "results": {"kor": {"alias": "kor", "acc,none": 0.75, "acc_stderr,none": 0.1}, "ppl": {"word,none": 9.0}},
        "n-samples": {"kor": {"original": 8, "effective": 8}},
        "model_name": "org/model",
    }
    path = tmp_path / f"results_{DATE}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    log = lm_eval.read_results(path)
    assert log.stage == "model" and [(t.test, t.correct, t.total) for t in log.totals] == [("kor", 6, 8)]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no key `results`"):
        lm_eval.read_results(path)


def test_an_input_is_path_stage_and_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "odd:b=c").mkdir()
    a, odd = str(tmp_path / "a"), str(tmp_path / "odd:b=c")
    assert parse_input(a) == Input(tmp_path / "a")
    assert parse_input(f"{a}:base,02") == Input(tmp_path / "a", ("base", "02"))
    assert parse_input(f"{a}:02=mine") == Input(tmp_path / "a", ("02",), "mine")
    assert parse_input(f"{a}=mine") == Input(tmp_path / "a", (), "mine")
    assert parse_input(odd) == Input(tmp_path / "odd:b=c") and parse_input(f"{odd}:02=x").stages == ("02",)
    for wrong in (str(tmp_path / "none"), f"{a}="):
        with pytest.raises(InputError):
            parse_input(wrong)


def make_run(folder: Path, predictions: Sequence[Prediction]) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    write_predictions(folder / "evaluation" / "predictions.parquet", predictions)
    return folder


def test_stages_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", TWO_TESTS), make_run(tmp_path / "b", TWO_TESTS)
    names = [log.stage for log in read_inputs([Input(a), Input(b)], Reading())]
    assert names == ["a:base", "a:00", "b:base", "b:00"]
    names = [log.stage for log in read_inputs([Input(a, ("00",), "mine"), Input(b, ("00",))], Reading())]
    assert names == ["mine", "00"]
    with pytest.raises(InputError, match="several files of that name"):
        read_inputs([Input(a, ("00",), "x"), Input(b, ("00",), "x")], Reading())
    with pytest.raises(InputError, match="no stage 07; it holds base, 00"):
        read_inputs([Input(a, ("07",))], Reading())


def test_the_same_questions_are_paired_by_text_whatever_their_ids(tmp_path: Path) -> None:
    records = ask(8)
    ours = make_run(tmp_path / "ours", answer("00", "one", "ABCDABCA"))
    log = Log("00", tuple(answer("00", "one", "ABCDABCA")), {("one", r.id): r for r in records})
    assert ours
    theirs = lm_eval.read_samples(
        write_scored(tmp_path / "model", "task", list(zip(records[::-1], "DCBADCBB", strict=True)))
    )
    paired = pair_logs([log, replace(theirs, predictions=tuple(replace(p, stage="model") for p in theirs.predictions))])
    (pair,) = build_report(paired.predictions, {}, seed=0)["comparisons"]
    assert (pair["test"], pair["total"]) == ("one", 8)
    assert [q[1] for q in pair["gained"]] == ["q7"] and [q[1] for q in pair["lost"]] == ["q0"]
    assert paired.counts == ("one: 8 questions are paired across 2 stages",)
    assert [record.id for record in paired.questions["one"]] == [f"q{i}" for i in range(8)]


def test_what_is_not_the_same_question_is_not_paired_and_named() -> None:
    records = {("one", r.id): r for r in ask(8)}
    first = Log("a", tuple(answer("a", "one", "ABCDABCD")), records)
    changed = {**records, ("one", "q0"): replace(records["one", "q0"], options=("가", "나", "다", "마"))}
    golds = [replace(p, gold="A") if p.id == "q1" else p for p in answer("b", "one", "ABCDABCD")]
    more = Prediction("new", "one", "b", "A", "A", options=4)
    paired = pair_logs([first, Log("b", (*golds, more), changed)])
    assert paired.counts == ("one: 6 questions are paired across 2 stages",)
    said = " ".join(paired.notes)
    for reason in ("1 have a known text with other options", "1 have another right letter", "1 have no counterpart"):
        assert reason in said
    assert "a: 2 of its 8 questions of one are left out" in said
    assert {p.stage: sum(q.stage == p.stage for q in paired.predictions) for p in paired.predictions} == {
        "a": 6,
        "b": 6,
    }


def test_logs_without_a_common_question_stay_apart() -> None:
    other = [replace(p, id=f"x{p.id}") for p in answer("b", "one", "ABCDABCD")]
    paired = pair_logs([Log("a", tuple(answer("a", "one", "ABCDABCD"))), Log("b", tuple(other))])
    assert {p.test for p in paired.predictions} == {"one", "one (b)"}
    assert build_report(paired.predictions, {}, seed=0)["comparisons"] == []
    assert any("shares no question of one" in note for note in paired.notes)


def test_everything_is_compared_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = ask(8)
    run = make_run(tmp_path / "run", answer("00", "one", "ABCDABCA"))
    questions = tmp_path / "test.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"id": r.id, "question": r.question, "options": list(r.options), "answer": r.answer}) + "\n"
            for r in records
        ),
        encoding="utf-8",
    )
    config = {"evaluation": {"tests": [{"name": "one", "source": str(questions)}]}}
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    write_scored(tmp_path / "model", "task", list(zip(records[::-1], "DCBADCBB", strict=True)))
    results = tmp_path / "other" / f"results_{DATE}.json"
    results.parent.mkdir()
    results.write_text(
        json.dumps({"results": {"t": {"exact_match,none": 0.5}}, "n-samples": {"t": {"effective": 8}}}),
        encoding="utf-8",
    )
    out = tmp_path / "out"
    arguments = [str(run), f"{tmp_path / 'model'}=theirs", str(results), "--out", str(out), "--lm-eval"]
    assert main(arguments) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in report["overall"]] == ["00", "theirs"]
    assert (
        report["verdict"].startswith("On test one, theirs and 00 cannot be told apart") and "n = 8" in report["verdict"]
    )
    printed = capsys.readouterr().out
    assert report["verdict"] in " ".join(printed.split()) and "a sum alone, not paired" in " ".join(printed.split())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Results known as sums alone" in page and "8 questions are paired across 2 stages" in page
    assert "질문 one 3?" in (out / "questions.html").read_text(encoding="utf-8")
    # What was written for lm-eval gives the same comparison again.
    again = [f"{out / 'lm_eval' / '00'}=00", f"{out / 'lm_eval' / 'theirs'}=theirs"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    second = json.loads((tmp_path / "again" / "report.json").read_text(encoding="utf-8"))
    assert [row["correct"] for row in second["stages"]] == [row["correct"] for row in report["stages"]]
    assert second["verdict"] == report["verdict"]
    assert main([str(results), "--out", str(tmp_path / "sums")]) == 2 and not (tmp_path / "sums").exists()
    assert "run lm_eval with --log_samples" in capsys.readouterr().err


LIKELY = [
    replace(p, probabilities=tuple(0.7 if x == p.choice else 0.1 for x in "ABCD"))
    for p in answer("s/1 x", "A b", "ABCDABCA")
]


def test_lm_evals_own_code_finds_and_reads_what_is_written(tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    (folder,) = write_lm_eval(tmp_path, LIKELY, {}, datetime(2026, 11, 26, 10))
    files = [str(path) for path in folder.iterdir()]
    (results,) = utils.get_results_filenames(files)
    (samples,) = utils.get_sample_results_filenames(files)
    assert utils.get_file_task_name(Path(samples).name) == "A_b"
    assert utils.get_file_datetime(Path(samples).name) == utils.get_file_datetime(Path(results).name)[: -len(".json")]
    pytest.importorskip("pytablewriter")
    content = json.loads(Path(results).read_text(encoding="utf-8"))
    assert "A_b" in utils.make_table(content)


def test_files_for_lm_eval_have_its_structure(tmp_path: Path) -> None:
    (folder,) = write_lm_eval(
        tmp_path, LIKELY, {"A b": [replace(r, id=r.id) for r in ask(8)]}, datetime(2026, 11, 26, 10)
    )
    assert folder.name == "s__1__x"
    date = "2026-11-26T10-00-00.000000"
    assert sorted(path.name for path in folder.iterdir()) == [f"results_{date}.json", f"samples_A_b_{date}.jsonl"]
    results = json.loads((folder / f"results_{date}.json").read_text(encoding="utf-8"))
    assert results["results"]["A_b"]["acc,none"] == 7 / 8
    assert results["results"]["A_b"]["acc_stderr,none"] == pytest.approx(math.sqrt(7 / 8 * 1 / 8 / 7))
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date", "task_hashes"):
        assert key in results
    rows = [json.loads(x) for x in (folder / f"samples_A_b_{date}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 and sum(row["acc"] for row in rows) == 7
    for row in rows:
        assert set(row) == {
            *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
            *("doc_hash", "prompt_hash", "target_hash", "acc"),
        }
    log = lm_eval.read_samples(folder / f"samples_A_b_{date}.jsonl")
    assert [(p.id, p.gold, p.choice) for p in log.predictions] == [(p.id, p.gold, p.choice) for p in LIKELY]
    for got, was in zip(log.predictions, LIKELY, strict=True):
        assert got.probabilities == pytest.approx(was.probabilities)
