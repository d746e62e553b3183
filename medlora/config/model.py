"""The keys of a config for the base model and its LoRA adapters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

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
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU (bf16 products are many times slower there)."""
    extra_tokens: tuple[str, ...] = ()
    """Words added to the vocabulary; their rows start as the mean of their old pieces. A text file, one a line, is
    named as `file:PATH` in a list of one."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off unless you trust its author."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Dumps are in the fingerprints of finished runs, which knew no other threshold.
        dumped: dict[str, Any] = serialise(self)
        if dumped.get("int8_threshold") == LLM_INT8_THRESHOLD:
            del dumped["int8_threshold"]
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
