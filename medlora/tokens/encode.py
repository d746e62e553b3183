"""Examples -> token ids: chat template, BOS, the end of a completion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from medlora.prompts import Example
from medlora.tokens.tokenizer import Tokenizer
from medlora.turns import OPTIONS, Convention, Render, fix_date, learn_in_time, render_in_time, write_prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokens:
    """An example as ids: prompt, completion, end tokens. The first `prompt` ids carry no loss; plain text's is its BOS,
    which begins every further piece of the document, too."""

    ids: Sequence[int]
    prompt: int
    is_text: bool


def needs_bos(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer's plain texts begin with BOS (Gemma and Llama: yes; Qwen and SmolLM: no)."""
    return find_start(tokenizer)[:1] == [tokenizer.bos_token_id]


def find_start(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a plain text: BOS for most, nothing for some.

    A chat template writes its own.
    """
    whole, (bare,) = list(tokenizer("a").input_ids), encode_texts(tokenizer, ["a"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without any special token of the tokenizer's own accord."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.padding or backend.truncation:
        return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    # The same ids without the offsets of every piece, which nobody here asks for: a fifth of the time less.
    return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def find_convention(tokenizer: Tokenizer) -> Convention | None:
    """How the tokenizer's chat template writes turns; None without one. Raises InputError where it cannot write any."""
    if not tokenizer.chat_template:
        return None
    convention = learn_in_time(_make_renderer(tokenizer), _name_template(tokenizer))
    if convention.closes:
        _log_once(
            f"{_name_template(tokenizer)} leaves reasoning open where an answer begins: it is closed there with "
            f"{convention.closes.strip()}, so that answers are trained and scored outside of it"
        )
    return convention


def _make_renderer(tokenizer: Tokenizer) -> Render:
    dated = fix_date(tokenizer.chat_template)
    return lambda messages, **options: str(
        tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False, **OPTIONS, **options)
    )


def _name_template(tokenizer: Tokenizer) -> str:
    return f"base.model: the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


@cache
def _log_once(text: str) -> None:
    log.warning(text)


def encode_prompts(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    """Ids of each prompt as the model sees it: the user's turn of the chat template, else plain.

    A chat prompt begins as the template writes it, plain text as the tokenizer begins it, with BOS at most once. Shots are
    turns before it. Without a template they come before the prompt, each followed by a blank line.
    Raises InputError for a chat template that raises, or leaves out what is asked.
    """
    convention = _find_convention_of(tokenizer, examples)
    bos = tokenizer.bos_token_id
    texts = _write_prompts(tokenizer, convention, examples)
    start, made = find_start(tokenizer), []
    for example, ids in zip(examples, encode_texts(tokenizer, texts), strict=True):
        if not (example.chat and convention):
            ids = [*start, *(ids[1:] if bos in start and ids[:1] == [bos] else ids)]
        made.append(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids)
    return made


def write_prompts(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    """The text of each prompt that `encode_prompts` makes ids of, with what the chat template writes, for other programs."""
    return _write_prompts(tokenizer, _find_convention_of(tokenizer, examples), examples)


def _find_convention_of(tokenizer: Tokenizer, examples: Sequence[Example]) -> Convention | None:
    return find_convention(tokenizer) if any(example.chat for example in examples) else None


def _write_prompts(tokenizer: Tokenizer, convention: Convention | None, examples: Sequence[Example]) -> list[str]:
    if convention:
        return _write_chats(tokenizer, convention, examples)
    return [write_plain(example) for example in examples]


def _write_chats(tokenizer: Tokenizer, convention: Convention, examples: Sequence[Example]) -> list[str]:
    """Each prompt as the chat template writes it, see `write_chat`."""
    name = _name_template(tokenizer)
    return render_in_time(
        _make_renderer(tokenizer),
        name,
        lambda render: [write_chat(render, convention, each, name) for each in examples],
    )


def write_chat(render: Render, convention: Convention, example: Example, name: str) -> str:
    """A prompt as a chat template writes it, shots as turns before it; one that is no chat as it is."""
    if not example.chat:
        return example.prompt
    shots = [turn for asked, answer in example.shots for turn in (("user", asked), ("assistant", answer))]
    return write_prompt(render, convention, [*shots, ("user", example.prompt)], name)


def write_plain(example: Example) -> str:
    """A prompt without a chat template: shots come before it, each followed by a blank line."""
    if not example.chat:
        return example.prompt
    return "".join(f"{prompt}\n{completion}\n\n" for prompt, completion in example.shots) + f"{example.prompt}\n"


def find_end_tokens(tokenizer: Tokenizer, chat: bool = True) -> list[int]:
    """The tokens that close a completion: what the chat template writes behind an assistant's turn, up to the token that stops it.

    EOS for plain text, and where the template writes no token of its own there.
    """
    convention = find_convention(tokenizer) if chat else None
    eos = tokenizer.eos_token_id
    if convention is None:
        return [eos]
    if convention.end is None:
        known = tokenizer.get_vocab().get("<end_of_turn>")
        return [eos if known is None else known]
    ids, between = encode_texts(tokenizer, [convention.end.strip(), convention.between.lstrip()])
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = next((i for i, token in enumerate(ids) if token in marks or len(ids) == 1), None)
    if first is None:
        return [eos]
    # A token that follows the last answer only ends the conversation, not a turn: Phi-3 writes EOS there.
    shared = next(
        (i for i, (a, b) in enumerate(zip(ids, between, strict=False)) if a != b), min(len(ids), len(between))
    )
    ids = ids[: max(shared, first + 1)]
    return ids[first : ids.index(eos, first) + 1] if eos in ids[first:] else [ids[first]]


def tokenise(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Tokens]:
    """Each example as ids, of any length."""
    prompts = encode_prompts(tokenizer, examples)
    completions = encode_texts(tokenizer, [example.completion for example in examples])
    ends = {chat: find_end_tokens(tokenizer, chat) for chat in {example.chat for example in examples}}
    return [
        Tokens([*prompt, *completion, *ends[example.chat]], len(prompt), not example.prompt)
        for example, prompt, completion in zip(examples, prompts, completions, strict=True)
    ]
