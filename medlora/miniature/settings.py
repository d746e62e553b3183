"""The numbers that the miniature is made by, apart from the code that uses them and without torch.

`medlora.miniature.hash_tables` hashes all of them, by name and value.
"""

from __future__ import annotations

from typing import TypedDict

OPTIONS = 5
"""Of a question."""
STATEMENT_REPEATS = 8
DOCUMENT_SIZES = (3, 4)
"""Statements in one document."""
TRAIN_ORDERS = 4
"""Option orders of each wording of a training question."""

SHARES = {"drill": 0.10, "open_book": 0.45, "text": 0.12, "question": 0.28, "translation": 0.05}
"""Shares of the lessons once matching is learnt."""
DRILL_QUERIES = 8

VOCABULARY = 3000
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma 3's turns, without its folding of a system message into the user's turn (the miniature has no system turn)."""

INITIAL_STD = 0.1


class NetworkShape(TypedDict):
    """The arguments of transformers' Gemma3TextConfig that are set here."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: list[str]
    sliding_window: int
    query_pre_attn_scalar: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float


SHAPE: NetworkShape = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "query_pre_attn_scalar": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": INITIAL_STD,
}
"""Of the network, as transformers' Gemma3TextConfig names it."""

BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
DRILL_STEPS_AT_MOST = 400
DRILL_ACCURACY = 0.97
"""With 0.85 seed 0 left the drills on an Intel Xeon with matching half learnt, and stage 02 ended at 65 % on `asked`."""
DRILL_WINDOW = 20
LESSON_STEPS = 600
DECAY_STEPS = 240
WEIGHT_NOISE = 0.15
"""Of a matrix's standard deviation; rounding to 4 bits moves a weight by about 0.1 of it."""
LETTER_WEIGHT, COMPLETION_WEIGHT = 4.0, 1.0
"""Of the loss."""
