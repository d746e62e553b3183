from __future__ import annotations

from typing import Any

import pytest
import torch

from medlora import turns
from medlora.config.model import BaseModelConfig
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.tokenizer import load_tokenizer
from medlora.prompts import Example, render_mcq, render_text
from medlora.records import McqRecord, TextRecord
from medlora.tokens.encode import encode_prompts, needs_bos
from medlora.tokens.rows import IGNORED, Row, encode
from medlora.training.batches import Collator
from tests.support.tiny import FAMILIES

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QUESTION = McqRecord("1", "열 이 나는 이유 는?", ("aspirin", "insulin"), "B", rationale={"analysis": "인슐린 은 췌장"})


@pytest.fixture(params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, bases: dict[str, str]) -> Any:
    return load_tokenizer(BaseModelConfig(model=bases[request.param]))


@pytest.fixture
def chat(bases: dict[str, str]) -> Any:
    tokenizer = load_tokenizer(BaseModelConfig(model=bases["gemma"]))
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def documents(*texts: str) -> list[Example]:
    return [render_text(TextRecord(str(i), text)) for i, text in enumerate(texts)]


def test_a_chat_prompt_is_the_user_s_turn_with_bos_exactly_once(chat: Any) -> None:
    (ids,) = encode_prompts(chat, [render_mcq(QUESTION)])
    assert ids.count(chat.bos_token_id) == 1 and ids[0] == chat.bos_token_id
    text = chat.decode(ids)
    assert text.startswith("<bos><start_of_turn>user\n질문: 열 이") and text.endswith(
        "<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_loops_on_a_row_ends_the_phase_that_renders_it(
    chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 0.3)
    monkeypatch.setattr(turns, "_LOOK_S", 0.1)
    loops = "{% for a in row %}{% for b in row %}{% for c in row %}{% endfor %}{% endfor %}{% endfor %}"
    chat.chat_template = (
        "{% set row = range(99999) %}{% if messages[0].content | length > 50 %}"
        + loops
        + "{% endif %}"
        + GEMMA_TEMPLATE
    )
    assert encode_prompts(chat, [Example("ask", "B")])
    with pytest.raises(InputError, match="^base.model: the chat template of .* did not end in 0.3 s"):
        encode_prompts(chat, [Example("ask", "B"), Example("ask " * 20, "B")])


def test_the_loss_is_on_the_completion_and_the_token_that_ends_it(chat: Any) -> None:
    (row,), _ = encode(chat, [render_mcq(QUESTION)], 512, packing=True)
    learned = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    assert chat.decode(learned) == "analysis: 인슐린 은 췌장\nanswer:\nB<end_of_turn>"
    assert [label for label in row.labels if label != IGNORED] == learned


def test_without_a_template_prompts_are_plain_and_end_with_eos(tokenizer: Any) -> None:
    (row,), _ = encode(tokenizer, [Example("ask", "B")], 512, packing=True)
    bos = [tokenizer.bos_token_id] if needs_bos(tokenizer) else []
    assert row.input_ids[: len(bos)] == bos
    assert tokenizer.decode(row.input_ids[len(bos) :]) == f"ask\nB{tokenizer.eos_token}"


def test_every_token_of_a_text_but_its_first_is_learned(tokenizer: Any) -> None:
    (row,), lengths = encode(tokenizer, documents("text about aspirin"), 512, packing=True)
    assert row.labels == [IGNORED, *row.input_ids[1:]] and row.input_ids[-1] == tokenizer.eos_token_id
    assert lengths.supervised_tokens == len(row.input_ids) - 1


def test_a_question_that_is_too_long_is_dropped_whole_and_counted(tokenizer: Any) -> None:
    examples = [Example("ask", "B"), Example("ask " * 50, "B"), Example("ask", "long " * 50)]
    rows, lengths = encode(tokenizer, examples, 40, packing=True)
    assert (lengths.examples, lengths.rows, lengths.dropped) == (3, 1, 2) and lengths.longest > 40


