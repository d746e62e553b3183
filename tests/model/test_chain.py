"""The chain is real: every adapter counts, frozen ones stay, stages come back, a chain becomes one adapter."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medlora.artifacts.adapters import find_adapter
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter, load_adapter_weights, load_chain, save_adapter
from medlora.model.export import export_chain
from medlora.model.tokenizer import added_token_ids, load_tokenizer
from tests.support import ROOT
from tests.support.tiny import EXTRA, FAMILIES

TEXTS = (f"아스피린 은 {EXTRA[0]} 이다", f"{EXTRA[1]} text about {EXTRA[0]} answer:\nB")
STAGES = {"base": (), "00": ("00",), "01": ("01",), "02": ("01", "02")}
"""What the three chain actions (new with tokens, continue, stack) leave as stages."""


ONE_FAMILY = pytest.mark.parametrize("built", ["medgemma"], indirect=True)


@dataclass
class Built:
    """A family's stages as they were when they were saved."""

    base: BaseModelConfig
    tokenizer: Any
    folders: dict[str, Path]
    logits: dict[str, torch.Tensor] = field(default_factory=dict)

    def fresh(self, **changes: Any) -> Any:
        return load_base(self.base.model_copy(update=changes), self.tokenizer)

    def chain(self, stage: str) -> list[tuple[str, Path]]:
        return [(name, self.folders[name]) for name in STAGES[stage]]


def batch(tokenizer: Any, model: Any) -> dict[str, torch.Tensor]:
    rows = tokenizer(list(TEXTS), padding=True, return_tensors="pt", return_token_type_ids=False)
    extra = {"token_type_ids": torch.zeros_like(rows["input_ids"])} if model.config.model_type == "gemma3" else {}
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], **extra}


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model.eval()(**batch(tokenizer, model)).logits


