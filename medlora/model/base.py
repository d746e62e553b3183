"""The base model that every phase and evaluation uses: quantized weights, extended vocabulary, our kernels.

`medlora.model.chain` puts adapters on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from medlora.config.model import BaseModelConfig
from medlora.errors import InputError
from medlora.kernels import attention
from medlora.kernels.elementwise_cpu import lighten_elementwise
from medlora.kernels.elementwise_cuda import fuse_elementwise
from medlora.model.files import explain_load_errors, find_local_folder, load_quietly
from medlora.model.tokenizer import load_base_tokenizer
from medlora.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from medlora.model.miniature_base.pretraining import OnProgress


def locate_base(base: BaseModelConfig, cache: str, seed: int, on_progress: OnProgress | None = None) -> BaseModelConfig:
    """The base with `miniature` replaced by the folder it is built in, building it where it is not there yet.

    The miniature computes in float32 on every device, unless the config names another type.
    """
    if base.model != "miniature":
        return base
    from medlora.model.miniature_base.build import ensure

    # So small a base is no faster in bfloat16, and a rounding of 2^-9 is more to it than to a large one.
    dtype = "float32" if base.compute_dtype == "auto" else base.compute_dtype
    return base.model_copy(update={"model": str(ensure(Path(cache), seed, on_progress)), "compute_dtype": dtype})


log = logging.getLogger(__name__)

_SHARE = 0.6
"""Of a GPU's free memory, what dequantized weights may take; the rest is for keys, values and activations."""


def load_base(base: BaseModelConfig, tokenizer: Tokenizer, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The base model on `device`, quantized (and dequantized) as configured, every parameter frozen, in eval mode.

    A token of `tokenizer` that the base's own tokenizer lacks gets the mean of the rows of its old pieces, in the input
    and the output embeddings. The embeddings grow only when the model has too few rows (Gemma has spare ones). Raises
    InputError when there is no such model, its weights are incomplete or no safetensors, or, dequantized, do not fit.
    """
    if base.quantization == "auto":
        raise InputError(
            "base.quantization: auto is chosen by `medlora train` before a run begins; say none, int8 or nf4"
        )
    attention.install()
    folder, device = find_local_folder(base, weights=True), torch.device(device)
    if device.type == "cuda" and device.index is None:
        # Trainer takes a model on `cuda` instead of `cuda:0` for one that is spread over devices.
        device = torch.device("cuda", torch.cuda.current_device())
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if base.compute_dtype == "auto" else getattr(torch, base.compute_dtype)
    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=base.int8_threshold),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    }[base.quantization]
    with explain_load_errors(f"base.model: {folder}"), load_quietly():
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
    _extend_vocabulary(model, tokenizer, load_base_tokenizer(base))
    if base.dequantize:
        try:
            log.info("the base has %s", dequantize_base(model, "always"))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"base.dequantize: the plain weights of {base.model} do not fit into the memory of {device}; leave it out, "
                "and they stay quantized"
            ) from error
    lighten_elementwise(model)
    if device.type == "cuda":
        fuse_elementwise(model)
    model.eval()
    return model


def dequantize_base(model: PreTrainedModel, wanted: Literal["auto", "always", "never"]) -> str:
    """Turn quantized weights into plain ones of the compute type, layer by layer, before adapters are put on the model.

    Returns what the base computes with from then on; "" where nothing was changed. nf4 multiplies with exactly these
    weights, so it is the same function. LLM.int8 also rounds what goes into a layer, and treats columns with outliers
    otherwise, by all rows of a batch: without it an answer depends on no other question, and is another one.
    `auto` does so with nf4 on a GPU that has room for it; memory that runs out nevertheless leaves the rest quantized.
    """
    if wanted == "never":
        return ""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # slow to import, and only this needs it

    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    device, dtype = torch.device(model.device), model.dtype
    if wanted == "auto":
        needed = sum(m.in_features * m.out_features for m in layers.values()) * torch.finfo(dtype).bits // 8
        if device.type != "cuda" or any(isinstance(m, Linear8bitLt) for m in layers.values()):
            return ""
        if needed > _SHARE * torch.cuda.mem_get_info(device)[0]:
            log.info("the base stays quantized: plain weights would take %.1f GiB", needed / 2**30)
            return ""
    done = 0
    for name, layer in layers.items():
        try:
            model.set_submodule(name, _dequantize(layer, dtype))
        except torch.OutOfMemoryError:
            if wanted == "always":
                raise
            log.warning("memory ran out: %d of %d layers stay quantized", len(layers) - done, len(layers))
            break
        done += 1
    kind = "nf4" if any(isinstance(m, Linear4bit) for m in layers.values()) else "int8"
    amount = "" if done == len(layers) else f" in {done} of {len(layers)} layers"
    return f"{kind} weights, dequantized once to {str(dtype).removeprefix('torch.')}{amount}" if done else ""


@torch.no_grad()
def _dequantize(layer: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Linear:
    """A plain layer with the weights that a quantized one multiplies with."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(cast(torch.nn.Parameter, layer.weight), getattr(layer, "state", None)).to(dtype)
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return plain.train(layer.training)


_Loaded = tuple[PreTrainedModel, Mapping[str, Iterable[str]]]
"""A model, and what of it its files lack or hold besides."""


def _load_weights(folder: str, **options: Any) -> _Loaded:
    """The model with sdpa, which flat batches need, else with the attention that its family supports."""

    def load(attention: str) -> _Loaded:
        # With `output_loading_info` it returns a pair, which its annotation leaves out.
        return cast(_Loaded, AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options))

    try:
        model, info = load("sdpa")
    except ValueError as error:
        # Gemma 2 caps its scores, gpt-oss has sinks, Bloom has biases: transformers computes them without sdpa alone.
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, info = load("eager")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # transformers 5.17 gives Gemma 2 sdpa and leaves out the cap in silence; 5.23 raises.
        model.set_attn_implementation("eager")
    if model.config._attn_implementation == "eager":
        log.info("%s: its family has no sdpa attention, eager is used; training batches are padded", folder)
    return model, info


def _get_weight(embeddings: torch.nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, embeddings.weight)


def _keep_four_bit_weights(model: PreTrainedModel) -> None:
    """Let no forward pass repack the weights, as bitsandbytes 0.50 does in eval mode on CPUs with AVX512-BF16.

    The repacking is in place and rounds the scales to bfloat16, so that a model would train on other numbers than it is
    validated on. It also fails where a layer's inputs are no multiple of the block of 64.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import, and only this needs it

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def _extend_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer, original: Tokenizer) -> None:
    """Give every token that `original` lacks a row: the mean of its pieces (Hewitt 2021, mean initialisation)."""
    old = original.get_vocab()
    new = {token: i for token, i in tokenizer.get_vocab().items() if token not in old}
    if not new:
        return
    rows = _get_weight(model.get_input_embeddings()).shape[0]
    if max(new.values()) >= rows:
        model.resize_token_embeddings(max(new.values()) + 1, mean_resizing=False)
        model.requires_grad_(False)
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(weight): weight for weight in map(_get_weight, both)}
    for token, i in new.items():
        pieces = original.encode(token.replace("▁", " "), add_special_tokens=False)
        for weight in embeddings.values():
            weight[i] = weight[pieces].float().mean(0).to(weight.dtype)