def test_a_text_that_is_too_long_goes_on_in_further_rows_without_losing_a_token(tokenizer: Any) -> None:
    (whole,), _ = encode(tokenizer, documents("text about aspirin and insulin " * 8), 10_000, packing=True)
    rows, lengths = encode(tokenizer, documents("text about aspirin and insulin " * 8), 16, packing=True)
    bos = needs_bos(tokenizer)
    joined = rows[0].input_ids + [i for row in rows[1:] for i in row.input_ids[bos:]]
    assert joined == whole.input_ids and lengths.split == 1
    assert all(len(row.input_ids) <= 16 for row in rows)


def test_packing_fills_rows_and_starts_positions_again(tokenizer: Any) -> None:
    texts = ["text about aspirin", "insulin", "aspirin and insulin", "text"]
    apart, _ = encode(tokenizer, documents(*texts), 24, packing=False)
    packed, lengths = encode(tokenizer, documents(*texts), 64, packing=True)
    assert len(apart) == 4 and len(packed) < 4
    assert [i for row in packed for i in row.input_ids] == [i for row in apart for i in row.input_ids]
    assert [p for row in packed for p in row.position_ids] == [p for row in apart for p in row.position_ids]
    assert lengths.tokens == sum(len(row.input_ids) for row in apart)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_and_padding_are_kept_apart(family: str, bases: dict[str, str]) -> None:
    """Logits of a packed and padded batch are those of each document alone: longer than the sliding window too."""
    base = BaseModelConfig(model=bases[family])
    tokenizer = load_tokenizer(base)
    model = load_base(base, tokenizer)
    texts = ["text about aspirin and insulin 아스피린 은 해열", "insulin", "인슐린 은 췌장 에서 나온다 text about"]
    alone, _ = encode(tokenizer, documents(*texts), 512, packing=False)
    packed, _ = encode(tokenizer, documents(*texts), 512, packing=True)
    question, _ = encode(tokenizer, [Example("ask " * 30, "B")], 4000, packing=True)
    collator = Collator(tokenizer.pad_token_id, token_type_ids=family == "medgemma")
    assert len(packed) == 1

    def logits(rows: list[Row]) -> torch.Tensor:
        batch = collator(rows)
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    together = logits([packed[0], question[0]])
    start = 0
    for row in alone:
        n = len(row.input_ids)
        torch.testing.assert_close(together[0, start : start + n], logits([row])[0], atol=1e-5, rtol=1e-5)
        start += n
    torch.testing.assert_close(together[1, : len(question[0].input_ids)], logits(question)[0], atol=1e-5, rtol=1e-5)
    plain = logits([alone[0], alone[1]])
    torch.testing.assert_close(plain[1, : len(alone[1].input_ids)], logits([alone[1]])[0], atol=1e-5, rtol=1e-5)


def test_shots_are_earlier_turns_of_the_chat(chat: Any) -> None:
    shot = McqRecord("2", "췌장 은?", ("aspirin", "insulin"), "A")
    (ids,) = encode_prompts(chat, [render_mcq(QUESTION, "answer", shots=(shot,))])
    first, second, third = chat.decode(ids).split("<end_of_turn>\n")[:3]
    assert first.startswith("<bos><start_of_turn>user\n질문: 췌장") and second == "<start_of_turn>model\nA"
    assert third.startswith("<start_of_turn>user\n질문: 열") and ids.count(chat.bos_token_id) == 1


def test_shots_without_a_template_stand_above(tokenizer: Any) -> None:
    shot = McqRecord("2", "text?", ("about", "aspirin"), "A")
    example = render_mcq(QUESTION, "answer", shots=(shot,))
    (ids,) = encode_prompts(tokenizer, [example])
    plain = [render_mcq(shot, "answer").prompt, "\nA\n\n", render_mcq(QUESTION, "answer").prompt, "\n"]
    bos = [tokenizer.bos_token_id] if needs_bos(tokenizer) else []
    assert ids == bos + tokenizer("".join(plain), add_special_tokens=False).input_ids


def test_kormedmcqa_is_never_put_into_a_chat(chat: Any) -> None:
    example = render_mcq(QUESTION, "kormedmcqa")
    (ids,) = encode_prompts(chat, [example])
    assert ids == chat(example.prompt).input_ids
