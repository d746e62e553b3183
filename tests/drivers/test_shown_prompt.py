"""The prompt that a report shows is, token for token, what the model was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.drivers.evaluation import show_prompt
from medlora.evaluation.plan import EvaluationTask
from medlora.evaluation.questions import Asked
from medlora.model.miniature_base.tokenizer import train_tokenizer
from medlora.model.tokenizer import load_base_tokenizer
from medlora.prompts import render_mcq
from medlora.records import McqRecord
from medlora.tokens.encode import encode_prompts, encode_texts, find_start
from tests.support.families import FAMILIES, build_tokenizer

ASKED, SHOT = (McqRecord(f"q{i}", f"다음 중 옳은 것은 {i}?", ("가", "나", "다"), "B") for i in (1, 2))


def make_task(model: str, style: str, shots: tuple[McqRecord, ...]) -> EvaluationTask:
    config = EvaluationConfig.model_validate({"tests": [{"name": "t", "source": "x.jsonl"}], "style": style})
    return EvaluationTask(BaseModelConfig(model=model), 0, "", {"base": ()}, config, Asked({"t": [ASKED]}, shots))


def write_base(folder: Path, name: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tokenizer = build_tokenizer(FAMILIES[name])
    if name == "Mistral":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shots", [(), (SHOT,)], ids=["0-shot", "1-shot"])
@pytest.mark.parametrize("style", ["answer", "kormedmcqa"])
@pytest.mark.parametrize("family", ["Llama 3", "Qwen3", "Mistral", "miniature"])
def test_the_shown_prompt_has_the_tokens_that_the_model_sees(
    family: str, style: str, shots: tuple[McqRecord, ...], tmp_path: Path
) -> None:
    model = family if family == "miniature" else write_base(tmp_path / "base", family)
    tokenizer = train_tokenizer() if family == "miniature" else load_base_tokenizer(BaseModelConfig(model=model))
    shown = show_prompt(make_task(model, style, shots))
    assert shown and (shown["test"], shown["id"]) == ("t", "q1")
    assert shown["template"] == (style == "answer" and family != "Mistral")
    (ids,) = encode_texts(tokenizer, [shown["text"]])
    (asked,) = encode_prompts(tokenizer, [render_mcq(ASKED, style, None, shots)])
    assert asked == (ids if shown["template"] else [*find_start(tokenizer), *ids])


def test_no_prompt_is_shown_where_the_template_is_elsewhere(tmp_path: Path) -> None:
    """A driver that has a hub model's config alone does not know how its nodes asked."""
    (tmp_path / "config.json").write_text("{}")
    assert show_prompt(make_task(str(tmp_path), "answer", ())) is None
