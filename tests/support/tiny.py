"""Tiny random base models of three families, as folders a user would name in `base.model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

FAMILIES = ("gemma", "medgemma", "llama")
"""Tied text-only Gemma 3; tied multimodal Gemma 3 with spare vocabulary rows; untied Llama with byte-level BPE."""

EXTRA = ("고혈압증", "당뇨병성")
"""Words that none of the tokenizers has as one token."""

_TEXT = [
    "아스피린 은 해열 진통제 이다",
    "인슐린 은 췌장 에서 나온다",
    "text about aspirin and insulin",
    "answer: A B C D E",
]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_SPARE_ROWS = 64


def build_bases(folder: Path) -> dict[str, str]:
    """Write a base of each family under `folder`, in bf16 as they are published; the folders by family."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    marked, byte_level = _train_marked(), _train_byte_level()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    built: dict[str, tuple[Any, Any]] = {
        "gemma": (Gemma3ForCausalLM(_gemma_text(len(marked))), marked),
        "medgemma": (
            Gemma3ForConditionalGeneration(
                Gemma3Config(
                    text_config=_gemma_text(len(marked) + _SPARE_ROWS).to_dict(),
                    vision_config={**vision, "image_size": 28, "patch_size": 14},
                    mm_tokens_per_image=4,
                    image_token_index=5,
                    boi_token_index=6,
                    eoi_token_index=7,
                )
            ),
            marked,
        ),
        "llama": (
            LlamaForCausalLM(LlamaConfig(vocab_size=len(byte_level), tie_word_embeddings=False, **_SIZES)),
            byte_level,
        ),
    }
    for family, (model, tokenizer) in built.items():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # The usual 0.02 leaves so small a model with logits near 0, in which nothing shows.
                parameter.data.mul_(5)
        model.to(torch.bfloat16).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return {family: str(folder / family) for family in FAMILIES}


def build_gpt2(folder: Path) -> str:
    """Write a GPT-2, whose linear layers are Conv1D and whose base has dropout of its own; its folder."""
    torch.manual_seed(0)
    tokenizer = _train_byte_level()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _gemma_text(rows: int) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=rows,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **_SIZES,
    )


def _train_marked() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and spaces as U+2581, like Gemma's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=[*"ABCDEFGHIJ:\n▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def _train_byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pad token, like Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
