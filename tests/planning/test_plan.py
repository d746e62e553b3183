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
from medlora.config.phase import PhaseConfig
from medlora.config.run import RunConfig
from medlora.errors import InputError
from medlora.planning import memory
from medlora.planning.figures import RunPlan
from medlora.planning.forecast import describe_left
from medlora.planning.memory import HEAD_CHUNK_BYTES, Longest, estimate_memory, find_memory_warnings
from medlora.planning.plan import make_plan
from medlora.planning.sizes import _read_config, count_lora, read_shape
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


def test_a_forecast_is_told_of_the_phases_that_are_left(planned: tuple[RunConfig, RunPlan], tmp_path: Path) -> None:
    fresh = make_plan(planned[0], RunFolder(tmp_path / "new"), "cpu")
    told = describe_left(fresh)
    assert [(each["name"], each["steps"], each["tokens"]) for each in told["phases"]] == [
        (phase.name, phase.steps, phase.tokens) for phase in fresh.phases
    ]
    assert describe_left(planned[1])["phases"] == []  # all are finished


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


@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 16])
def test_activations_by_formula_are_those_of_a_dry_run(
    family: str, dropout: float, rank: int, bases: dict[str, str]
) -> None:
    """Within 10 %, of rows whose every token is learned; on CPU a dry run counts what is saved for the backward pass.

    With recomputation it does not see the layer that is computed again, which is one of the layers of the whole pass.
    """
    from medlora.training.batches import FlatCollator
    from medlora.training.memory_fit import measure_step
    from tests.support.batches import build, make_row

    lora, tokens = LoraSettings(r=rank, dropout=dropout), 5 * 40
    phase = PhaseConfig.model_validate(
        {"name": "p", "chain": "new", "sources": [{"source": "miniature:text"}], "global_batch": 5, "batch_size": 5}
    ).settle(1)
    recomputed = phase.model_copy(update={"gradient_checkpointing": True})
    model, _ = build(bases[family], [lora])
    rows = [make_row(40, start=3 * n) for n in range(5)]
    whole, kept = (measure_step(model, rows, each, FlatCollator()) for each in (phase, recomputed))
    shape = read_shape(Path(bases[family]), {}, 0)
    assert shape is not None and (shape.heads, shape.layers) == (2, 2)
    assert (shape.norms, shape.head_norms) == ((4, True) if family == "gemma" else (2, False))
    height = kept + (whole - kept) / shape.layers + 4 * tokens * shape.hidden
    for each, measured in ((phase, whole), (recomputed, height)):
        formula = estimate_memory(shape, each, "none", lora, 0, 0, Longest(40, 40), "cpu")["activations"]
        assert formula == pytest.approx(measured, rel=0.1)


def test_a_shape_is_the_same_from_headers_and_from_a_config(bases: dict[str, str]) -> None:
    for family in ("gemma", "medgemma", "llama"):
        folder = Path(bases[family])
        config = json.loads((folder / "config.json").read_text())
        by_headers, by_config = read_shape(folder, {}, 0), _read_config(config, "")
        assert by_headers is not None and by_config is not None
        for name in ("heads", "norms", "head_norms", "rotations"):
            assert getattr(by_headers, name) == getattr(by_config, name)


GEMMA_4B = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
GEMMA_4B |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262144}
GEMMA_4B |= {"tie_word_embeddings": True}


def test_the_formula_gives_the_peak_that_was_measured_on_an_h200() -> None:
    """64 records of 149 tokens in one flat pass of the 4B shape in bfloat16, r 16, with fused norms and gates; 44.9 GiB was
    the most that a pass of the experiment behind benchmarks/training.md took."""
    shape, lora = _read_config(GEMMA_4B, ""), LoraSettings(r=16)
    assert shape is not None
    phase = PhaseConfig.model_validate(
        {"name": "p", "chain": "new", "sources": [{"source": "miniature:text"}], "global_batch": 64, "batch_size": 64}
    ).settle(1)
    parts = estimate_memory(shape, phase, "none", lora, count_lora(shape, lora), 0, Longest(149, 149), "cuda")
    assert sum(parts.values()) / 2**30 == pytest.approx(44.9, rel=0.1)


