from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medlora.cli.schema import make_schema
from medlora.config.evaluation import EvaluateConfig
from medlora.config.loading.files import load, read_yaml
from medlora.config.run import RunConfig
from medlora.config.sweep import SweepConfig
from medlora.errors import InputError
from tests.support import ROOT


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
        ({"seed": "x"}, 'seed: must be a whole number, found "x"'),
        ({"seed": -1}, "seed: must be at least 0, found -1"),
        ({"name": "../evil"}, "name: must be a name of letters, digits"),
        ({"name": "a;rm"}, "name: must be a name of letters, digits"),
        ({"phases": []}, "phases: must be a list of at least 1 item, found []"),
        ({"lora": {"r": 0}}, "lora.r: must be at least 1, found 0"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: must be below 1, found 1.0"),
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
        ("name.x=1", 'name is "run", which has no keys'),
        ("novalue", "write KEY=VALUE"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, minimal(), override)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "found a list"), ("", "found nothing"), ("a: [1", "run.yaml:"), ("a: b: c", "not valid YAML")],
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


CURRICULA = sorted(
    p.name for p in (ROOT / "configs").glob("*.yaml") if not p.name.endswith(("evaluate.yaml", "sweep.yaml"))
)


@pytest.mark.parametrize("path", CURRICULA)
def test_shipped_configs_are_valid(path: str) -> None:
    config = load(ROOT / "configs" / path)
    assert [phase.name for phase in config.phases] == ["00", "01", "02"]
    assert [phase.chain for phase in config.phases] == ["new", "continue", "stack"]


def test_the_shipped_evaluation_config_is_valid() -> None:
    config = load(ROOT / "configs" / "evaluate.yaml", (), EvaluateConfig)
    assert config.stages and [test.name for test in config.evaluation.tests] == ["asked", "text-only"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("schema", "train"),
        ("evaluate.schema", "evaluate"),
        ("sweep.schema", "sweep"),
    ],
)
def test_the_shipped_schema_is_the_code_s(name: str, config: str) -> None:
    shipped = json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    assert shipped == make_schema(config), f"run: python -m medlora schema {config} > configs/{name}.json"


def test_flat_batches_are_not_compiled(tmp_path: Path) -> None:
    said = refusal(tmp_path, minimal(), "phases.01.compile=true", "phases.01.batching=flat")
    assert "phases.1.compile: flat batches have another shape at every step" in said and "batching: padded" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: a\nlora:\n  r: 4\n  alpha: 8\n  r: 8\n",
            "run.yaml:5:3: not valid YAML: the key 'r' appears in lines 3 and 5",
        ),
        ("name: a\nname: b\n", "the key 'name' appears in lines 1 and 2 of one mapping; remove one"),
        ("phases:\n  - name: x\n  - {name: y, chain: new, chain: stack}\n", "the key 'chain' appears twice in line 3"),
        ('a: 1\n"a": 2\n', "the key 'a' appears in lines 1 and 2"),
    ],
)
def test_a_key_twice_in_one_mapping_is_refused_with_both_lines(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_one_key_in_two_mappings_is_no_key_twice() -> None:
    assert read_yaml("a: {r: 1}\nb: {r: 2}\n1: x\n'1': y") == {"a": {"r": 1}, "b": {"r": 2}, 1: "x", "1": "y"}
    assert read_yaml("x: &d {r: 1}\ny: {<<: *d, r: 2}") == {"x": {"r": 1}, "y": {"r": 2}}


def test_set_refuses_a_key_twice_and_takes_spaces(tmp_path: Path) -> None:
    assert load(write(tmp_path, minimal()), ["lora.r = 8", " seed= 3 "]).lora.r == 8
    assert load(write(tmp_path, minimal()), [" seed= 3 "]).seed == 3
    assert "the key 'r' appears twice" in refusal(tmp_path, minimal(), "lora={r: 1, r: 2}")


WRONG = """name: run
base: {model: m}
phase_defaults:
  learning_rate: -1
phases:
  - name: "00"
    chain: new
    sources: [{source: a.txt}]
  - name: tuned
    chain: continue
    learning_rate: fast
    sources:
      - {source: data/b.jsonl, weight: heavy}
    replay: [{phase: nope, share: 0.1}]
"""


def test_errors_carry_the_line_and_the_name_of_the_phase(tmp_path: Path) -> None:
    said = refusal(tmp_path, WRONG, "seed=x")
    assert "--set: seed: must be a whole number" in said
    assert "line 4 (phases.00.learning_rate): phases.0.learning_rate: must be above 0, found -1" in said
    assert 'line 11 (phases.tuned.learning_rate): phases.1.learning_rate: must be a number, found "fast"' in said
    assert "line 13 (phases.tuned.sources.b.weight): phases.1.sources.0.weight: must be a number" in said
    valid = WRONG.replace("-1", "1").replace("fast", "1").replace("heavy", "1")
    said = refusal(tmp_path, valid)
    assert "line 14 (phases.tuned.replay.nope.phase): phases.1.replay.0.phase: 'nope' is no earlier phase" in said
    said = refusal(tmp_path, valid, "phases.tuned.replay=[]", "phases.tuned.chain=new", "phases.00.chain=stack")
    assert "--set (phases.00.chain): phases.0.chain: 'stack' needs a phase before it" in said
    assert "\n  base: is required" in refusal(
        tmp_path, "name: x\nphases: [{name: a, chain: new, sources: [{source: s}]}]"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases=3", "phases: must be a list, found 3"),
        ("phases.0.sources=x", 'phases.0.sources: must be a list, found "x"'),
        ("seed=null", "seed: must be a whole number, found nothing"),
        ("base=x", 'base: must be a mapping of keys to values, found "x"'),
        ("phases.0.chain=neww", 'phases.0.chain: must be new, continue or stack, found "neww"'),
        ("phases.0.packing=3", "phases.0.packing: must be true or false, found 3"),
        ("base.model=7", 'base.model: must be text, found 7; put it in quotes: "..."'),
        ("phases.0.learning_rate=.inf", "phases.0.learning_rate: must be a number"),
        ("evaluation={tests: [], beside_training: maybe}", "evaluation.beside_training: must be auto or true or false"),
    ],
)
def test_what_must_stand_at_a_key_is_said_in_plain_words(tmp_path: Path, override: str, said: str) -> None:
    found = refusal(tmp_path, minimal(), override)
    assert said in found
    assert not any(word in found for word in ("Input should", "valid tuple", "NoneType", "Tuple", "String", "bool"))


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("sweep", RunConfig, "this is a sweep's config: python jobs/sweep.py --config"),
        ("evaluate", RunConfig, "this is an evaluation's config: python jobs/evaluate_mcq.py --config"),
        ("quickstart", SweepConfig, "this is a run's config: python jobs/curriculum.py --config"),
        ("evaluate", SweepConfig, "this is an evaluation's config"),
        ("quickstart", EvaluateConfig, "this is a run's config"),
        ("sweep", EvaluateConfig, "this is a sweep's config"),
    ],
)
def test_the_config_of_another_job_is_named_in_one_line(name: str, model: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load(ROOT / "configs" / f"{name}.yaml", (), model)
    assert said in str(caught.value) and "\n" not in str(caught.value)
