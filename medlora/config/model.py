"""The keys of a config for the base model and its LoRA adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config.base import Section

LLM_INT8_THRESHOLD = 6.0
"""Of the paper, and of bitsandbytes."""


class BaseModelConfig(Section):
    """The base model under every adapter."""

    model: str
    """Folder of a Hugging Face model, hub id (`google/medgemma-4b-it`), or `miniature` (built here in two minutes)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); pin a commit to reproduce a run."""
    quantization: Literal["auto", "none", "int8", "nf4"] = "none"
    """bitsandbytes: `int8` (LLM.int8), `nf4` (QLoRA, double quantization) or none. `auto`: the first of none, int8 and nf4
    that fits the card, chosen before the run begins and written into its config; none on CPU."""
    int8_threshold: float = Field(LLM_INT8_THRESHOLD, ge=0)
    """Of LLM.int8 (arXiv 2208.07339): inputs above it are multiplied in 16 bits; 0 multiplies all of them in 8, faster."""
    dequantize: bool = False
    """Turn the quantized weights into 16-bit ones once, at loading: the speed and the memory of an unquantized base. nf4 stays
    the same function. int8 no longer rounds what goes into a layer, so that the batches of a pass change no result."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU (bf16 products are many times slower there)."""
    extra_tokens: tuple[str, ...] = ()
    """Words added to the vocabulary; their rows start as the mean of their old pieces. A text file, one a line, is
    named as `file:PATH` in a list of one."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off unless you trust its author."""

    @model_validator(mode="after")
    def _check_dequantize(self) -> Self:
        if self.dequantize and self.quantization not in ("int8", "nf4"):
            raise ValueError(
                f"dequantize: only quantization: int8 or nf4 leaves weights to dequantize, not {self.quantization}"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Dumps are in the fingerprints of finished runs, which knew no other threshold and dequantized nothing.
        dumped: dict[str, object] = serialise(self)
        for name, usual in (("int8_threshold", LLM_INT8_THRESHOLD), ("dequantize", False)):
            if dumped.get(name) == usual:
                del dumped[name]
        return dumped


class LoraSettings(Section):
    """The shape of a LoRA adapter."""

    r: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32, gt=0)
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353); on an int8 base on a GPU alone."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "all-linear"
    """`attention` (q, k, v, o), `all-linear`, or names of linear layers; always in the language model alone."""
