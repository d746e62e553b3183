"""The tokenizer of a base or a stage: loading, added words, letter and stop tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel

from medlora.artifacts.base_checks import check_tokenizer
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.errors import InputError
from medlora.model.files import explain_load_errors, find_local_folder, load_quietly
from medlora.prompts import ANSWER_FIELD
from medlora.tokens.encode import find_end_tokens
from medlora.tokens.tokenizer import Tokenizer


def load_stage_tokenizer(base: BaseModelConfig, chain: Sequence[Link]) -> Tokenizer:
    """The tokenizer of a stage: the extended one that its newest adapter was saved with, else the base's own."""
    for link in reversed(chain):
        if (Path(link.folder) / "tokenizer_config.json").is_file():
            return load_tokenizer(base, link.folder)
    return load_tokenizer(base)


log = logging.getLogger(__name__)


def load_tokenizer(
    base: BaseModelConfig, folder: str | Path | None = None, extra_tokens: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer of the base, or the extended one saved in `folder`, with `extra_tokens` added to its vocabulary.

    A word that is one token already is skipped with a note in the log. Without a pad token, EOS serves.
    Raises InputError when there is no such tokenizer, or a word does not survive encoding and decoding.
    """
    if folder is None:
        tokenizer = load_base_tokenizer(base)
    else:
        if not (Path(folder) / "tokenizer_config.json").is_file():
            raise InputError(f"{folder}: holds no tokenizer (no tokenizer_config.json)")
        check_tokenizer(Path(folder), base.trust_remote_code)
        with explain_load_errors(str(folder)), load_quietly():
            found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
        tokenizer = cast(Tokenizer, found)
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


def added_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """The sorted ids of those `words` that were added to the vocabulary: the rows `train_extra_tokens` trains."""
    added = tokenizer.get_added_vocab()
    return sorted({added[content] for word in words if (content := _content(tokenizer, word)) in added})


def load_base_tokenizer(base: BaseModelConfig) -> Tokenizer:
    folder = find_local_folder(base)
    with explain_load_errors(f"base.model: {folder}"), load_quietly():
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=base.trust_remote_code))


def _marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the normalizer writes spaces as U+2581, as that of Gemma does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(backend and backend.normalizer and backend.normalizer.normalize_str("x x") == "x▁x")


def _content(tokenizer: Tokenizer, word: str) -> str:
    return f"▁{word}" if _marks_spaces(tokenizer) else word


def _is_token(tokenizer: Tokenizer, word: str) -> bool:
    return any(len(tokenizer.encode(text, add_special_tokens=False)) == 1 for text in (word, f" {word}"))


def letter_token_ids(tokenizer: Tokenizer, letters: Sequence[str], before: str = ANSWER_FIELD) -> list[int]:
    """The id of each option letter as the one token right after `before`, in the order of `letters`.

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


def stop_token_ids(tokenizer: Tokenizer, model: PreTrainedModel | None = None) -> list[int]:
    """Sorted ids that end an answer: EOS, `<end_of_turn>` where known, what the chat template writes behind an assistant's
    turn, and what the model's generation config lists."""
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<end_of_turn>")}
    with suppress(InputError):  # plain prompts need no template, and a chat prompt was refused before
        stops.add(find_end_tokens(tokenizer)[-1])
    listed = model.generation_config.eos_token_id if model is not None else None
    stops.update(listed if isinstance(listed, list) else [listed])
    return sorted(stop for stop in stops if stop is not None)
