"""Adapters of other tools on a real model: what is loaded gives PEFT's own logits, and the base stays as it was."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from medlora.answering.answerer import AnswerSettings, McqAnswerer
from medlora.answering.generation import generate
from medlora.answering.stage_model import StageModel
from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.curriculum.chains import Link
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter, load_chain, save_adapter
from medlora.model.export import copy_adapter, export_chain
from medlora.model.tokenizer import load_tokenizer
from medlora.records import McqRecord
from tests.support.tiny import build_gpt2

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2, whose linear layers are Conv1D."""
    return build_gpt2(tmp_path_factory.mktemp("gpt2"))


def load(folder: str, **changes: Any) -> Any:
    base = BaseModelConfig(model=folder, **changes)
    return load_base(base, load_tokenizer(base))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def save_foreign(base: str, folder: Path, **config: Any) -> torch.Tensor:
    """An adapter that PEFT itself made, with every number of its own; what PEFT computes with it."""
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    model.save_pretrained(str(folder))
    return logits(model.eval())


PATTERNS = [
    {"target_modules": r"model\.layers\..*\.(q_proj|down_proj)"},
    {"target_modules": r"^(?!.*visual).*(?:q_proj|up_proj).*", "rank_pattern": {r"layers\.1\..*": 3}, "r": 2},
    {
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {r".*q_proj": 3, "up_proj": 5},
        "rank_pattern": {"q_proj": 3},
    },
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": "all-linear", "use_rslora": True},
]


@pytest.mark.parametrize("config", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(bases: dict[str, str], tmp_path: Path, config: dict[str, Any]) -> None:
    expected = save_foreign(bases["llama"], tmp_path / "a", **config)
    model = load_chain(load(bases["llama"]), [("00", tmp_path / "a")])
    assert (logits(model) - expected).abs().max() <= 1e-5 < (logits(load(bases["llama"])) - expected).abs().max()
    save_adapter(model, "00", tmp_path / "b", None, bases["llama"])
    ours, theirs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ba")
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "r", "lora_alpha"):
        same = sorted if isinstance(theirs[key], list) else lambda value: value
        assert same(ours[key]) == same(theirs[key]), key
    if "embed_tokens" in config["target_modules"]:
        return
    export_chain([tmp_path / "a"], tmp_path / "one")
    assert (logits(load_chain(load(bases["llama"]), [("00", tmp_path / "one")])) - expected).abs().max() <= 1e-4


def test_a_pattern_that_hangs_pefts_engine_is_harmless(bases: dict[str, str], tmp_path: Path) -> None:
    expected = save_foreign(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    hangs = "^(([a-z_0-9])+.?)+Z$"
    for more in ({"exclude_modules": hangs}, {"alpha_pattern": {hangs: 3}}, {"rank_pattern": {hangs: 3}}):
        path.write_text(json.dumps({**config, **more}))
        started = time.process_time()
        model = load_chain(load(bases["llama"]), [("00", tmp_path / "a")])
        assert (logits(model) - expected).abs().max() <= 1e-5 and time.process_time() - started < 10


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_never_reaches_it(bases: dict[str, str], tmp_path: Path, start: str) -> None:
    save_foreign(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    model = load(bases["llama"])
    before = logits(model)
    for load_it in (
        lambda: load_chain(model, [("00", tmp_path / "a")]),
        lambda: export_chain([tmp_path / "a"], tmp_path / "one"),
    ):
        with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
            load_it()
    assert torch.equal(logits(model), before) and not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight", "lm_head.bias"]
)
def test_a_smuggled_weight_never_reaches_the_base(bases: dict[str, str], tmp_path: Path, name: str) -> None:
    save_foreign(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(path), f"base_model.model.{name}": torch.full((32,), 3.0)}, path)
    model = load(bases["llama"])
    before = logits(model)
    with pytest.raises(InputError, match="a weight of the base"):
        load_chain(model, [("00", tmp_path / "a")])
    assert torch.equal(logits(model), before)


