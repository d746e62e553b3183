"""The plan of a run against the run itself: parameters and steps to the last one, tokens within a few per cent."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medlora.artifacts.headers import read_header
from medlora.cli.starting.plan import main
from medlora.config.model import LoraSettings
from medlora.config.run import RunConfig
from medlora.errors import InputError
from medlora.planning.figures import RunPlan
from medlora.planning.memory import HEAD_CHUNK_BYTES, find_memory_warnings
from medlora.planning.plan import make_plan
from medlora.planning.sizes import count_lora, read_shape
from medlora.planning.table import describe_plan
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import read_manifest
from tests.support import ROOT
from tests.support.cli import write_run

QUESTION = {"question": "Q?", "A": "a", "B": "b", "answer": 1}
REASONED = {**QUESTION, "rationale": "because"}


@pytest.fixture(scope="module")
def planned(bases: dict[str, str], data: Path, finished: Path) -> tuple[RunConfig, RunPlan]:
    from tests.support.tiny_run import configure

    config = configure(bases["gemma"], data)
    return config, make_plan(config, RunFolder(finished), "cpu")


def test_trainable_parameters_are_those_of_the_adapters(planned: tuple[RunConfig, RunPlan], finished: Path) -> None:
    for phase in planned[1].phases:
        header = read_header(RunFolder(finished).phase(phase.name).adapter / "adapter_model.safetensors")
        assert phase.trainable == sum(math.prod(tensor.shape) for tensor in header.values()), phase.name


def test_a_new_run_is_planned_like_the_finished_one(planned: tuple[RunConfig, RunPlan], tmp_path: Path) -> None:
    fresh = make_plan(planned[0], RunFolder(tmp_path / "new"), "cpu")
    assert [phase.state for phase in fresh.phases] == ["new"] * 3
    assert [phase.trainable for phase in fresh.phases] == [phase.trainable for phase in planned[1].phases]
    assert not (tmp_path / "new").exists()


def test_steps_rows_and_tokens_are_those_of_the_run(planned: tuple[RunConfig, RunPlan], finished: Path) -> None:
    for phase in planned[1].phases:
        manifest = read_manifest(RunFolder(finished).phase(phase.name).root) or {}
        (segment,) = manifest["segments"]
        assert (phase.state, phase.steps) == ("finished", segment["planned_steps"])
        counts = {key.partition(":")[2]: counted for key, counted in manifest["counts"]["normal"].items()}
        assert sorted(counts) == sorted(source.source for source in phase.sources)
        for source in phase.sources:
            counted = counts[source.source]
            assert source.examples == counted["examples"]
            assert source.rows is not None and source.tokens is not None
            assert abs(source.rows - counted["rows"]) <= 1
            assert source.tokens == pytest.approx(counted["tokens"], rel=0.1)
        assert phase.tokens is not None and phase.steps is not None


def test_steps_follow_from_epochs(bases: dict[str, str], data: Path, tmp_path: Path) -> None:
    from tests.support.tiny_run import configure

    config = configure(bases["llama"], data, p02={"max_steps": None, "epochs": 3})
    plan = make_plan(config, RunFolder(tmp_path / "new"), "cpu")
    assert (plan.phases[2].rows, plan.phases[2].global_batch, plan.phases[2].steps) == (24, 4, 18)


def test_what_was_made_from_something_else_is_named(bases: dict[str, str], data: Path, finished: Path) -> None:
    from tests.support.tiny_run import configure

    config = configure(bases["gemma"], data, p01={"learning_rate": 1e-3})
    plan = make_plan(config, RunFolder(finished), "cpu")
    assert [phase.state for phase in plan.phases][:2] == ["finished", "changed"]
    assert plan.phases[2].state != "finished" and any("made from something else" in line for line in plan.warnings)


def test_time_is_measured_or_not_said(bases: dict[str, str], data: Path, finished: Path, tmp_path: Path) -> None:
    from tests.support.tiny_run import configure

    config = configure(bases["gemma"], data)
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"folder": str(finished.parent)})})
    (phase, *_) = make_plan(config, RunFolder(tmp_path / "new"), "cpu").phases
    assert (
        phase.seconds is not None
        and phase.seconds > 0
        and "tokens/s in" in phase.rate
        and ", phase 00, on CPU" in phase.rate
    )
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"folder": str(tmp_path)})})
    plan = make_plan(config, RunFolder(tmp_path / "new"), "cpu")
    assert (plan.seconds, plan.phases[0].rate) == (None, "not measured yet")
    assert "not measured yet" in "\n".join(describe_plan(plan))


def test_a_large_source_is_measured_in_the_token_cache_or_on_a_sample(
    bases: dict[str, str], data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.support.tiny_run import configure

    config = configure(bases["gemma"], data)
    whole = make_plan(config, RunFolder(tmp_path / "new"), "cpu")
    monkeypatch.setattr("medlora.planning.lengths.MEASURED", 6)
    cached = make_plan(config, RunFolder(tmp_path / "new"), "cpu")
    other = config.storage.model_copy(update={"cache": str(tmp_path)})
    sampled = make_plan(config.model_copy(update={"storage": other}), RunFolder(tmp_path / "new"), "cpu")
    for phases in zip(whole.phases, cached.phases, sampled.phases, strict=True):
        for all_of_it, found, guess in zip(*(phase.sources for phase in phases), strict=True):
            assert (all_of_it.basis, found.basis, guess.basis) == (
                "all records",
                "the token cache",
                "the first 6 records",
            )
            assert found.rows == pytest.approx(all_of_it.rows, abs=1) and found.tokens == pytest.approx(
                all_of_it.tokens, rel=0.02
            )
            assert guess.tokens == pytest.approx(all_of_it.tokens, rel=0.3) and guess.records == all_of_it.records


@pytest.mark.parametrize("family", ["gemma", "medgemma", "llama"])
@pytest.mark.parametrize("targets", ["all-linear", "attention", ("q_proj", "down_proj")])
def test_lora_parameters_by_headers_are_peft_s(family: str, targets: Any, bases: dict[str, str]) -> None:
    from medlora.config.model import BaseModelConfig
    from medlora.model.base import load_base
    from medlora.model.chain import add_adapter
    from medlora.model.tokenizer import load_tokenizer

    base, lora = BaseModelConfig(model=bases[family]), LoraSettings(r=3, targets=targets)
    model = add_adapter(load_base(base, load_tokenizer(base)), "00", lora, [], 0)
    shape = read_shape(Path(bases[family]), {}, 0)
    assert shape is not None
    assert count_lora(shape, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_head_s_chunk_is_the_kernel_s() -> None:
    from medlora.kernels.supervised_head import CHUNK_BYTES

    assert HEAD_CHUNK_BYTES == CHUNK_BYTES


def test_a_card_that_is_too_small_is_warned_of(planned: tuple[RunConfig, RunPlan], tmp_path: Path) -> None:
    fresh = make_plan(planned[0], RunFolder(tmp_path / "new"), "cuda")
    large = replace(fresh, phases=tuple(replace(phase, memory_bytes={"base": 30 * 2**30}) for phase in fresh.phases))
    (first, *rest) = find_memory_warnings(large, ["L4", "T4", "unheard-of"])
    assert "phase 00 is estimated to need 30 GiB a worker" in first and "(L4) has 24" in first and len(rest) == 2
    assert not list(find_memory_warnings(large, ["L4", "H100"])) and not list(find_memory_warnings(large, ["new"]))
    assert not list(find_memory_warnings(planned[1], ["T4"]))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_quickstart_is_planned_without_torch_or_ray_in_seconds(tmp_path: Path) -> None:
    code = "import sys; from medlora.cli.main import main\n"
    code += f"code = main(['plan', '--json', '--set', 'storage.folder={tmp_path}'])\n"
    code += "print(code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    began = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []" and time.process_time() - began < 10
    plan = json.loads(done.stdout)
    assert [(phase["steps"], phase["trainable"]) for phase in plan["phases"]] == [
        (400, 107808),
        (100, 107808),
        (150, 104448),
    ]
    assert [phase["chain"] for phase in plan["phases"]] == [["00"], ["01"], ["01", "02"]]
    assert (plan["asked"], plan["stages"]) == (4 * 492, 4) and not any(tmp_path.iterdir())
    # What the quickstart's runs log, see docs/training.md: 370 rows of text, 492 translations, 992 and 1,984 questions.
    rows = [source["rows"] for phase in plan["phases"] for source in phase["sources"]]
    assert rows == pytest.approx([370, 492, 992, 370, 1984, 368], rel=0.3)


def test_a_dry_run_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medlora.cli.train import main as train

    path = write_run(tmp_path, [{"id": str(i), **QUESTION, "question": f"Q{i}?"} for i in range(9)])
    assert train(["--config", str(path), "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main([str(path)]) == 0 and capsys.readouterr().out == dry
    assert "phase" in dry and "beware: there is no evaluation" in dry and "has no validation" in dry
    assert not (tmp_path / "runs").exists()


def test_letters_asked_of_a_stage_that_reasons_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"id": "t", **QUESTION, "question": "other?"}) + "\n")
    tests = {"scoring": "letter", "tests": [{"name": "t", "source": str(test)}]}
    path = write_run(tmp_path, [{"id": "1", **REASONED}], evaluation=tests)
    assert main([str(path)]) == 0
    assert "phase 00 learns to reason before the answer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{path}", "--config", "{path}"], "name the config once"),
        (["{path}x"], "there is no such config file"),
        (["{path}", "--set", "phases.00.epoch=2"], "did you mean 'epochs'"),
        (["{path}", "--set", "phases.00.sources.0.source=/absent"], "phases.0.sources.0.source: /absent"),
    ],
)
def test_wrong_uses_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, [{"id": "1", **QUESTION}])
    with pytest.raises(InputError, match=message):
        main([argument.format(path=path) for argument in arguments])
