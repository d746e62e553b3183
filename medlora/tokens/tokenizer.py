"""What is used of a transformers tokenizer: its type has half of these names only at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, overload


class Encoded(Protocol):
    """What a tokenizer returns."""

    @property
    def input_ids(self) -> list[int]:
        """The ids of one text."""


class EncodedBatch(Protocol):
    """What a tokenizer returns for several texts."""

    @property
    def input_ids(self) -> list[list[int]]:
        """The ids of each text."""


class Tokenizer(Protocol):
    """A tokenizer as transformers loads it."""

    name_or_path: str
    chat_template: str | dict[str, str] | None
    pad_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None
    unk_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, object]

    def __len__(self) -> int:
        """The number of tokens, added ones included."""

    @overload
    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoded: ...

    @overload
    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> EncodedBatch: ...

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens with their ids."""

    def add_tokens(self, new_tokens: Sequence[object]) -> int:
        """Add tokens to the vocabulary."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each of several ids."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """The id of a token."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> object:
        """What the chat template makes of messages."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files."""
