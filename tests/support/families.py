"""Tiny random models of many families, each with the public conventions of its tokenizer and chat template.

Templates are short ones written here after what the family's own template writes for plain questions and answers: no tools,
no system turn beyond a default one. Each names the tokens by their public names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "none": None,
    "chatml": CHATML,
    "chatml with a default system turn": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml of content parts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with an empty think block": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>{% endif %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "gemma 4": (
        "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
        "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi 4 mini": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    ),
    "exaone": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}[|system|][|endofturn|]\n{% endif %}"
        "[|{{ m.role }}|]{{ m.content }}{{ '\n' if m.role == 'user' else '[|endofturn|]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "granite": (
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
    "olmo": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% if not loop.last or m.role == 'user' %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "glm 4": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "cohere": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{{ m.content }}"
        "{{ '' if m.role == 'user' else '<|END_RESPONSE|>' }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "deepseek r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
        "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    "gpt-oss": (
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
        "{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
}


@dataclass(frozen=True)
class Family:
    """A tiny model of a family: transformers' name of it, its template, its special tokens, how completions must end."""

    kind: str
    template: str
    tokens: tuple[str, ...]
    """Special tokens beside BOS and EOS."""
    eos: str
    end: tuple[str, ...] = ()
    """The tokens behind a chat's answer; empty = EOS."""
    bos: str | None = None
    start: tuple[str, ...] = ()
    """What the tokenizer itself puts before plain text."""
    stops: tuple[str, ...] = ()
    """What its generation_config lists beside EOS."""
    config: dict[str, Any] = field(default_factory=dict)
    prompt_end: str = ""
    """What a prompt ends with."""
    padded: bool = False
    """Whether its batches cannot be flat."""


_TURNS = ("<|im_start|>", "<|im_end|>")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
_LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "partial_rotary_factor": 0.25,
}
_ASSISTANT = "<|im_start|>assistant\n"
_EMPTY_BLOCK = "<think>\n\n</think>\n\n"
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI3 = ("<|user|>", "<|assistant|>", "<|end|>")

