"""The miniature's network: a tiny Gemma 3 that starts with induction heads in place."""

from __future__ import annotations

import math

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from medlora.miniature.settings import SHAPE


def start_network(tokenizer: PreTrainedTokenizerFast) -> Gemma3ForCausalLM:
    """A Gemma3ForCausalLM over the tokenizer's vocabulary, from torch's global random state."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    model = Gemma3ForCausalLM(config)
    half = config.hidden_size // 2
    with torch.no_grad():
        # Tokens start in the first half of the residual stream; what preceded them is written into the second.
        embedding = model.model.embed_tokens.weight
        embedding[:, half:] = 0
        embedding[:, :half] *= math.sqrt(2)
        layers = model.model.layers
        for sliding, full in zip(layers[::2], layers[1::2], strict=True):
            _make_induction_head(sliding.self_attn, full.self_attn, half)
        for layer in layers:
            layer.post_feedforward_layernorm.weight.fill_(-0.7)
    return model


def _make_induction_head(sliding: Gemma3Attention, full: Gemma3Attention, half: int) -> None:
    """Lets `sliding` copy the last tokens into the second half, and `full` look a token up there and copy its company.

    The two-layer circuit of Olsson et al. 2022, "In-context Learning and Induction Heads". From a random start so small
    a model sits at chance for hundreds of steps until the circuit forms. Gemma's norms scale by 1 + weight: a small
    query norm spreads the attention evenly over the window.
    """

    def rotations() -> torch.Tensor:
        """One random rotation a head, stacked: (heads x head_dim, half), where head_dim = half."""
        heads = SHAPE["num_attention_heads"]
        return torch.cat([torch.linalg.qr(torch.randn(half, half)).Q for _ in range(heads)])

    shift = torch.linalg.qr(torch.randn(half, half)).Q
    for attention in (sliding, full):
        for projection in (attention.v_proj, attention.o_proj):
            projection.weight.zero_()
    sliding.q_norm.weight.fill_(-0.8)
    value = rotations()
    sliding.v_proj.weight[:, :half] = value
    sliding.o_proj.weight[half:] = shift @ value.T
    query, value = rotations(), rotations()
    full.q_proj.weight.zero_()[:, :half] = query
    full.k_proj.weight.zero_()[:, half:] = query @ shift.T
    full.v_proj.weight[:, half:] = value
    full.o_proj.weight[:half] = shift.T @ value.T
