"""Where an adapter comes from: a stacked one is nothing alone, and a base is known by its weights, not by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from medlora.artifacts.adapter_origin import differ, find_base_doubts, find_missing_parents, read_origin, write_card
from medlora.artifacts.bases import identify_base
from medlora.config.evaluation import EvaluateConfig
from medlora.config.run import RunConfig
from medlora.curriculum.checks import check_inputs
from medlora.errors import InputError
from medlora.evaluation.plan import check_evaluation
from medlora.runs.files import write_yaml
from medlora.runs.manifests import check_files, commit, hash_adapter, read_manifest
from tests.support.artifacts import make_tensors, tensor, write

MINIATURE = {"model": "miniature"}


def number(value: int) -> Any:
    """An adapter of its own for each value."""
    return {**make_tensors(), "base_model.model.lm_head.weight": tensor(1, 16, data=bytes([value, 0, 0, 0] * 16))}


def train(run: Path, name: str, below: list[Path], base: dict[str, Any], files: str, **about: Any) -> Path:
    """A phase's folder as one that was trained leaves it."""
    folder = run / "phases" / name / "adapter"
    folder.mkdir(parents=True)
    write(folder, number(int(name) + 1), modules_to_save=["lm_head"], base_model_name_or_path=base["model"])
    parent = [hash_adapter(adapter) for adapter in below]
    fingerprint = {"base": base, "base_files": files, "parent": parent, "seed": about.get("seed", 0)}
    manifest = {
        **{"phase": name, "run": run.name, "seed": 0, "chain": [*(a.parent.name for a in below), name]},
        **{"adapter_hash": hash_adapter(folder), "fingerprint": fingerprint, **about},
    }
    write_card(folder, manifest)
    commit(folder.parent, manifest)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three phases on the miniature of seed 0: 00 new, 01 new, 02 on top of 01."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Q?", "A": "a", "B": "b", "answer": 1}) + "\n")
    source = {"sources": [{"source": str(tmp_path / "rows.jsonl")}]}
    chains = {"00": "new", "01": "new", "02": "stack"}
    config = {"name": "x", "base": MINIATURE, "phases": [{"name": n, "chain": c, **source} for n, c in chains.items()]}
    folder = tmp_path / "x"
    folder.mkdir()
    resolved = RunConfig.model_validate(config)
    write_yaml(folder / "config.yaml", resolved.model_dump(mode="json"))
    files = identify_base(resolved.base)
    for name in ("00", "01"):
        train(folder, name, [], MINIATURE, files)
    train(folder, "02", [folder / "phases" / "01" / "adapter"], MINIATURE, files)
    return folder


def evaluate(run: Path, *stages: Any, seed: int = 0, force: bool = False) -> list[str]:
    tests = [{"name": "t", "source": str(run.parent / "rows.jsonl")}]
    config = {"name": "e", "seed": seed, "base": MINIATURE, "stages": stages, "evaluation": {"tests": tests}}
    return check_evaluation(EvaluateConfig.model_validate(config), force).notes


def test_a_stage_of_a_run_is_scored_as_it_is(run: Path) -> None:
    assert evaluate(run, f"{run}:base,00,01,02") == []
    folders = [str(run / "phases" / name / "adapter") for name in ("00", "01", "02")]
    assert evaluate(run, {"name": "a", "adapters": folders[:1]}, {"name": "b", "adapters": folders[1:]}) == []