@pytest.mark.parametrize(
    ("card", "chosen"), [(80.0, "none"), (9.0, "int8"), (7.0, "nf4"), (3.0, "finds nothing"), (None, "not known")]
)
def test_the_least_lossy_quantization_that_fits_is_chosen(
    card: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "find_card_gib", lambda placement: card)
    monkeypatch.setattr(memory, "guess_device", lambda placement: "cuda")
    monkeypatch.setattr(memory, "read_shape", lambda *_: _read_config(GEMMA_4B, ""))
    phase = {"name": "00", "chain": "new", "sources": [{"source": "miniature:text"}]}
    config = RunConfig.model_validate(
        {"name": "r", "base": {"model": "miniature", "quantization": "auto"}, "phases": [phase]}
    )
    if chosen in ("none", "int8", "nf4"):
        settled, told = memory.settle_quantization(config)
        assert settled.base.quantization == chosen and f"auto: {chosen}, which takes about" in str(told)
        assert memory.settle_quantization(settled) == (settled, None)
    else:
        with pytest.raises(InputError, match=chosen):
            memory.settle_quantization(config)


def test_on_cpu_auto_is_no_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "guess_device", lambda placement: "cpu")
    phase = {"name": "00", "chain": "new", "sources": [{"source": "miniature:text"}]}
    config = {"name": "r", "base": {"model": "miniature", "quantization": "auto"}, "phases": [phase]}
    settled, told = memory.settle_quantization(RunConfig.model_validate(config))
    assert settled.base.quantization == "none" and "on CPU" in str(told)


def test_the_pass_of_auto_is_that_of_the_card() -> None:
    shape, lora = _read_config(GEMMA_4B, ""), LoraSettings(r=16)
    assert shape is not None
    phase = PhaseConfig.model_validate({"name": "p", "chain": "new", "sources": [{"source": "miniature:text"}]})
    rows = [
        memory.choose_pass(
            shape, phase.settle(1), "int8", lora, (count_lora(shape, lora), 0), Longest(512, 512), card
        ).batch_size
        for card in (None, 24, 80, 141)
    ]
    assert rows == sorted(rows) and rows[0] == 1 and rows[-1] == 32
    fixed = phase.model_copy(update={"batch_size": 4, "accumulation": 8}).settle(1)
    assert memory.choose_pass(shape, fixed, "int8", lora, (0, 0), Longest(512, 512), 24).batch_size == 4


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
    # What the dry runs of the quickstart measured, in MiB: see docs/commands.md.
    passes = [phase["memory_bytes"]["activations"] / 2**20 for phase in plan["phases"]]
    assert passes == pytest.approx([25, 98, 103], rel=0.1)
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


@pytest.mark.parametrize(("most", "warned"), [(6, True), (60, False)])
def test_answers_that_dev_would_cut_off_are_warned_of(
    bases: dict[str, str], tmp_path: Path, most: int, warned: bool
) -> None:
    from tests.support.tiny_run import configure, write_data

    pairs = [{"english": f"text about aspirin {i}", "korean": "아스피린 은 해열 이다 " * 4} for i in range(6)]
    (tmp_path / "pairs_dev.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dev = {"sources": [{"source": str(tmp_path / "pairs_dev.jsonl")}], "max_tokens": most}
    config = configure(bases["llama"], write_data(tmp_path), p01={"validation": dev})
    plan = make_plan(config, RunFolder(tmp_path / "new"), "cpu")
    found = [text for text in plan.warnings if "validation.max_tokens" in text and "phase 01" in text]
    assert bool(found) == warned
    if warned:
        assert "of 12 answers" in found[0] and "longer than validation.max_tokens 6" in found[0]
    assert not any("validation.max_tokens" in text for text in plan.warnings if "phase 02" in text)


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
