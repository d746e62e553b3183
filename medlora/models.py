"""The base model as every phase and evaluation sees it: its tokenizer, its quantized weights, its extended vocabulary.

`medlora.chains` puts adapters on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medlora.base_checks import check_tokenizer
from medlora.config import BaseModelConfig
from medlora.elementwise import lighten_elementwise
from medlora.encoding import find_end_tokens
from medlora.errors import InputError
from medlora.lineage import find_base
from medlora.prompts import ANSWER_FIELD

log = logging.getLogger(__name__)


def load_tokenizer(
    base: BaseModelConfig, folder: str | Path | None = None, extra_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base, or the extended one saved in `folder`, with `extra_tokens` added to its vocabulary.

    A word that is one token already is skipped with a note in the log. Without a pad token, EOS serves.
    Raises InputError when there is no such tokenizer, or a word does not survive encoding and decoding.
    """
    if folder is None:
        tokenizer = _base_tokenizer(base)
    else:
        if not (Path(folder) / "tokenizer_config.json").is_file():
            raise InputError(f"{folder}: holds no tokenizer (no tokenizer_config.json)")
        check_tokenizer(Path(folder), base.trust_remote_code)
        with _explained(str(folder)), _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
    known = {word for word in extra_tokens if _is_token(tokenizer, word)}
    if known:
        shown = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
        log.info("%d of %d extra tokens are one token already: %s", len(known), len(extra_tokens), shown)
    new = [word for word in dict.fromkeys(extra_tokens) if word not in known]
    # With the space in the token and `normalized`, decoding gives it back; `lstrip=True` loses it.
    tokenizer.add_tokens([AddedToken(_content(tokenizer, word), normalized=True) for word in new])
    for word in new:
        text = f"text {word} text"
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not set(ids) & set(added_token_ids(tokenizer, [word])) or tokenizer.decode(ids).strip() != text:
            raise InputError(
                f"base.extra_tokens: {word!r} cannot be a token here, remove it: {text!r} comes back as "
                f"{tokenizer.decode(ids)!r}"
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def added_token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The sorted ids of those `words` that were added to the vocabulary: the rows `train_extra_tokens` trains."""
    added = tokenizer.get_added_vocab()
    return sorted({added[content] for word in words if (content := _content(tokenizer, word)) in added})


def _base_tokenizer(base: BaseModelConfig) -> PreTrainedTokenizerBase:
    folder = _local_folder(base)
    with _explained(f"base.model: {folder}"), _quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=base.trust_remote_code)


def _marks_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the normalizer writes spaces as U+2581, as that of Gemma does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(backend and backend.normalizer and backend.normalizer.normalize_str("x x") == "x▁x")


def _content(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    return f"▁{word}" if _marks_spaces(tokenizer) else word


def _is_token(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    return any(len(tokenizer.encode(text, add_special_tokens=False)) == 1 for text in (word, f" {word}"))


def letter_token_ids(
    tokenizer: PreTrainedTokenizerBase, letters: Sequence[str], before: str = ANSWER_FIELD
) -> list[int]:
    """The id of each option letter as the one token that stands right after `before`, in the order of `letters`.

    Raises InputError when a letter is no single token there or shares its token with another.
    """
    context = tokenizer.encode(before, add_special_tokens=False)
    ids = []
    for letter in letters:
        tokens = tokenizer.encode(before + letter, add_special_tokens=False)
        if tokens[:-1] != context or tokens[-1] in ids or tokens[-1] == tokenizer.unk_token_id:
            raise InputError(
                f"base.model: the tokenizer cannot answer {letter!r}: after {before!r} it is {tokens[len(context) :]}, "
                "not one token of its own; use a base whose tokenizer has the option letters as tokens"
            )
        ids.append(tokens[-1])
    return ids


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Sorted ids that end an answer: EOS, `<end_of_turn>` where known, what the chat template writes behind an assistant's
    turn, and what the model's generation config lists."""
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<end_of_turn>")}
    with suppress(InputError):  # plain prompts need no template, and a chat prompt was refused before
        stops.add(find_end_tokens(tokenizer)[-1])
    listed = model.generation_config.eos_token_id if model is not None else None
    stops.update(listed if isinstance(listed, list) else [listed])
    return sorted(stop for stop in stops if stop is not None)


def load_base(
    base: BaseModelConfig, tokenizer: PreTrainedTokenizerBase, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The base model on `device`, quantized as configured, every parameter frozen, in eval mode.

    A token of `tokenizer` that the base's own tokenizer lacks gets the mean of the rows of its old pieces, in the input
    and the output embeddings; the embeddings grow only when the model has too few rows (Gemma has spare ones).
    Raises InputError when there is no such model, its weights are incomplete or no safetensors.
    """
    folder, device = _local_folder(base, weights=True), torch.device(device)
    if device.type == "cuda" and device.index is None:
        # Trainer takes a model on `cuda` instead of `cuda:0` for one that is spread over devices.
        device = torch.device("cuda", torch.cuda.current_device())
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if base.compute_dtype == "auto" else getattr(torch, base.compute_dtype)
    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    }[base.quantization]
    with _explained(f"base.model: {folder}"), _quiet():
        model, info = _load_weights(
            folder,
            trust_remote_code=base.trust_remote_code,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"base.model: {base.model} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}; "
            "download it again"
        )
    model.requires_grad_(False)
    if base.quantization == "nf4":
        _keep_four_bit_weights(model)
    _extend_vocabulary(model, tokenizer, _base_tokenizer(base))
    lighten_elementwise(model)
    return model.eval()


def _load_weights(folder: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with sdpa, which flat batches need, else with the attention that its family supports."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError as error:
        # Gemma 2 caps its scores, gpt-oss has sinks, Bloom has biases: transformers computes them without sdpa alone.
        if "scaled_dot_product_attention" not in str(error):
            raise
    log.info("%s: its family has no sdpa attention, eager is used; training batches are padded", folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


@contextmanager
def keeping_modes(model: torch.nn.Module) -> Iterator[None]:
    """Put every module of a model back into the mode, training or eval, that it has now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The whole model in eval mode while inside; then every module has its own mode back."""
    with keeping_modes(model):
        model.eval()
        yield


def _keep_four_bit_weights(model: PreTrainedModel) -> None:
    """Let no forward pass repack the weights, as bitsandbytes 0.50 does in eval mode on CPUs with AVX512-BF16.

    The repacking is in place and rounds the scales to bfloat16, so that a model would train on other numbers than it is
    validated on, and it dies where a layer's inputs are no multiple of the block of 64.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import, and only this needs it

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def _extend_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase
) -> None:
    """Give every token that `original` lacks a row: the mean of its pieces (Hewitt 2021, mean initialisation)."""
    old = original.get_vocab()
    new = {token: i for token, i in tokenizer.get_vocab().items() if token not in old}
    if not new:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if max(new.values()) >= rows:
        model.resize_token_embeddings(max(new.values()) + 1, mean_resizing=False)
        model.requires_grad_(False)
    embeddings = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for token, i in new.items():
        pieces = original.encode(token.replace("▁", " "), add_special_tokens=False)
        for weight in embeddings.values():
            weight[i] = weight[pieces].float().mean(0).to(weight.dtype)


def _local_folder(base: BaseModelConfig, weights: bool = False) -> str:
    """The base as a folder here, downloaded (or found in the hub's cache) when it is a hub id."""
    where = find_base(base)
    if Path(where).is_dir():
        return where
    files = ["*.json", "*.jinja", "*.model", "*.txt"]
    files += ["*.safetensors"] if weights else []
    files += ["*.py"] if base.trust_remote_code else []
    try:
        # One request without retries tells whether there is a hub; transformers alone would try for most of a minute.
        return snapshot_download(base.model, revision=base.revision, allow_patterns=files, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"base.model: {base.model} is no folder here, and the hub does not give it (no connection, unknown or "
            f"gated): download it elsewhere with `hf download` and set base.model to its folder [{_reason(error)}]"
        ) from error


def _reason(error: Exception) -> str:
    if "custom code" in str(error):
        return (
            "it brings code of its own, which base.trust_remote_code: true runs; set it only where you trust its author"
        )
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the libraries raise about unusable files into one InputError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{what}: cannot be loaded: {_reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without progress bars and advice; what goes wrong is raised, not logged."""
    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