FAMILIES: dict[str, Family] = {
    "Llama 3": Family(
        "llama",
        "llama 3",
        _LLAMA3,
        "<|end_of_text|>",
        ("<|eot_id|>",),
        "<|begin_of_text|>",
        ("<|begin_of_text|>",),
        ("<|eot_id|>",),
        {"tie_word_embeddings": False},
        "assistant<|end_header_id|>\n\n",
    ),
    "SmolLM2": Family(
        "llama",
        "chatml with a default system turn",
        (),
        "<|im_end|>",
        bos="<|im_start|>",
        config={"tie_word_embeddings": True},
        prompt_end=_ASSISTANT,
    ),
    "DeepSeek-R1 distill (Llama)": Family(
        "llama",
        "deepseek r1",
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        start=("<｜begin▁of▁sentence｜>",),
        prompt_end=f"<｜Assistant｜>{_EMPTY_BLOCK}",
    ),
    "Mistral": Family(
        "mistral",
        "mistral",
        ("[INST]", "[/INST]"),
        "</s>",
        bos="<s>",
        start=("<s>",),
        config={"sliding_window": 8},
        prompt_end=" [/INST]",
    ),
    "Qwen2": Family("qwen2", "chatml", ("<|endoftext|>", "<|im_start|>"), "<|im_end|>", prompt_end=_ASSISTANT),
    "Qwen3": Family(
        "qwen3",
        "chatml with an empty think block",
        ("<|endoftext|>", "<|im_start|>", "<think>", "</think>"),
        "<|im_end|>",
        prompt_end=_ASSISTANT + _EMPTY_BLOCK,
    ),
    "Qwen3 MoE": Family(
        "qwen3_moe",
        "chatml with an empty think block",
        ("<|im_start|>",),
        "<|im_end|>",
        config=_MOE,
        prompt_end=_ASSISTANT + _EMPTY_BLOCK,
    ),
    "Gemma": Family(
        "gemma",
        "gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<end_of_turn>",),
        "<bos>",
        ("<bos>",),
        prompt_end="<start_of_turn>model\n",
    ),
    "Gemma 3": Family(
        "gemma3_text",
        "gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<end_of_turn>",),
        "<bos>",
        ("<bos>",),
        ("<end_of_turn>",),
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        "<start_of_turn>model\n",
    ),
    "Phi-3": Family(
        "phi3", "phi 3", _PHI3, "<|endoftext|>", ("<|end|>",), None, (), ("<|end|>",), {}, "<|assistant|>\n"
    ),
    "EXAONE 4": Family(
        "exaone4",
        "exaone",
        ("[|system|]", "[|user|]", "[|assistant|]"),
        "[|endofturn|]",
        bos="[BOS]",
        config={"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        prompt_end="[|assistant|]",
    ),
    "Granite": Family(
        "granite",
        "granite",
        ("<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        config={"logits_scaling": 4.0, "residual_multiplier": 0.5},
        prompt_end="assistant<|end_of_role|>",
    ),
    "OLMo 2": Family("olmo2", "olmo", _PHI3[:2], "<|endoftext|>", bos="<|endoftext|>", prompt_end="<|assistant|>\n"),
    "GLM-4": Family(
        "glm4",
        "glm 4",
        ("[gMASK]", "<sop>", *_PHI3[:2]),
        "<|endoftext|>",
        start=("[gMASK]", "<sop>"),
        stops=("<|user|>",),
        prompt_end="<|assistant|>\n",
        config={"partial_rotary_factor": 0.5},
    ),
    "Command R": Family(
        "cohere2",
        "cohere",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|END_OF_TURN_TOKEN|>",
        ("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"),
        "<BOS_TOKEN>",
        ("<BOS_TOKEN>",),
        config={"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        prompt_end="<|CHATBOT_TOKEN|><|START_RESPONSE|>",
    ),
    "Mixtral": Family(
        "mixtral",
        "mistral",
        ("[INST]", "[/INST]"),
        "</s>",
        bos="<s>",
        start=("<s>",),
        config=_MOE,
        prompt_end=" [/INST]",
    ),
    "SmolLM3": Family(
        "smollm3",
        "chatml with an empty think block",
        ("<|im_start|>",),
        "<|im_end|>",
        prompt_end=_ASSISTANT + _EMPTY_BLOCK,
    ),
    "StarCoder 2": Family("starcoder2", "none", (), "<|endoftext|>", bos="<|endoftext|>"),
    "Falcon": Family(
        "falcon", "none", (), "<|endoftext|>", config={"new_decoder_architecture": True, "head_dim": None}, padded=True
    ),
    "StableLM 2": Family(
        "stablelm",
        "chatml",
        _TURNS,
        "<|endoftext|>",
        ("<|im_end|>",),
        config={"partial_rotary_factor": 0.5},
        prompt_end=_ASSISTANT,
    ),
    "a model that wants content parts": Family(
        "llama", "chatml of content parts", _TURNS[:1], "<|im_end|>", prompt_end=_ASSISTANT
    ),
    "Polyglot-Ko (GPT-NeoX)": Family(
        "gpt_neox", "none", (), "<|endoftext|>", config={"rotary_pct": 0.5, "tie_word_embeddings": False}
    ),
    "Phi-4-mini": Family(
        "phi3",
        "phi 4 mini",
        _PHI3,
        "<|endoftext|>",
        ("<|end|>",),
        stops=("<|end|>",),
        config={"partial_rotary_factor": 0.75},
        prompt_end="<|assistant|>",
    ),
    "Qwen3.5": Family(
        "qwen3_5_text",
        "chatml with an empty think block",
        ("<|endoftext|>", "<|im_start|>", "<think>", "</think>"),
        "<|im_end|>",
        config=_LINEAR,
        prompt_end=_ASSISTANT + _EMPTY_BLOCK,
        padded=True,
    ),
    "Gemma 2": Family(
        "gemma2",
        "gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<end_of_turn>",),
        "<bos>",
        ("<bos>",),
        config={
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        prompt_end="<start_of_turn>model\n",
        padded=True,
    ),
    "Gemma 4": Family(
        "gemma4_text",
        "gemma 4",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        "<eos>",
        ("<turn|>",),
        "<bos>",
        ("<bos>",),
        ("<turn|>",),
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
        "<|turn>model\n<|channel>thought\n<channel|>",
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "gpt-oss",
        ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        "<|return|>",
        stops=("<|endoftext|>", "<|call|>"),
        config={**_MOE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        prompt_end="<|start|>assistant<|channel|>final<|message|>",
        padded=True,
    ),
    "Bloom": Family("bloom", "none", (), "</s>", bos="<s>", config={"n_head": 2, "n_layer": 2}, padded=True),
}
"""The families of docs/families.md."""


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens, template, and what it puts before plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = dict.fromkeys(
        [family.eos, *([family.bos] if family.bos else []), *family.start, *family.end, *family.tokens]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340 + len(words),
        special_tokens=[*words, *(f"<spare {i}>" for i in range(20 - len(words)))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["아스피린 은 해열 진통제 이다", "answer: A B C D E"], trainer)
    if family.start:
        ids = [(word, tokenizer.token_to_id(word)) for word in family.start]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*family.start, "$A"]) if all(" " not in word for word in family.start) else "$A",
            special_tokens=ids,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        bos_token=family.bos,
        chat_template=TEMPLATES[family.template],
    )


def build_family(family: Family, folder: Path) -> str:
    """Write a random model of the family into the folder, as its publisher would."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = build_tokenizer(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    sizes = {**_SIZES, **ids, "vocab_size": len(tokenizer), **family.config}
    config = AutoConfig.for_model(
        family.kind, **{key: value for key, value in sizes.items() if value is not None or key == "pad_token_id"}
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    listed = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(word) for word in family.stops)]
    model.generation_config = GenerationConfig(eos_token_id=listed, bos_token_id=tokenizer.bos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