@pytest.mark.parametrize("below", [[], ["00"], ["00", "01"]])
def test_a_stacked_adapter_without_what_it_stands_on_is_refused(
    run: Path, below: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    stage = {"name": "alone", "adapters": [f"x/phases/{name}/adapter" for name in [*below, "02"]]}
    with pytest.raises(InputError, match="02/adapter was trained on top of 01, .*name the whole stage x:02 ") as caught:
        evaluate(run, stage)
    assert "x/phases/01/adapter, x/phases/02/adapter" in str(caught.value) and "--force" in str(caught.value)
    (note,) = evaluate(run, stage, force=True)
    assert "was trained on top of 01" in note


def test_a_copy_of_a_stacked_adapter_says_so_too(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "phases" / "02" / "adapter", tmp_path / "copy")
    (doubt,) = find_missing_parents([tmp_path / "copy"])
    assert "was trained on top of 01" in doubt and "name the whole stage x:02" in doubt
    shutil.copytree(run / "phases" / "01" / "adapter", tmp_path / "below")
    assert find_missing_parents([tmp_path / "below", tmp_path / "copy"]) == []
    assert not (tmp_path / "below" / "README.md").exists()
    text = (tmp_path / "copy" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["medlora"]["chain"] == ["01", "02"]
    assert "**Not for use alone.** It was trained on top of `01`" in text


def test_a_card_counts_in_no_hash_and_one_of_another_tool_does(run: Path) -> None:
    folder = run / "phases" / "02" / "adapter"
    manifest = read_manifest(folder.parent)
    assert manifest and manifest["adapter_hash"] == hash_adapter(folder)
    assert "adapter/README.md" not in manifest["files"]
    (folder / "README.md").unlink()
    assert manifest["adapter_hash"] == hash_adapter(folder) and not check_files(folder.parent, manifest)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert manifest["adapter_hash"] != hash_adapter(folder)


@pytest.mark.parametrize(
    "card", ["medlora: [", "medlora: {}", 'medlora: {"chain": 3}', "medlora: " + "[" * 100_000, ""]
)
def test_a_broken_card_says_nothing(tmp_path: Path, card: str) -> None:
    folder = write(tmp_path / "a")
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    assert read_origin(folder) is None and find_missing_parents([folder]) == []


def test_an_adapter_of_another_miniature_is_refused(run: Path) -> None:
    with pytest.raises(
        InputError, match=r"00/adapter was made for base miniature \(seed 0, files .*\), not for miniature \(seed 1"
    ):
        evaluate(run, f"{run}:base,00", seed=1)
    assert len(evaluate(run, f"{run}:base,00", seed=1, force=True)) == 1
    folder = run / "phases" / "00" / "adapter"
    assert find_base_doubts({"model": "miniature", "files": "older", "seed": 0}, [folder])


def test_start_is_checked_alike(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())

    def check(*names: str, seed: int = 0, force: bool = False) -> list[str]:
        start = [str(run / "phases" / name / "adapter") for name in names]
        return check_inputs(RunConfig.model_validate({**config, "start": start, "seed": seed}), force)

    assert check() == check("00") == check("01", "02") == []
    with pytest.raises(InputError, match="^start: .*\n.*02/adapter was trained on top of 01.*\n.*--force"):
        check("02")
    with pytest.raises(InputError, match=r"^start: .*\n.*seed 0.*seed 1"):
        check("00", seed=1)
    assert len(check("02", force=True)) == 1


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"model": "a/x", "files": "1"}, {"model": "b/x", "files": "1"}, False),
        ({"model": "a/x", "files": "1"}, {"model": "a/x", "files": "2"}, True),
        ({"model": "x", "files": "1", "weights": "w"}, {"model": "x", "files": "2", "weights": "w"}, False),
        ({"model": "x", "files": "1", "weights": "w"}, {"model": "x", "files": "1", "weights": "v"}, True),
        ({"model": "x", "files": "hub:1"}, {"model": "x", "files": "hub:2"}, True),
        ({"model": "o/x", "files": "hub:1"}, {"model": "/models/x", "files": "2"}, False),
        ({"model": "o/x", "files": "hub:1"}, {"model": "/models/y", "files": "2"}, True),
        ({"model": "miniature", "files": "1", "seed": 0}, {"model": "miniature", "files": "1", "seed": 0}, False),
        ({"model": "miniature", "files": "1", "seed": 0}, {"model": "miniature", "files": "1", "seed": 1}, True),
    ],
)
def test_bases_are_told_apart_by_their_weights(one: dict[str, Any], other: dict[str, Any], expected: bool) -> None:
    assert differ(one, other) is differ(other, one) is expected
