"""A stage as files for other tools gives, in plain transformers and PEFT, the logits that it has here."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from medlora.answering.stage_model import StageModel
from medlora.artifacts.base_checks import check_base
from medlora.artifacts.headers import read_header
from medlora.cli import export
from medlora.config.evaluation import EvaluationConfig
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.chains import Link, find_chain
from medlora.data.sources import read
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.chain import load_chain
from medlora.model.tokenizer import load_stage_tokenizer, stop_token_ids
from medlora.runs.files import write_yaml
from medlora.runs.folders import RunFolder
from tests.support.tiny import build_gpt2
from tests.support.tiny_run import configure, run_all

TEXT = "아스피린 은 고혈압증 이다 text about 당뇨병성 answer:"
FAMILIES = ["gemma", "medgemma", "llama", "gpt2"]


@dataclass
class Trained:
    """A run of three phases, and what its stage 02 gives."""

    run: RunFolder
    config: RunConfig
    chain: tuple[Link, ...]
    tokenizer: Any

    def compute_logits(self, **changes: Any) -> torch.Tensor:
        base = self.config.base.model_copy(update=changes)
        model = load_chain(load_base(base, self.tokenizer), [(link.name, link.folder) for link in self.chain])
        return compute_logits(model, self.tokenizer)


def compute_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def write_run(base: str, data: Path, folder: Path, **changes: Any) -> Trained:
    config = configure(base, data, **changes)
    run_all(config, folder)
    run = RunFolder(folder)
    write_yaml(run.config, config.model_dump(mode="json"))
    chain = find_chain(run, "02")
    return Trained(run, config, chain, load_stage_tokenizer(config.base, chain))


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest, bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    home = tmp_path_factory.mktemp(request.param)
    base = bases[request.param] if request.param in bases else build_gpt2(home / "base")
    rslora = {"r": 4, "alpha": 8, "rslora": request.param == "llama"}
    return write_run(base, data, home / "run", lora=rslora)


SPARE = pytest.mark.parametrize("trained", ["medgemma"], indirect=True)
"""A base with spare rows, where an adapter can hold added words."""


def load_plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_merged_stage_has_the_logits_of_its_chain(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([f"{trained.run.root}:02", str(out), "--as", "merged", "--dtype", "f32"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    expected = trained.compute_logits()
    untrained = compute_logits(load_base(trained.config.base, tokenizer), tokenizer)
    assert (expected - untrained).abs().max() > 0.05
    torch.testing.assert_close(compute_logits(load_plain(out), tokenizer), expected, atol=2e-4, rtol=1e-4)


def test_a_merged_stage_answers_as_a_plain_base(trained: Trained, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.main([f"{trained.run.root}:02", str(out), "--as", "merged", "--dtype", "f32"])
    questions = [*read(SourceConfig(source=str(data / "dev.jsonl")))][:3]
    evaluation = EvaluationConfig.model_validate(
        {"tests": [{"name": "dev", "source": str(data / "dev.jsonl")}], "scoring": "letter", "style": "kormedmcqa"}
    )
    here = StageModel(trained.config.base, {"02": trained.chain}, evaluation, letters="ABCDE")
    base = trained.config.base.model_copy(update={"model": str(out), "extra_tokens": ()})
    there = StageModel(base, {"02": []}, evaluation, letters="ABCDE")
    for one, other in zip(here.answer(["dev"] * 3, questions), there.answer(["dev"] * 3, questions), strict=True):
        assert (one.id, one.choice) == (other.id, other.choice)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)


def test_a_merged_stage_stops_where_its_answers_end(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.main([f"{trained.run.root}:02", str(out), "--as", "merged"])
    base = load_base(trained.config.base, trained.tokenizer)
    assert GenerationConfig.from_pretrained(out).eos_token_id == stop_token_ids(trained.tokenizer, base)
    stored = AutoModelForCausalLM.from_pretrained(out)
    assert stored.dtype == AutoModelForCausalLM.from_pretrained(trained.config.base.model).dtype
    assert stored.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape


def test_adapters_in_order_give_the_stage(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What LOADING.md says is run as it stands, but in float32."""
    out = tmp_path / "out"
    export.main([f"{trained.run.root}:02", str(out), "--as", "peft-stack"])
    (code,) = re.findall(r"```python\n(.*?)```", (out / "LOADING.md").read_text(), flags=re.S)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code.replace("from_pretrained(base)\n", "from_pretrained(base, dtype='float32')\n"), names)
    assert names["tokenizer"].get_vocab() == trained.tokenizer.get_vocab()
    actual = compute_logits(names["model"], names["tokenizer"])
    torch.testing.assert_close(actual, trained.compute_logits(), atol=2e-4, rtol=1e-4)


