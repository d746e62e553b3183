from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medlora.config import RunConfig
from medlora.config_file import load, read_yaml, schema
from medlora.errors import InputError
from medlora.evaluation import EvaluateConfig
from medlora.sweep import SweepConfig

ROOT = Path(__file__).resolve().parent.parent


def minimal(**changes: Any) -> dict[str, Any]:
    phases = [
        {"name": "00", "chain": "new", "sources": [{"source": "a.txt"}]},
        {"name": "01", "chain": "continue", "sources": [{"source": "b.jsonl"}]},
    ]
    return {"name": "run", "base": {"model": "somewhere"}, "phases": phases, **changes}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(tmp_path: Path, content: Any, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, content), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5e3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("00", "00"),
        ("012", "012"),
        ("1_000", "1_000"),
        ("true", True),
        ("null", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)


def test_phase_defaults_reach_every_phase_that_says_nothing_else(tmp_path: Path) -> None:
    content = minimal(phase_defaults={"learning_rate": 3e-4, "max_tokens": 99})
    content["phases"][1]["max_tokens"] = 77
    config = load(write(tmp_path, content))
    assert [phase.learning_rate for phase in config.phases] == [3e-4, 3e-4]
    assert [phase.max_tokens for phase in config.phases] == [99, 77]


@pytest.mark.parametrize("key", ["phases.1.learning_rate", "phases.01.learning_rate"])
def test_set_finds_a_phase_by_index_and_by_name(tmp_path: Path, key: str) -> None:
    assert load(write(tmp_path, minimal()), [f"{key}=1e-5"]).phases[1].learning_rate == 1e-5


def test_set_makes_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    assert load(write(tmp_path, minimal()), ["lora.r=8", "storage.folder=/x"]).lora.r == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"base": {"model": "m", "quantizaton": "int8"}},
            "base.quantizaton: unknown key; did you mean 'quantization'?",
        ),
        ({"nmae": 1}, "nmae: unknown key; did you mean 'name'?"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"name": "../evil"}, "name: String should match pattern"),
        ({"name": "a;rm"}, "name: String should match pattern"),
        ({"phases": []}, "phases: Tuple should have at least 1 item"),
        ({"lora": {"r": 0}}, "lora.r: Input should be greater than or equal to 1"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: Input should be less than 1"),
    ],
)
def test_what_is_wrong_is_named_by_its_dotted_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, minimal(**changes))


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, minimal(seed="x", nmae=1))
    assert "seed:" in said and "nmae:" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.0.chain=stack", "phases.0.chain: 'stack' needs a phase before it"),
        ("phases.0.chain=continue", "phases.0.chain: 'continue' needs a phase before it"),
        ("phases.1.name=00", "phases.1.name: '00' is the name of phases.0 too"),
        ("phases.1.name=base", "'base' is the name of a stage before any phase"),
        ("phases.1.replay=[{phase: 07, share: 0.1}]", "phases.1.replay.0.phase: '07' is no earlier phase; earlier: 00"),
        ("phases.1.lora={r: 4}", "phases.1.lora: a phase that continues keeps its parent's adapter shape"),
        ("phases.1.full_prompt={}", "phases.1.full_prompt: needs phases.1.validation"),
        ("phases.0.train_extra_tokens=true", "base.extra_tokens is empty"),
        (
            "evaluation={tests: [{name: t, source: b.jsonl}]}",
            "phases.1.sources.0.source: 'b.jsonl' is the test evaluation.tests.0",
        ),
        ("phases.7.name=x", "no item '7'; there are 0..1 or by name 00, 01"),
        ("name.x=1", "name is 'run', which has no keys"),
        ("novalue", "write KEY=VALUE"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, minimal(), override)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "found list"), ("", "found NoneType"), ("a: [1", "run.yaml:"), ("a: b: c", "not valid YAML")],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nope.yaml: there is no such config file"):
        load(tmp_path / "nope.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="bad.yaml: cannot be read"):
        load(tmp_path / "bad.yaml")


def test_a_config_comes_back_from_plain_values(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal()))
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


CURRICULA = sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if p.name not in ("evaluate.yaml", "sweep.yaml"))


@pytest.mark.parametrize("path", CURRICULA)
def test_shipped_configs_are_valid(path: str) -> None:
    config = load(ROOT / "configs" / path)
    assert [phase.name for phase in config.phases] == ["00", "01", "02"]
    assert [phase.chain for phase in config.phases] == ["new", "continue", "stack"]


def test_the_shipped_evaluation_config_is_valid() -> None:
    config = load(ROOT / "configs" / "evaluate.yaml", (), EvaluateConfig)
    assert config.stages and [test.name for test in config.evaluation.tests] == ["asked", "text-only"]


@pytest.mark.parametrize(
    ("name", "made", "module"),
    [
        ("schema", schema(), "config_file"),
        ("evaluate.schema", EvaluateConfig.model_json_schema(), "evaluation"),
        ("sweep.schema", SweepConfig.model_json_schema(), "sweep"),
    ],
)
def test_the_shipped_schema_is_the_code_s(name: str, made: dict[str, Any], module: str) -> None:
    shipped = json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    assert shipped == made, f"run: python -m medlora.{module} > configs/{name}.json"


def test_flat_batches_are_not_compiled(tmp_path: Path) -> None:
    said = refusal(tmp_path, minimal(), "phases.01.compile=true", "phases.01.batching=flat")
    assert "phases.1.compile: flat batches have another shape at every step" in said and "batching: padded" in said
