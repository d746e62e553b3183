"""The tests of a run as tasks of lm-evaluation-harness: its own command gives an exported stage the letters that we give it.

Asking the harness needs the extra `eval-parity` (lm_eval); that test skips without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from medlora.answering.stage_model import StageModel
from medlora.cli import export
from medlora.config.evaluation import EvaluationConfig, StageEvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.chains import find_chain
from medlora.data.sources import read
from medlora.drivers.lm_eval_tasks import read_tests, write_tasks
from medlora.errors import InputError
from medlora.evaluation.logs.inputs import Reading, parse_input, read_inputs
from medlora.model.tokenizer import load_base_tokenizer, load_tokenizer
from medlora.prompts import render_mcq
from medlora.records import McqRecord
from medlora.runs.files import write_yaml
from medlora.runs.folders import RunFolder
from tests.support.tiny_run import configure


@pytest.fixture(scope="module")
def tests(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that no phase of the finished run reads."""
    file = tmp_path_factory.mktemp("tests") / "test.jsonl"
    shutil.copyfile(data / "dev.jsonl", file)
    return file


def evaluate(file: Path, **changes: Any) -> StageEvaluationConfig:
    tests = [{"name": "dev-questions", "source": str(file)}]
    return StageEvaluationConfig.model_validate({"tests": tests, "style": "answer", **changes})


def give_tests(config: RunConfig, file: Path, **changes: Any) -> RunConfig:
    return config.model_copy(update={"evaluation": evaluate(file, **changes)})


@pytest.fixture
def run(finished: Path, bases: dict[str, str], data: Path, tests: Path, tmp_path: Path) -> RunFolder:
    """The finished run, with tests in its config."""
    shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    write_yaml(folder.config, give_tests(configure(bases["gemma"], data), tests).model_dump(mode="json"))
    return folder


@pytest.mark.parametrize("style", ["answer", "reasoning", "kormedmcqa"])
@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_task_holds_the_prompt_as_plain_transformers_writes_it(
    family: str, style: str, bases: dict[str, str], data: Path, tests: Path, tmp_path: Path
) -> None:
    base = Path(bases[family])
    asked = read_tests(give_tests(configure(str(base), data), tests, style=style))
    config, out = BaseModelConfig(model=str(base)), tmp_path / "later"
    written = write_tasks(asked, style, load_tokenizer(config), load_base_tokenizer(config), tmp_path, out)  # type: ignore[arg-type]
    assert (written.names, written.questions) == (("dev-questions",), 6)
    task = yaml.safe_load((tmp_path / "dev-questions.yaml").read_text(encoding="utf-8"))
    assert task["dataset_kwargs"]["data_files"]["test"] == str(out / "dev-questions.jsonl")
    lines = (tmp_path / "dev-questions.jsonl").read_text(encoding="utf-8").splitlines()
    plain: Any = AutoTokenizer.from_pretrained(base)
    for record, row in zip(asked.tests["dev-questions"], map(json.loads, lines), strict=True):
        prompt = render_mcq(record, style).prompt
        if style != "kormedmcqa" and plain.chat_template:
            turns = [{"role": "user", "content": prompt}]
            prompt = plain.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        elif style != "kormedmcqa":
            prompt += "\n"
        assert row["prompt"] == prompt + ("answer:\n" if style == "reasoning" else "")
        assert row["letters"][row["target"]] == record.answer == row["answer"]
    assert task["target_delimiter"] == (" " if style == "kormedmcqa" else "")


def test_the_harness_s_own_command_gives_the_letters_of_the_stage(
    run: RunFolder, data: Path, tests: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, tasks = tmp_path / "out", tmp_path / "tasks"
    command = [f"{run.root}:02", str(out), "--as", "merged", "--dtype", "f32", "--lm-eval", str(tasks)]
    assert export.main(command) == 0
    told = capfd.readouterr().out
    assert "lm-eval: 6 questions of dev-questions" in told
    (line,) = [line.strip() for line in told.splitlines() if line.strip().startswith("lm_eval run ")]
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install -e '.[eval-parity]')")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    asked = [sys.executable, "-m", *shlex.split(line), "--device", "cpu"]
    done = subprocess.run(asked, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = read_inputs([parse_input(str(tmp_path / "answers"))], Reading("ABCDE", False))
    questions = [each for each in read(SourceConfig(source=str(tests))) if isinstance(each, McqRecord)]
    evaluation = EvaluationConfig.model_validate(evaluate(tests).model_dump(exclude={"beside_training"}))
    base = configure(str(out), data).base
    stage = StageModel(base.model_copy(update={"extra_tokens": ()}), {"02": []}, evaluation, letters="ABCDE")
    ours = stage.answer(["dev-questions"] * len(questions), questions)
    theirs = {prediction.id: prediction for prediction in log.predictions}
    assert [theirs[mine.id].choice for mine in ours] == [mine.choice for mine in ours]
    for mine in ours:
        assert theirs[mine.id].test == "dev-questions"
        assert theirs[mine.id].probabilities == pytest.approx(mine.probabilities, abs=1e-3)
    assert len(find_chain(run, "02")) == 2


def test_tests_that_the_harness_cannot_ask_are_refused(bases: dict[str, str], data: Path, tests: Path) -> None:
    config = configure(bases["gemma"], data)
    with pytest.raises(InputError, match="no `evaluation`"):
        read_tests(config)
    for changes, named in (
        ({"scoring": "reason", "style": "reasoning"}, "scoring: reason"),
        ({"rotations": True}, "rotations: true"),
    ):
        with pytest.raises(InputError, match=named):
            read_tests(give_tests(config, tests, **changes))


def test_only_a_whole_model_comes_with_tasks_and_only_into_a_new_folder(run: RunFolder, tmp_path: Path) -> None:
    for more, named in (
        (["--lm-eval", str(tmp_path / "tasks")], "--as merged"),
        (["--as", "merged", "--lm-eval", str(tmp_path)], "is there already"),
    ):
        with pytest.raises(InputError, match=named):
            export.main([f"{run.root}:02", str(tmp_path / "out"), *more])
        assert not (tmp_path / "out").exists() and not (tmp_path / "tasks").exists()
