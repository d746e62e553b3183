"""Where a row ends: at the same token whether each row is decoded after each token or not."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from medlora.answering.stops import Generated, Stops, Writing
from medlora.config.model import BaseModelConfig
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import KORMEDMCQA_STOPS


class Model:
    """Has no stop tokens of its own."""

    generation_config = SimpleNamespace(eos_token_id=None)


def find_end(tokenizer: Any, ids: list[int], stops: Stops, window: int) -> int | None:
    """After how many tokens a row ends when it is decoded after each."""
    for n in range(1, len(ids) + 1):
        tail = ids[:n][: n - stops.tokens_after][-window:]
        if any(word in tokenizer.decode(tail, skip_special_tokens=True) for word in stops.words):
            return n
    return None


@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize(
    "stops", [Stops(KORMEDMCQA_STOPS), Stops(("정답", "answer:"), tokens_after=3), Stops(("은 ", "A"))]
)
def test_a_row_ends_where_decoding_every_token_would_end_it(bases: dict[str, str], family: str, stops: Stops) -> None:
    tokenizer: Any = load_tokenizer(BaseModelConfig(model=bases[family]))
    dice = random.Random(0)
    pieces = ["정답", "answer:", "은 ", " B. ", "\n", "\n\n", "Q:", "text", "췌", "고혈압", "<|im_end|>", ">", "답"]
    words = range(6, len(tokenizer))
    ended = 0
    for _ in range(40):
        ids: list[int] = []
        while len(ids) < 40:
            text = dice.choice(pieces)
            drawn = [dice.choice(words)] if dice.random() < 0.5 else tokenizer.encode(text, add_special_tokens=False)
            ids += [i for i in drawn if i != tokenizer.eos_token_id]
        writing = Writing(Model(), tokenizer, stops, 1)  # type: ignore[arg-type]
        expected = find_end(tokenizer, ids, stops, writing.window)
        found = next((n for n, token in enumerate(ids, 1) if writing.append([0], [token]) == [False]), None)
        assert found == expected
        ended += expected is not None
    assert ended > 5


def test_a_stop_token_ends_a_row_and_is_counted_but_not_written(bases: dict[str, str]) -> None:
    tokenizer: Any = load_tokenizer(BaseModelConfig(model=bases["llama"]))
    ids = tokenizer.encode("text", add_special_tokens=False)
    writing = Writing(Model(), tokenizer, Stops(), 2)  # type: ignore[arg-type]
    for token in ids:
        assert writing.append([0, 1], [token, token]) == [True, True]
    assert writing.append([0, 1], [tokenizer.eos_token_id, ids[0]]) == [False, True]
    assert writing.append([1], ids[:1]) == [True]
    first, second = writing.finish()
    assert first == Generated("text", len(ids) + 1) and second.tokens == len(ids) + 2
