"""An evaluation before and after the model: batches, ledger, stages, doubts. No Ray, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medlora.config.evaluation import EvaluateConfig, EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.errors import InputError
from medlora.evaluation.ledger import pack_prediction, plan_batches, read_ledger, sort_predictions
from medlora.evaluation.plan import (
    _dump_evaluation,
    choose_batch_size,
    describe_evaluation,
    describe_other_task,
    refuse_other,
)
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.questions import read_asked, read_tests
from medlora.evaluation.stages import find_doubts, find_stages
from medlora.records import McqRecord
from medlora.runs.files import append_json, write_json
from medlora.runs.manifests import commit
from tests.support import ROOT


def questions(n: int) -> list[McqRecord]:
    return [McqRecord(f"q{i}", "?" * (i % 7 + 1), ("a", "b"), "AB"[i % 2]) for i in range(n)]


def plan(
    tests: dict[str, list[McqRecord]], size: int, answered: Any = frozenset()
) -> list[list[tuple[str, McqRecord]]]:
    return [list(batch.questions) for batch in plan_batches(tests, size, ["a"], answered)]


@pytest.mark.parametrize("size", range(1, 8))
def test_every_question_stands_in_exactly_one_batch(size: int) -> None:
    for n in range(51):
        tests = {"t": questions(n), "u": questions(n // 2)}
        batches = plan(tests, size)
        asked = [(test, record.id) for batch in batches for test, record in batch]
        assert len(asked) == len(set(asked)) == n + n // 2 and all(0 < len(batch) <= size for batch in batches)


def test_what_is_answered_is_not_asked_again_and_changes_no_other_batch() -> None:
    tests = {"t": questions(20)}
    whole = plan(tests, 4)
    done = {("a", test, record.id) for batch in whole[1:3] for test, record in batch}
    assert plan(tests, 4, done) == [whole[0], *whole[3:]]


def test_a_batch_is_asked_of_the_stages_alone_that_have_not_answered_it() -> None:
    tests = {"t": questions(12)}
    whole = plan(tests, 4)
    done = {("a", test, record.id) for batch in whole for test, record in batch}
    done |= {("b", test, record.id) for test, record in whole[1]}
    batches = plan_batches(tests, 4, ["a", "b", "c"], done)
    assert [list(batch.questions) for batch in batches] == whole
    assert [batch.stages for batch in batches] == [("b", "c"), ("c",), ("b", "c")]


def test_the_plan_does_not_depend_on_the_order_of_the_rows() -> None:
    assert plan({"t": questions(20)}, 4) == plan({"t": questions(20)[::-1]}, 4)


def predictions(ids: list[str], stages: tuple[str, ...] = ("a", "b")) -> list[Prediction]:
    return [Prediction(i, "t", stage, "A", "B", probabilities=(0.25, 0.75)) for i in ids for stage in stages]


def test_the_ledger_gives_back_every_answer_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_json(path, {"predictions": [pack_prediction(p) for p in predictions(["q0", "q1"])]})
    append_json(path, {"predictions": [pack_prediction(p) for p in predictions(["q1"])]})
    append_json(path, {"predictions": [pack_prediction(p) for p in predictions(["q2"], ("a",))]})
    with path.open("a") as file:
        file.write('{"predictions": [{"id": "q3"')
    assert read_ledger(path, ["a", "b"]) == [*predictions(["q0", "q1"]), *predictions(["q2"], ("a",))]
    assert read_ledger(path, ["b"]) == predictions(["q0", "q1"], ("b",))
    assert read_ledger(tmp_path / "absent", ["a"]) == []


def test_a_missing_or_double_answer_is_an_error() -> None:
    tests = {"t": questions(2)}
    right = predictions(["q1", "q0"])
    assert [(p.stage, p.id) for p in sort_predictions(right, ["a", "b"], tests)] == [
        ("a", "q0"),
        ("a", "q1"),
        ("b", "q0"),
        ("b", "q1"),
    ]
    for wrong in (right[1:], [*right, right[0]], predictions(["q0", "q9"])):
        with pytest.raises(RuntimeError, match="different, to 4 questions"):
            sort_predictions(wrong, ["a", "b"], tests)


def adapter(folder: Path, base: str = "org/base") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    return folder


def configure(*stages: Any, **evaluation: Any) -> EvaluateConfig:
    evaluation = {"tests": [{"name": "t", "source": "miniature:mcq/dev"}], **evaluation}
    return EvaluateConfig.model_validate(
        {"name": "e", "base": {"model": "org/base"}, "stages": stages, "evaluation": evaluation}
    )


def test_stages_are_found_by_adapters_and_by_run(tmp_path: Path) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(config.read_bytes())
    for name in ("00", "01", "02"):
        adapter(tmp_path / "run" / "phases" / name / "adapter")
    mine = adapter(tmp_path / "mine" / "lora_adapter")
    stages = find_stages(
        configure({"name": "mine", "adapters": [str(tmp_path / "mine")]}, f"{tmp_path}/run:base,02", {"name": "plain"})
    )
    assert {name: [link.folder for link in chain] for name, chain in stages.items()} == {
        "mine": [str(mine)],
        "base": [],
        "02": [str(tmp_path / "run" / "phases" / name / "adapter") for name in ("01", "02")],
        "plain": [],
    }


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "x", "adapters": ["nowhere"]}], "stages.0.adapters.0: .*nowhere: no adapter here"),
        ([{"name": "x"}, {"name": "x"}], "stages.1: there is a stage 'x' already"),
        (["runs/nothing:base"], "stages.0: 'runs/nothing:base' names no run; write FOLDER:STAGE"),
        (["quickstart"], "stages.0: 'quickstart' names no run"),
    ],
)
def test_a_stage_that_is_not_there_is_named(stages: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_stages(configure(*stages))


def test_an_adapter_of_another_base_or_prompt_style_is_doubted(tmp_path: Path) -> None:
    def doubts(folder: Path, style: str = "reasoning") -> list[str]:
        tests = [{"name": "t", "source": "miniature:mcq/dev"}]
        evaluation = EvaluationConfig.model_validate({"tests": tests, "style": style})
        return find_doubts(
            BaseModelConfig(model="/models/base"), {"x": [Link(name="x", folder=str(folder))]}, evaluation
        )

    assert doubts(adapter(tmp_path / "same")) == []
    (other,) = doubts(adapter(tmp_path / "other", base="org/another"))
    assert "was made for base org/another, not for /models/base" in other
    phase = tmp_path / "01"
    folder = adapter(phase / "adapter")
    sources = [{"source": "q", "style": "answer"}, {"source": "text", "style": "reasoning"}]
    commit(phase, {"fingerprint": {"phases.01": {"sources": sources}}, "question_sources": ["q"]})
    assert doubts(folder, "answer") == []
    assert "was trained with prompt style answer, not reasoning" in doubts(folder)[0]


def test_another_task_than_the_trained_one_is_reported(tmp_path: Path) -> None:
    tests = [{"name": "t", "source": "miniature:mcq/dev"}]

    def describe(folder: Path, scoring: str) -> list[str]:
        evaluation = EvaluationConfig.model_validate({"tests": tests, "style": "reasoning", "scoring": scoring})
        return describe_other_task({"base": (), "01": [Link(name="01", folder=str(folder))]}, evaluation)

    sources = [{"source": "q", "style": "reasoning"}]
    about = {"fingerprint": {"phases.01": {"sources": sources}}, "question_sources": ["q"]}
    reasons, answers = adapter(tmp_path / "a" / "adapter"), adapter(tmp_path / "b" / "adapter")
    commit(tmp_path / "a", {**about, "rationale": ["facts"]})
    commit(tmp_path / "b", {**about, "rationale": []})
    (said,) = describe(reasons, "letter")
    assert said.startswith("01: trained to reason before the answer, and scored by `letter`")
    assert "another task than the trained one" in said
    assert describe(reasons, "option_text") and not describe(reasons, "reason") and not describe(answers, "letter")


def test_a_test_without_questions_or_of_a_taken_name_is_refused() -> None:
    def tests(*given: dict[str, str]) -> EvaluationConfig:
        return EvaluationConfig.model_validate({"tests": given})

    with pytest.raises(InputError, match="evaluation.tests.0.source: miniature:text holds no questions"):
        read_tests(tests({"name": "t", "source": "miniature:text"}))
    with pytest.raises(InputError, match="evaluation.tests.1.name: there is a test 't' already"):
        read_tests(tests({"name": "t", "source": "miniature:mcq/dev"}, {"name": "t", "source": "miniature:mcq/train"}))


def test_a_folder_with_another_evaluation_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "fingerprint.json", {"evaluation": {"scoring": "letter"}})
    refuse_other(tmp_path, {"evaluation": {"scoring": "letter"}})
    with pytest.raises(InputError, match='evaluation.scoring: was "letter", now "reason"'):
        refuse_other(tmp_path, {"evaluation": {"scoring": "reason"}})


def write_questions(path: Path, rows: list[McqRecord]) -> str:
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "id": r.id,
                    "question": r.question,
                    "options": r.options,
                    "answer": r.answer,
                    "rationale": r.rationale or None,
                }
            )
            for r in rows
        ),
        encoding="utf-8",
    )
    return str(path)


def shown_by(tmp_path: Path, solved: list[McqRecord], **keys: Any) -> EvaluationConfig:
    asked = [McqRecord(f"t{i}", f"asked {i}?", ("a", "b"), "A") for i in range(3)]
    source = write_questions(tmp_path / "solved.jsonl", solved)
    keys = {name: {**value, "source": source} if isinstance(value, dict) else value for name, value in keys.items()}
    tests = [{"name": "t", "source": write_questions(tmp_path / "asked.jsonl", asked)}]
    return EvaluationConfig.model_validate({"tests": tests, **keys})


SOLVED = [McqRecord(f"s{i}", f"solved {i}?", ("a", "b"), "B") for i in range(6)]
REASONED = McqRecord("r", "why?", ("a", "b"), "B", rationale={"facts": "b is so"})


def test_shots_are_the_first_or_drawn_with_the_seed(tmp_path: Path) -> None:
    first = read_asked(shown_by(tmp_path, SOLVED, few_shot={"k": 2}), seed=0)
    assert [record.id for record in first.shots] == ["s0", "s1"] and first.worked is None
    seeded = shown_by(tmp_path, SOLVED, few_shot={"k": 3, "choose": "seeded"})
    drawn = [tuple(record.id for record in read_asked(seeded, seed).shots) for seed in range(8)]
    assert drawn[3] == tuple(record.id for record in read_asked(seeded, 3).shots) and len(set(drawn)) > 1


def test_the_worked_example_is_the_first_with_a_rationale(tmp_path: Path) -> None:
    config = shown_by(tmp_path, [SOLVED[0], REASONED], style="reasoning_full", worked_example={})
    assert read_asked(config, 0).worked == REASONED


@pytest.mark.parametrize(
    ("solved", "keys", "said"),
    [
        (SOLVED[:1], {"few_shot": {"k": 2}}, "evaluation.few_shot: .* has 1 questions, k asks for 2"),
        (
            [McqRecord("s", " asked 1? ", ("c", "d"), "A")],
            {"few_shot": {"k": 1}},
            r"question s is shown with its answer, and test t asks it \(as t1\)",
        ),
        (SOLVED, {"style": "reasoning_full", "worked_example": {}}, "evaluation.worked_example: .* no question with a"),
        (
            [McqRecord("s", "asked 2?", ("a", "b"), "A", rationale={"facts": "so"})],
            {"style": "reasoning_full", "worked_example": {}},
            r"evaluation.worked_example: question s is shown .* \(as t2\)",
        ),
    ],
)
def test_what_prompts_cannot_show_is_refused(
    tmp_path: Path, solved: list[McqRecord], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        read_asked(shown_by(tmp_path, solved, **keys), 0)


def test_other_shots_are_another_evaluation(tmp_path: Path) -> None:
    base = BaseModelConfig(model="miniature")
    described = []
    for solved in (SOLVED, SOLVED[1:]):
        config = shown_by(tmp_path, solved, few_shot={"k": 2})
        described.append(describe_evaluation(base, 0, config, {"base": ()}, read_asked(config, 0)))
    assert [name for name in described[0] if described[0][name] != described[1][name]] == ["shown"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"style": "reasoning_full"}, "reasoning_full needs one"),
        ({"worked_example": {"source": "x.jsonl"}}, "only that style shows it"),
        ({"placement": {"workers": 2, "min_workers": 3}}, "min_workers: 3 is more than workers: 2"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "t.jsonl"}], **keys})


def test_a_batch_is_as_large_as_what_answers_it_wants() -> None:
    def size(gpus: float, **keys: Any) -> int:
        tests = [{"name": "t", "source": "t.jsonl"}]
        return choose_batch_size(EvaluationConfig.model_validate({"tests": tests, **keys}), gpus)

    assert size(0.0) == size(0.0, scoring="reason") == 32
    assert (size(1.0), size(0.4, scoring="reason"), size(1.0, scoring="generate")) == (1024, 256, 256)
    assert size(1.0, batch_size=7) == size(0.0, batch_size=7) == 7


def test_keys_that_came_later_leave_the_fingerprint_alone_at_their_defaults() -> None:
    tests = [{"name": "t", "source": "t.jsonl"}]
    unset = _dump_evaluation(EvaluationConfig.model_validate({"tests": tests}))
    assert unset["batch_size"] == 32 and "dequantize" not in unset
    assert unset == _dump_evaluation(EvaluationConfig.model_validate({"tests": tests, "batch_size": 32}))
    other = _dump_evaluation(EvaluationConfig.model_validate({"tests": tests, "dequantize": "always"}))
    assert other == {**unset, "dequantize": "always"}