def train(model: Any, tokenizer: Any, steps: int = 3, rate: float = 0.02) -> list[float]:
    inputs = batch(tokenizer, model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def frozen_bytes(model: Any) -> dict[str, str]:
    """Hashes of all that is not trainable, quantized weights included."""
    return {
        name: hashlib.sha256(p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def sha(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """00 new with trained tokens, 01 continues it, 02 stacks on 01; each from a fresh base, as phases do."""
    base = BaseModelConfig(model=bases[request.param])
    home = tmp_path_factory.mktemp(request.param)
    built = Built(
        base, load_tokenizer(base, extra_tokens=EXTRA), {name: home / name / "adapter" for name in ("00", "01", "02")}
    )
    rows = added_token_ids(built.tokenizer, EXTRA)
    model = built.fresh()
    built.logits["base"] = logits(model, built.tokenizer)
    for stage in ("00", "01", "02"):
        if stage == "00":
            model = add_adapter(built.fresh(), "00", LoraSettings(r=4, alpha=8), rows, seed=0)
        elif stage == "01":
            model = load_chain(built.fresh(), [("01", built.folders["00"])], trainable="01")
        else:
            lora = LoraSettings(r=2, alpha=4, rslora=True, targets="attention")
            model = add_adapter(load_chain(built.fresh(), built.chain("01")), "02", lora, seed=1)
        before = frozen_bytes(model)
        losses = train(model, built.tokenizer)
        assert losses[-1] < losses[0]
        assert frozen_bytes(model) == before
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        save_adapter(model, stage, built.folders[stage], built.tokenizer if stage == "00" else None, base.model)
        built.logits[stage] = logits(model, built.tokenizer)
        if stage == "02":
            again = home / "again"
            save_adapter(model, "01", again, None, base.model)
            assert sha(again) == sha(built.folders["01"])
    return built


def test_only_the_named_adapter_is_trainable_and_only_on_the_text(built: Built) -> None:
    rows = added_token_ids(built.tokenizer, EXTRA)
    model = add_adapter(load_chain(built.fresh(), built.chain("01")), "02", LoraSettings(r=2), rows)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    held = {name for name, _ in model.named_parameters() if "lora_" in name or "trainable_tokens" in name}
    assert trainable and trainable == {name for name in held if "adapter-02" in name}
    layers = {name.split(".lora_")[0] for name in trainable if ".lora_" in name}
    assert len(layers) == 2 * 7
    assert not any(part in name for name in held for part in ("vision", "projector", "lm_head.lora"))
    assert all("layers" in layer and "self_attn" in layer or "mlp" in layer for layer in layers)
    trained_rows = [p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    # Tied embeddings share their rows, untied ones train both.
    assert [tuple(p.shape) for p in trained_rows] == [(2, 32)] * (2 if "llama" in built.base.model else 1)


def test_only_the_added_rows_are_trained(built: Built) -> None:
    model = load_chain(built.fresh(), built.chain("00"))
    rows = added_token_ids(built.tokenizer, EXTRA)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        change = (embeddings.weight - embeddings.original_module.weight).abs().amax(dim=1)
        assert (change[rows] > 1e-4).all()
        change[rows] = 0
        assert not change.any()


@pytest.mark.parametrize("stage", ["00", "01", "02"])
def test_a_stage_comes_back_and_every_adapter_of_it_counts(built: Built, stage: str) -> None:
    model = load_chain(built.fresh(), built.chain(stage))
    assert (logits(model, built.tokenizer) - built.logits[stage]).abs().max() <= 1e-5
    assert not any(p.requires_grad for p in model.parameters())
    for off in STAGES[stage]:
        activate(model, [name for name in STAGES[stage] if name != off])
        assert (logits(model, built.tokenizer) - built.logits[stage]).abs().max() > 1e-2
    activate(model, STAGES[stage])
    assert (logits(model, built.tokenizer) - built.logits[stage]).abs().max() <= 1e-5


def test_a_chain_is_the_base_plus_every_adapter(built: Built) -> None:
    """Against the formula of LoRA (arXiv 2106.09685) worked out by hand, without PEFT."""
    model = built.fresh()
    weights = dict(model.named_parameters(remove_duplicate=False))
    rows = added_token_ids(built.tokenizer, EXTRA)
    with torch.no_grad():
        for name, scale in (("01", 8 / 4), ("02", 4 / 2**0.5)):
            for key, tensor in load_file(built.folders[name] / "adapter_model.safetensors").items():
                layer = key.removeprefix("base_model.model.").rsplit(".", 2)[0]
                if key.endswith("trainable_tokens_delta"):
                    weights[f"{layer}.weight"][rows] = tensor
                elif key.endswith("lora_B.weight"):
                    a = load_file(built.folders[name] / "adapter_model.safetensors")[key.replace("lora_B", "lora_A")]
                    weights[f"{layer}.weight"] += scale * tensor @ a
    assert (logits(model, built.tokenizer) - built.logits["02"]).abs().max() <= 1e-4


def test_the_last_adapter_alone_is_not_the_chain(built: Built) -> None:
    alone = load_chain(built.fresh(), built.chain("02")[-1:])
    assert (logits(alone, built.tokenizer) - built.logits["02"]).abs().max() > 1e-2
    assert (logits(alone, built.tokenizer) - built.logits["base"]).abs().max() > 1e-2


def test_one_base_holds_all_stages(built: Built) -> None:
    model = load_chain(built.fresh(), list(built.folders.items()))
    for stage in ("02", "base", "00", "base", "01", "02"):
        activate(model, STAGES[stage])
        assert (logits(model, built.tokenizer) - built.logits[stage]).abs().max() <= 1e-5
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError, match="03"):
        activate(model, ["03"])
    bare = built.fresh()
    activate(bare, [])
    assert torch.equal(logits(bare, built.tokenizer), built.logits["base"])


def test_plain_peft_opens_a_stage(built: Built) -> None:
    plain = AutoModelForCausalLM.from_pretrained(built.base.model, dtype=torch.float32)
    if len(built.tokenizer) > plain.get_input_embeddings().weight.shape[0]:
        plain.resize_token_embeddings(len(built.tokenizer), mean_resizing=False)
    model = PeftModel.from_pretrained(plain, built.folders["00"])
    assert (logits(model, built.tokenizer) - built.logits["00"]).abs().max() <= 1e-5
    for name in ("01", "02"):
        config = json.loads((built.folders[name] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == built.base.model
        assert PeftModel.from_pretrained(built.fresh(), built.folders[name]).peft_config["default"].r == config["r"]


def test_a_saved_adapter_holds_its_own_tensors_alone(built: Built) -> None:
    assert sorted(sha(built.folders["02"])) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (built.folders["00"] / "tokenizer_config.json").is_file()
    for name, rank in (("00", 4), ("02", 2)):
        tensors = load_file(built.folders[name] / "adapter_model.safetensors")
        assert {min(tensor.shape) for key, tensor in tensors.items() if ".lora_" in key} == {rank}
        rest = {key: tuple(tensor.shape) for key, tensor in tensors.items() if ".lora_" not in key}
        assert all(key.endswith(".token_adapter.trainable_tokens_delta") for key in rest)
        assert set(rest.values()) == ({(2, 32)} if name == "00" else set())


SUBPROCESS = """
import sys
import medlora.answering.stage_model  # first, as in an actor: bitsandbytes, which PEFT imports, is quiet and compiles nothing
assert not {"torch._inductor.compile_fx", "scipy.optimize"} & set(sys.modules)
import torch
from pathlib import Path
from safetensors.torch import save_file
from tests.model.test_chain import logits, load_chain, load_base, load_tokenizer, save_adapter, BaseModelConfig
torch.set_num_threads(1)
model_folder, first, second, out = sys.argv[1:]
for quantization in ("int8", "nf4", "none"):
    base = BaseModelConfig(model=model_folder, quantization=quantization)
    tokenizer = load_tokenizer(base, Path(first).parent.parent / "00" / "adapter")
    model = load_chain(load_base(base, tokenizer), [("01", first), ("02", second)], trainable="02")
    found = logits(model, tokenizer)
for name in ("01", "02"):
    save_adapter(model, name, Path(out) / name, None, base.model)
save_file({"logits": found}, Path(out) / "logits.safetensors")
"""


@pytest.mark.parametrize("built", ["gemma"], indirect=True)
def test_a_fresh_process_gives_the_same_logits_and_bytes_and_no_warning(built: Built, tmp_path: Path) -> None:
    arguments = [built.base.model, str(built.folders["01"]), str(built.folders["02"]), str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SUBPROCESS, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (found - built.logits["02"]).abs().max() <= 1e-5
    for name in ("01", "02"):
        assert sha(tmp_path / name) == sha(built.folders[name])


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_one_step_on_a_quantized_base_changes_the_adapter_alone(built: Built, quantization: str) -> None:
    rows = added_token_ids(built.tokenizer, EXTRA)
    model = add_adapter(built.fresh(quantization=quantization), "00", LoraSettings(r=4), rows)
    start = logits(model, built.tokenizer)
    before = frozen_bytes(model)
    train(model, built.tokenizer, steps=2)
    assert frozen_bytes(model) == before
    changed = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (logits(model, built.tokenizer) - start).abs().max() > 1e-2
    activate(model, [])
    again = built.fresh(quantization=quantization)
    assert torch.equal(logits(model, built.tokenizer), logits(again, built.tokenizer))


def test_a_new_adapter_changes_nothing_until_it_is_trained(built: Built) -> None:
    rows = added_token_ids(built.tokenizer, EXTRA)
    for tokens in ([], rows):
        model = add_adapter(load_chain(built.fresh(), built.chain("02")), "03", LoraSettings(r=2), tokens)
        assert (logits(model, built.tokenizer) - built.logits["02"]).abs().max() <= 1e-6


def test_rows_trained_again_higher_in_the_chain_replace_the_lower_ones(built: Built, tmp_path: Path) -> None:
    rows = added_token_ids(built.tokenizer, EXTRA)
    model = add_adapter(load_chain(built.fresh(), built.chain("01")), "02", LoraSettings(r=2), rows)
    train(model, built.tokenizer)
    found = logits(model, built.tokenizer)
    save_adapter(model, "02", tmp_path / "02")
    again = load_chain(built.fresh(), [*built.chain("01"), ("02", tmp_path / "02")])
    assert (logits(again, built.tokenizer) - found).abs().max() <= 1e-5
    export_chain([built.folders["01"], tmp_path / "02"], tmp_path / "one")
    one = PeftModel.from_pretrained(built.fresh(), tmp_path / "one")
    assert (logits(one, built.tokenizer) - found).abs().max() <= 1e-4
    with pytest.raises(InputError, match="adapter '01': a later adapter"):
        add_adapter(load_chain(built.fresh(), built.chain("01")), "02", LoraSettings(r=2), rows[:1])


def test_weights_go_back_into_an_adapter(built: Built, tmp_path: Path) -> None:
    model = load_chain(built.fresh(), built.chain("02"), trainable="02")
    train(model, built.tokenizer)
    assert (logits(model, built.tokenizer) - built.logits["02"]).abs().max() > 1e-3
    load_adapter_weights(model, "02", built.folders["02"])
    assert (logits(model, built.tokenizer) - built.logits["02"]).abs().max() <= 1e-5
    assert all(("adapter-02" in name) == p.requires_grad for name, p in model.named_parameters())
    with pytest.raises(InputError, match="does not fit the base or its own config"):
        load_adapter_weights(model, "02", built.folders["01"])


@ONE_FAMILY
@pytest.mark.parametrize("name", ["0", "1", "train", "weight", "lora_A", "q_proj"])
def test_any_phase_name_can_name_an_adapter(built: Built, name: str, tmp_path: Path) -> None:
    model = add_adapter(load_chain(built.fresh(), [(name, built.folders["01"])]), "model", LoraSettings(r=2))
    save_adapter(model, name, tmp_path, None, built.base.model)
    assert sha(tmp_path) == sha(built.folders["01"])
    with pytest.raises(InputError, match="is on the model already"):
        add_adapter(model, name, LoraSettings(r=2))


@ONE_FAMILY
def test_one_seed_gives_one_start_whatever_ran_before(built: Built, tmp_path: Path) -> None:
    rows = added_token_ids(built.tokenizer, EXTRA)
    for name, seed, noise in (("a", 3, 0), ("b", 3, 99), ("c", 4, 0)):
        model = built.fresh()
        torch.manual_seed(noise)
        model = add_adapter(model, "00", LoraSettings(r=4), rows, seed=seed)
        after = torch.rand(1)
        torch.manual_seed(noise)
        assert torch.equal(torch.rand(1), after), "adding an adapter moved the global random state"
        save_adapter(model, "00", tmp_path / name)
    assert sha(tmp_path / "a") == sha(tmp_path / "b") != sha(tmp_path / "c")


@ONE_FAMILY
def test_targets(built: Built) -> None:
    def leaves(targets: Any) -> set[str]:
        model = add_adapter(built.fresh(), "00", LoraSettings(r=2, targets=targets))
        return {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert leaves("attention") == attention
    assert leaves("all-linear") == attention | mlp
    assert leaves(("q_proj", "down_proj")) == {"q_proj", "down_proj"}
    with pytest.raises(InputError, match="has no layer lm_head, qproj; it has down_proj, gate_proj, k_proj"):
        leaves(("qproj", "lm_head"))


@ONE_FAMILY
@pytest.mark.parametrize("shape", ["plain", "rslora", "patterns"])
def test_a_chain_becomes_one_adapter(built: Built, shape: str, tmp_path: Path) -> None:
    folders = [built.folders["01"]]
    for name, r, targets in (("02", 3, "attention"), ("03", 5, ("down_proj", "q_proj"))):
        model = load_chain(built.fresh(), [(folder.name, folder) for folder in folders])
        lora = LoraSettings(r=r, alpha=7, rslora=shape == "rslora", targets=targets)
        model = add_adapter(model, name, lora, seed=r)
        train(model, built.tokenizer)
        save_adapter(model, name, tmp_path / name, None, built.base.model)
        folders.append(tmp_path / name)
    if shape == "patterns":
        config = json.loads((folders[1] / "adapter_config.json").read_text())
        config["alpha_pattern"], config["r"] = {"q_proj": 21, r"layers\.1\.self_attn\.v_proj": 2}, 8
        config["rank_pattern"] = {name: 3 for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    model = load_chain(built.fresh(), [(folder.name, folder) for folder in folders])
    export_chain(folders, tmp_path / "one")
    one = PeftModel.from_pretrained(built.fresh(), tmp_path / "one")
    assert (logits(one, built.tokenizer) - logits(model, built.tokenizer)).abs().max() <= 1e-4
    assert {min(p.shape) for name, p in one.named_parameters() if ".lora_" in name} == {4 + 3 + 5}
    assert not any("vision" in name for name, _ in one.named_parameters() if ".lora_" in name)
    with pytest.raises(InputError, match="already holds an adapter"):
        export_chain(folders, tmp_path / "one")


def test_an_exported_chain_brings_the_tokenizer(built: Built, tmp_path: Path) -> None:
    export_chain([built.folders["00"], built.folders["02"]], tmp_path)
    assert load_tokenizer(built.base, tmp_path).get_vocab() == built.tokenizer.get_vocab()
    again = load_chain(built.fresh(), [("00", tmp_path)])
    expected = load_chain(built.fresh(), [("00", built.folders["00"]), ("02", built.folders["02"])])
    assert (logits(again, built.tokenizer) - logits(expected, built.tokenizer)).abs().max() <= 1e-4


@ONE_FAMILY
def test_dora_comes_back_and_is_not_exported(built: Built, tmp_path: Path) -> None:
    model = add_adapter(load_chain(built.fresh(), built.chain("01")), "02", LoraSettings(r=2, dora=True))
    train(model, built.tokenizer)
    save_adapter(model, "02", tmp_path / "02", None, built.base.model)
    again = load_chain(built.fresh(), [*built.chain("01"), ("02", tmp_path / "02")])
    assert (logits(again, built.tokenizer) - logits(model, built.tokenizer)).abs().max() <= 1e-5
    with pytest.raises(InputError, match="02: DoRA rescales the base's weights"):
        export_chain([built.folders["01"], tmp_path / "02"], tmp_path / "one")
    assert not (tmp_path / "one").exists()


@ONE_FAMILY
def test_dora_on_an_int8_base_on_cpu_is_refused(built: Built, tmp_path: Path) -> None:
    lora = LoraSettings(r=2, dora=True)
    with pytest.raises(InputError, match="adapter '00': DoRA .* int8 .* base.quantization to nf4 or none"):
        add_adapter(built.fresh(quantization="int8"), "00", lora)
    below = load_chain(built.fresh(quantization="int8"), built.chain("01"))
    logits(below, built.tokenizer)  # a first pass takes int8 weights out of their parameters
    with pytest.raises(InputError, match="adapter '02': DoRA"):
        add_adapter(below, "02", lora)
    model = add_adapter(built.fresh(quantization="nf4"), "00", lora)
    train(model, built.tokenizer)
    save_adapter(model, "00", tmp_path / "00", None, built.base.model)
    with pytest.raises(InputError, match="adapter '00': DoRA"):
        load_chain(built.fresh(quantization="int8"), [("00", tmp_path / "00")])


@pytest.mark.parametrize("kind", ["bare names", "rows", "modules_to_save"])
def test_adapters_saved_by_plain_peft_load_as_they_are(built: Built, kind: str, tmp_path: Path) -> None:
    if kind == "bare names":
        plain = built.fresh()
    else:
        plain = AutoModelForCausalLM.from_pretrained(built.base.model, dtype=torch.float32)
        plain.resize_token_embeddings(len(built.tokenizer), mean_resizing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices=added_token_ids(built.tokenizer, EXTRA) if kind == "rows" else None,
        modules_to_save=["embed_tokens", "lm_head"] if kind == "modules_to_save" else None,
    )
    theirs = get_peft_model(plain, config)
    train(theirs, built.tokenizer)
    theirs.save_pretrained(str(tmp_path / "lora_adapter"))
    expected = logits(theirs, built.tokenizer)

    def distance(model: Any) -> float:
        # Without spare rows their multimodal model has fewer logits than ours.
        return (logits(model, built.tokenizer)[..., : expected.shape[-1]] - expected).abs().max().item()

    model = load_chain(built.fresh(), [("00", tmp_path)], trainable="00")
    assert distance(model) <= 1e-5
    assert not any("vision" in name for name, p in model.named_parameters() if p.requires_grad)
    activate(model, [])
    assert torch.equal(logits(model, built.tokenizer), built.logits["base"]), "the adapter wrote into the base"
    activate(model, ["00"])
    model = add_adapter(model, "01", LoraSettings(r=2))
    assert distance(model) <= 1e-5
    train(model, built.tokenizer)
    expected = logits(model, built.tokenizer)
    for name in ("00", "01"):
        save_adapter(model, name, tmp_path / name)
    assert distance(load_chain(built.fresh(), [("00", tmp_path / "00"), ("01", tmp_path / "01")])) <= 1e-5


@pytest.mark.parametrize("place", ["", "adapter", "lora_adapter", "final"])
def test_adapter_folders_of_other_tools_are_found(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        find_adapter(tmp_path)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(InputError, match="adapter_model.bin is a pickle"):
        find_adapter(tmp_path)
    (folder / "adapter_model.safetensors").touch()
    assert find_adapter(tmp_path) == folder
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(InputError, match="peft_type is 'PROMPT_TUNING'; only LORA"):
        find_adapter(tmp_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json: cannot be read"):
        find_adapter(tmp_path)


@ONE_FAMILY
def test_no_adapter_and_a_foreign_one(built: Built, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter here; looked for adapter_config.json in .*lora_adapter, .*final"):
        load_chain(built.fresh(), [("00", tmp_path)])
    tensors = load_file(built.folders["02"] / "adapter_model.safetensors")
    config = (built.folders["02"] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    weights = tmp_path / "adapter_model.safetensors"
    one = next(iter(tensors))
    for damaged in (
        {name: tensor for name, tensor in tensors.items() if name != one},
        {**tensors, one: torch.zeros(2, 77)},
        {**tensors, "base_model.model.other.lora_A.weight": torch.zeros(2, 2)},
    ):
        save_file(damaged, weights)
        with pytest.raises(InputError, match="this adapter does not fit the base"):
            load_chain(built.fresh(), [("00", tmp_path)])
    weights.write_bytes(b"nothing")
    with pytest.raises(InputError, match="adapter_model.safetensors: cannot be read"):
        load_chain(built.fresh(), [("00", tmp_path)])
    save_file(tensors, weights)
    (tmp_path / "adapter_config.json").write_text(config.replace("_proj", "_nowhere"))
    with pytest.raises(InputError, match="this adapter does not fit the base"):
        load_chain(built.fresh(), [("00", tmp_path)])


@pytest.mark.parametrize("built", ["gemma", "llama"], indirect=True)
def test_an_adapter_with_tokens_needs_its_tokenizer(built: Built) -> None:
    model = load_base(built.base, load_tokenizer(built.base))
    rows = len(built.tokenizer)
    with pytest.raises(InputError, match=f"was trained on a vocabulary of {rows} tokens, the base here has {rows - 2}"):
        load_chain(model, built.chain("00"))