def test_what_does_not_sit_on_the_model_is_refused_before_it_changes(bases: dict[str, str], tmp_path: Path) -> None:
    save_foreign(bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    honest = load_file(path)
    moved = {name.replace("layers.1", "layers.5"): tensor for name, tensor in honest.items()}
    wide = {name: tensor if "lora_A" in name else torch.zeros(7, tensor.shape[1]) for name, tensor in honest.items()}
    embedding = {**honest, "base_model.model.model.embed_tokens.weight": torch.zeros(9, 5)}
    model = load(bases["llama"])
    for tensors, said in (
        (moved, "layers.5.*the base does not have"),
        (wide, "7 outputs there"),
        (embedding, r"\[9, 5\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(InputError, match=f"this adapter does not fit the base.*{said}"):
            load_chain(model, [("00", tmp_path / "a")])
        assert not isinstance(model, PeftModel) and not any("lora" in name for name, _ in model.named_parameters())


def test_alora_is_not_exported(bases: dict[str, str], tmp_path: Path) -> None:
    save_foreign(bases["llama"], tmp_path / "a", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    with pytest.raises(InputError, match="aLoRA acts only behind its invocation tokens"):
        export_chain([tmp_path / "a"], tmp_path / "one")
    load_chain(load(bases["llama"]), [("00", tmp_path / "a")])


@pytest.mark.parametrize("targets", ["all-linear", "attention", ("c_fc",)])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_conv1d_is_a_linear_layer(gpt2: str, tmp_path: Path, targets: Any, quantization: str) -> None:
    model = add_adapter(load(gpt2, quantization=quantization), "00", LoraSettings(r=2, targets=targets))
    held = {name.split(".lora_")[0].split(".", 5)[-1] for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        "all-linear": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
        "attention": {"attn.c_attn", "attn.c_proj"},
    }
    assert held == expected.get(targets, {"mlp.c_fc"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.05)
    save_adapter(model, "00", tmp_path / "a", None, gpt2)
    expected_logits = logits(model)
    again = load_chain(load(gpt2, quantization=quantization), [("00", tmp_path / "a")])
    assert (logits(again) - expected_logits).abs().max() <= 1e-5
    activate(again, [])
    assert (logits(again) - expected_logits).abs().max() > 1e-3
    if quantization == "none":
        export_chain([tmp_path / "a"], tmp_path / "one")
        assert (logits(PeftModel.from_pretrained(load(gpt2), tmp_path / "one")) - expected_logits).abs().max() <= 1e-5


def test_a_decoder_without_the_layer_says_what_it_has(gpt2: str) -> None:
    with pytest.raises(InputError, match="has no layer q_proj; it has c_attn, c_fc, c_proj"):
        add_adapter(load(gpt2), "00", LoraSettings(r=2, targets=("q_proj",)))


# ---- modes ----------------------------------------------------------------------------------------------------------

RECORDS = [McqRecord(f"q{i}", "아스피린 은?", ("가", "나", "다"), "A") for i in range(2)]


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_dropout_is_off_unless_one_trains(bases: dict[str, str], gpt2: str, tmp_path: Path, family: str) -> None:
    base = gpt2 if family == "gpt2" else bases[family]
    model = add_adapter(load(base), "00", LoraSettings(r=4, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.05)
    save_adapter(model, "00", tmp_path / "a", None, base)
    for trainable in (None, "00"):
        again = load_chain(load(base), [("00", tmp_path / "a")], trainable)
        assert not any(module.training for module in again.modules())
        assert torch.equal(logits(again), logits(again))
    evaluation = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "miniature:mcq/dev"}]})
    stages = {"base": [], "00": [Link(name="00", folder=str(tmp_path / "a"))]}
    staged = StageModel(BaseModelConfig(model=base), stages, evaluation, letters="ABC")
    assert torch.equal(logits(staged.model), logits(staged.model))
    staged.answer(["t"] * 2, RECORDS)
    assert not any(module.training for module in staged.model.modules())


@pytest.mark.parametrize("scoring", ["letter", "generate", "reason", "option_text"])
def test_every_module_has_its_own_mode_back(
    bases: dict[str, str], scoring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapter(load(bases["gemma"]), "00", LoraSettings(r=4, dropout=0.5))
    model.train()
    for name, module in model.named_modules():
        module.training = "lora_dropout" in name
    before = copy.copy({name: module.training for name, module in model.named_modules()})
    assert set(before.values()) == {True, False}
    tokenizer = load_tokenizer(BaseModelConfig(model=bases["gemma"]))
    McqAnswerer(model, tokenizer, AnswerSettings(scoring=scoring, max_tokens=3)).answer(RECORDS)
    assert {name: module.training for name, module in model.named_modules()} == before
    first, second = (generate(model, tokenizer, [[5, 6, 7]], 4)[0].text for _ in range(2))
    assert first == second and {name: module.training for name, module in model.named_modules()} == before

    def fail(*arguments: Any) -> None:
        raise OSError

    monkeypatch.setattr("medlora.answering.answerer.render_mcq", fail)
    with pytest.raises(OSError):
        McqAnswerer(model, tokenizer, AnswerSettings(scoring=scoring)).answer(RECORDS)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_pipe_beside_an_adapter_is_neither_read_nor_copied(tmp_path: Path) -> None:
    """Whoever opened it would wait for ever: this test would not end."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    os.mkfifo(tmp_path / "theirs" / "README.md")
    copy_adapter(tmp_path / "theirs", tmp_path / "ours", {})
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["adapter_config.json"]
