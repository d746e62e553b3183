"""The base model: tokenizer, vocabulary extension, quantization, what is said about a base that cannot be had."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from medlora.config.model import BaseModelConfig
from medlora.errors import InputError
from medlora.kernels.memory import clear_memory, describe_device
from medlora.model.base import load_base
from medlora.model.tokenizer import added_token_ids, letter_token_ids, load_tokenizer, stop_token_ids
from tests.support.tiny import EXTRA, FAMILIES


def stored(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_added_words_are_one_token_each_and_decode_with_their_spaces(bases: dict[str, str], family: str) -> None:
    base = BaseModelConfig(model=bases[family])
    plain, tokenizer = load_tokenizer(base), load_tokenizer(base, extra_tokens=EXTRA)
    ids = added_token_ids(tokenizer, EXTRA)
    assert ids == [len(plain), len(plain) + 1]
    assert added_token_ids(plain, EXTRA) == []
    for word, token in zip(EXTRA, ids, strict=True):
        for text in (f"text {word} text", f"text {word}은 {word}"):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            assert encoded.count(token) == text.count(word)
            assert tokenizer.decode(encoded) == text
            assert plain.decode(plain.encode(text, add_special_tokens=False)) == text


def test_words_that_are_tokens_already_are_skipped(bases: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    base = BaseModelConfig(model=bases["gemma"])
    plain = load_tokenizer(base)
    known = next(token for token in sorted(plain.get_vocab()) if len(token) > 2 and token.isalpha())
    with caplog.at_level(logging.INFO, "medlora.model.tokenizer"):
        tokenizer = load_tokenizer(base, extra_tokens=[known, EXTRA[0], EXTRA[0]])
    assert len(tokenizer) == len(plain) + 1
    assert f"1 of 3 extra tokens are one token already: {known}" in caplog.text
    assert added_token_ids(tokenizer, [known, EXTRA[0]]) == [len(plain)]


def test_a_word_that_does_not_decode_is_refused(bases: dict[str, str]) -> None:
    with pytest.raises(InputError, match="base.extra_tokens: 'métoprolol' cannot be a token"):
        load_tokenizer(BaseModelConfig(model=bases["llama"]), extra_tokens=["métoprolol"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_tokenizer_comes_back_from_its_folder(bases: dict[str, str], family: str, tmp_path: Path) -> None:
    base = BaseModelConfig(model=bases[family])
    tokenizer = load_tokenizer(base, extra_tokens=EXTRA)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(base, tmp_path, extra_tokens=EXTRA)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = f"인슐린 은 {EXTRA[0]} 이다"
    assert again.encode(text) == tokenizer.encode(text)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(base, tmp_path / "nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_are_the_mean_of_their_old_pieces(bases: dict[str, str], family: str) -> None:
    base = BaseModelConfig(model=bases[family])
    plain, tokenizer = load_tokenizer(base), load_tokenizer(base, extra_tokens=EXTRA)
    model, unextended = load_base(base, tokenizer), load_base(base, plain)
    entrance, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    olds = unextended.get_input_embeddings().weight, unextended.get_output_embeddings().weight
    assert (entrance is head) == (family != "llama")
    # The multimodal model has spare rows for the new tokens, so its embeddings keep their size.
    assert len(entrance) == len(head) == (len(olds[0]) if family == "medgemma" else len(plain) + 2)
    mark = "" if family == "llama" else " "
    for weight, old in zip((entrance, head), olds, strict=True):
        assert torch.equal(weight[: len(plain)], old[: len(plain)])
        for word, token in zip(EXTRA, added_token_ids(tokenizer, EXTRA), strict=True):
            pieces = plain.encode(mark + word, add_special_tokens=False)
            assert len(pieces) > 1
            assert torch.allclose(weight[token], old[pieces].mean(0), atol=1e-7)
    # Loading is a function of the base and the tokenizer: the same again, also for the forward pass.
    again, ids = load_base(base, tokenizer), torch.tensor([tokenizer.encode(f"은 {EXTRA[0]} 이다")])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert model(ids).logits.shape[-1] == len(entrance)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_compute_in_float32_on_cpu_and_are_frozen(bases: dict[str, str], family: str) -> None:
    base = BaseModelConfig(model=bases[family])
    tokenizer = load_tokenizer(base)
    model = load_base(base, tokenizer)
    assert {tensor.dtype for tensor in stored(bases[family]).values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert model.config._attn_implementation == "sdpa"
    half = load_base(base.model_copy(update={"compute_dtype": "bfloat16"}), tokenizer)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_forward_pass_leaves_four_bit_weights_as_they_are(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on a newer server's CPU
    base = BaseModelConfig(model=bases["llama"], quantization="nf4")
    model = load_base(base, load_tokenizer(base))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        first, second = (model(input_ids=torch.arange(8)[None]).logits for _ in range(2))
    assert torch.equal(first, second)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_bases_stay_close_to_the_full_one(bases: dict[str, str], family: str, quantization: str) -> None:
    full = BaseModelConfig(model=bases[family])
    tokenizer = load_tokenizer(full, extra_tokens=EXTRA)
    model = load_base(full.model_copy(update={"quantization": quantization}), tokenizer)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear8bitLt" if quantization == "int8" else "Linear4bit") in kinds
    stored_as = {parameter.dtype for name, parameter in model.named_parameters() if name.endswith("q_proj.weight")}
    assert stored_as == {torch.int8 if quantization == "int8" else torch.uint8}
    ids = torch.tensor([tokenizer.encode(f"은 {EXTRA[0]} 이다")])
    with torch.no_grad():
        exact, found = load_base(full, tokenizer)(ids).logits, model(ids).logits
    error = (exact - found).norm() / exact.norm()
    assert 1e-5 < error < (0.1 if quantization == "int8" else 0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_letters_and_stops(bases: dict[str, str], family: str) -> None:
    base = BaseModelConfig(model=bases[family])
    tokenizer = load_tokenizer(base)
    letters = letter_token_ids(tokenizer, "ABCDE")
    assert tokenizer.convert_ids_to_tokens(letters) == list("ABCDE")
    for letter, token in zip("ABCDE", letters, strict=True):
        assert tokenizer.encode(f"answer:\n{letter}", add_special_tokens=False)[-1] == token
    with pytest.raises(InputError, match="cannot answer '가'"):
        letter_token_ids(tokenizer, "A가")
    with pytest.raises(InputError, match="cannot answer 'A'"):
        letter_token_ids(tokenizer, "AA")
    assert stop_token_ids(tokenizer) == ([0] if family == "llama" else [1, 5])
    model = load_base(base, tokenizer)
    model.generation_config.eos_token_id = [7, 9]
    assert stop_token_ids(tokenizer, model) == ([0, 7, 9] if family == "llama" else [1, 5, 7, 9])


def test_a_base_that_is_not_there(bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="medlora-tests/no-such-model is no folder here.*set base.model to its folder"):
        load_tokenizer(BaseModelConfig(model="medlora-tests/no-such-model"))
    with pytest.raises(InputError, match="base.model: there is no folder ./nothing/here"):
        load_tokenizer(BaseModelConfig(model="./nothing/here"))
    with pytest.raises(InputError, match="is a folder without config.json"):
        load_tokenizer(BaseModelConfig(model=str(tmp_path)))
    tokenizer = load_tokenizer(BaseModelConfig(model=bases["gemma"]))
    with pytest.raises(InputError, match="medlora-tests/no-such-model is no folder here"):
        load_base(BaseModelConfig(model="medlora-tests/no-such-model"), tokenizer)


def test_damaged_weights_are_refused(bases: dict[str, str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BaseModelConfig(model=bases["gemma"]))
    folder = tmp_path / "base"
    shutil.copytree(bases["gemma"], folder)
    base, file = BaseModelConfig(model=str(folder)), folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "1.mlp.up_proj" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights of Gemma3ForCausalLM, e.g. model.layers.1.mlp.up_proj"):
        load_base(base, tokenizer)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="base.model: .*cannot be loaded"):
        load_base(base, tokenizer)
    file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="model.safetensors"):
        load_base(base, tokenizer)


def test_the_device_is_described() -> None:
    clear_memory()
    memory = describe_device("cpu")
    assert memory.total_bytes > memory.free_bytes > 0
    assert str(memory).startswith("CPU (") and str(memory).endswith("GiB free")