def test_one_adapter_opens_on_the_plain_base(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plain PEFT; a base without spare rows for the added words is resized first, or by PEFT's own automatic class."""
    out = tmp_path / "out"
    export.main([f"{trained.run.root}:02", str(out)])
    said = capsys.readouterr().out
    plain = load_plain(Path(trained.config.base.model))
    tokenizer, expected = AutoTokenizer.from_pretrained(out), trained.compute_logits()
    resized = re.search(r"call model.resize_token_embeddings\((\d+)\) on the base", said)
    assert (resized is None) == (plain.get_input_embeddings().weight.shape[0] >= len(trained.tokenizer))
    if resized:
        plain.resize_token_embeddings(int(resized[1]))
    for model in (
        PeftModel.from_pretrained(plain, out),
        AutoPeftModelForCausalLM.from_pretrained(out, dtype="float32"),
    ):
        torch.testing.assert_close(compute_logits(model, tokenizer), expected, atol=2e-4, rtol=1e-4)


@SPARE
def test_the_readme_is_a_card_that_the_hub_takes(trained: Trained, tmp_path: Path) -> None:
    for kind in ("adapter", "merged", "peft-stack"):
        export.main([f"{trained.run.root}:02", str(tmp_path / kind), "--as", kind])
        card = ModelCard.load(tmp_path / kind / "README.md")
        card.data.to_dict()
        assert card.data.library_name == ("transformers" if kind == "merged" else "peft")
        assert card.data.get("base_model") is None, "a folder here is no model of the hub"
        assert trained.config.base.model not in card.text and str(tmp_path) not in card.text


def copy_adapter(trained: Trained, folder: Path, name: str, **config: Any) -> None:
    """Change one adapter of a copy of the run."""
    shutil.copytree(trained.run.root, folder)
    path = RunFolder(folder).phase(name).adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@SPARE
def test_what_cannot_be_exact_is_refused(trained: Trained, tmp_path: Path) -> None:
    copy_adapter(trained, tmp_path / "run", "02", alora_invocation_tokens=[5])
    for kind in ("adapter", "merged", "peft-stack"):
        with pytest.raises(InputError, match="aLoRA acts only behind its invocation tokens"):
            export.main([f"{tmp_path}/run:02", str(tmp_path / "out"), "--as", kind, "--force"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_dora_is_merged_exactly_and_nothing_else(
    trained: Trained, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    dora = write_run(bases["llama"], data, tmp_path / "run", lora={"r": 4, "alpha": 8, "dora": True})
    export.main([f"{tmp_path}/run:02", str(tmp_path / "out"), "--as", "merged", "--dtype", "f32"])
    actual = compute_logits(load_plain(tmp_path / "out"), dora.tokenizer)
    torch.testing.assert_close(actual, dora.compute_logits(), atol=2e-4, rtol=1e-4)
    with pytest.raises(InputError, match="DoRA on top of other adapters .* --as merged"):
        export.main([f"{tmp_path}/run:02", str(tmp_path / "stack"), "--as", "peft-stack"])


@SPARE
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_run_is_merged_into_what_it_saw(
    trained: Trained, quantization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.run.root, tmp_path / "run")
    base = trained.config.base.model_copy(update={"quantization": quantization})
    config = trained.config.model_copy(update={"base": base})
    write_yaml(tmp_path / "run" / "config.yaml", config.model_dump(mode="json"))
    command = [f"{tmp_path}/run:02", "--as", "merged", "--dtype", "f32"]
    export.main([*command, str(tmp_path / "out")])
    assert f"were trained and scored on {quantization} weights; merged into what" in capsys.readouterr().out
    export.main([*command, str(tmp_path / "plain"), "--plain-weights"])
    assert "so answers may differ" in capsys.readouterr().out
    saw = trained.compute_logits(quantization=quantization)
    out, plain = (compute_logits(load_plain(tmp_path / name), trained.tokenizer) for name in ("out", "plain"))
    torch.testing.assert_close(plain, trained.compute_logits(), atol=2e-4, rtol=1e-4)
    if quantization == "nf4":
        torch.testing.assert_close(out, saw, atol=1e-3, rtol=1e-3)
    else:  # int8 rounds the inputs of a layer, too
        assert (out - saw).abs().mean() < (plain - saw).abs().mean()
    assert (plain - saw).abs().max() > 0.01


@SPARE
def test_weights_are_written_in_files_of_a_bounded_size(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 40_000
    monkeypatch.setattr("medlora.model.merge.SHARD_BYTES", most)
    export.main([f"{trained.run.root}:02", str(tmp_path / "out"), "--as", "merged", "--dtype", "f16"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    held = {name: read_header(tmp_path / "out" / name) for name in shards}
    sizes = [sum(math.prod(t.shape) * 2 for t in tensors.values()) for tensors in held.values()]
    assert all(size <= most or len(held[name]) == 1 for name, size in zip(shards, sizes, strict=True))
    assert sum(sizes) == index["metadata"]["total_size"]
    assert {t.dtype for tensors in held.values() for t in tensors.values()} == {"F16"}
    stored, loaded = load_plain(tmp_path / "out"), trained.compute_logits()
    assert (compute_logits(stored, trained.tokenizer) - loaded).abs().max() < 0.05 * loaded.abs().max()


@SPARE
def test_wrong_uses_are_refused_before_anything_is_written(
    trained: Trained, bases: dict[str, str], tmp_path: Path
) -> None:
    run, out = trained.run.root, tmp_path / "out"
    for more, message in (
        (["--as", "peft-stack", "--dtype", "bf16"], "--dtype: peft-stack copies the adapters as they are"),
        (["--plain-weights"], "--plain-weights: only --as merged"),
        (["--public"], "go with --push"),
        (["--base", bases["gemma"]], "--base .*: .* was made for base"),
        (["--base", str(tmp_path / "absent")], "base.model: there is no folder"),
        (["--push", "nobody"], "--push nobody: write OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=message):
            export.main([f"{run}:02", str(out), *more])
    for stage, message in (
        (f"{run}:base", "the base alone has no adapter"),
        (f"{run}:07", "has no phase 07; phases: 00, 01, 02"),
        (f"{tmp_path}/none:02", "is no run's folder"),
    ):
        with pytest.raises(InputError, match=message):
            export.main([stage, str(out)])
    out.mkdir()
    with pytest.raises(InputError, match="is there already; name a new folder"):
        export.main([f"{run}:02", str(out)])
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())


@SPARE
def test_a_base_that_has_moved_is_found_by_its_weights(trained: Trained, bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["medgemma"], tmp_path / "elsewhere")
    command = [f"{trained.run.root}:02", str(tmp_path / "out"), "--as", "merged", "--base", str(tmp_path / "elsewhere")]
    assert export.main(command) == 0
    check_base(tmp_path / "out")
