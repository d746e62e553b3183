"""A phase, a stack, an export and an evaluation in many families of models, with their templates; see docs/families.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medlora.answering.stage_model import StageModel
from medlora.artifacts.base_checks import check_base
from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.config.sources import SourceConfig
from medlora.curriculum.chains import Link
from medlora.data.sources import read
from medlora.drivers.export import Export, write_export
from medlora.model.base import load_base
from medlora.model.chain import activate, load_chain
from medlora.model.export import export_chain
from medlora.model.tokenizer import load_tokenizer, stop_token_ids
from medlora.prompts import Example
from medlora.runs.folders import RunFolder
from medlora.tokens.encode import encode_prompts
from medlora.tokens.rows import IGNORED, encode
from tests.support.families import FAMILIES, build_family, build_tokenizer
from tests.support.tiny_run import configure, run_all

QUICK = ("Llama 3", "Gemma 3", "Phi-4-mini", "Qwen3.5", "gpt-oss")
"""Families that every run of the tests tries; together they take each path through the code."""


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_ends_are_what_the_template_writes(name: str) -> None:
    family = FAMILIES[name]
    tokenizer: Any = build_tokenizer(family)
    (ids,) = encode_prompts(tokenizer, [Example("질문 A?", "B")])
    (row,), _ = encode(tokenizer, [Example("질문 A?", "B")], 512, packing=False)
    learned = tokenizer.convert_ids_to_tokens([label for label in row.labels if label != IGNORED])
    assert tuple(learned) == ("B", *(family.end or (family.eos,)))
    prompt = tokenizer.decode(ids)
    assert "질문 A?" in prompt and prompt.endswith(family.prompt_end)
    if family.bos:
        most = prompt.count(family.bos) if tokenizer.chat_template and family.bos in tokenizer.chat_template else 1
        assert ids.count(tokenizer.bos_token_id) <= most and ids[:2] != [tokenizer.bos_token_id] * 2
    (plain,) = encode_prompts(tokenizer, [Example("질문 A?", "B", chat=False)])
    assert plain == tokenizer("질문 A?").input_ids
    assert tokenizer.convert_ids_to_tokens(plain)[: len(family.start)] == list(family.start)


def test_a_cap_of_scores_is_kept_where_transformers_would_drop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 says that Gemma 2 has sdpa, which knows no cap."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    base = BaseModelConfig(model=build_family(FAMILIES["Gemma 2"], tmp_path / "base"))
    assert load_base(base, load_tokenizer(base)).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_trains_stacks_exports_and_answers(name: str, data: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = BaseModelConfig(model=build_family(family, tmp_path / "base"))
    notes: list[str] = []
    changes = {"max_steps": 2, "checkpoint_every_steps": 2, "max_tokens": 1000, "validation": None}
    config = configure(base.model, data, p00=changes, p02=changes)
    run_all(config, tmp_path / "run", ("00",), lambda event: notes.append(event.get("text", "")))
    chain = [Link(name="00", folder=str(RunFolder(tmp_path / "run").phase("00").adapter))]
    stack = config.model_copy(update={"start": (), "phases": (config.phases[0], config.phases[2])})
    run_all(stack, tmp_path / "run", ("02",), lambda event: notes.append(event.get("text", "")))
    chain.append(Link(name="02", folder=str(RunFolder(tmp_path / "run").phase("02").adapter)))
    assert ("flat batches, no padding" in notes) != family.padded
    export_chain([link.folder for link in chain], tmp_path / "one")
    compare_export(base, chain, tmp_path / "one")
    compare_merged(base, chain, tmp_path / "merged")
    questions = [*read(SourceConfig(source=str(data / "dev.jsonl")))][:3]
    for settings in ({"scoring": "letter"}, {"scoring": "generate", "style": "kormedmcqa"}):
        evaluation = EvaluationConfig.model_validate(
            {"tests": [{"name": "dev", "source": str(data / "dev.jsonl")}], "max_tokens": 8, **settings}
        )
        stages = StageModel(base, {"base": [], "02": chain}, evaluation, letters="ABCDE")
        answers = stages.answer(["dev"] * len(questions), questions)
        alone = [answer for each in questions for answer in stages.answer(["dev"], [each])]
        assert len(answers) == 6
        assert {(a.stage, a.id): a.text for a in answers} == {(a.stage, a.id): a.text for a in alone}
        for one in alone:
            (beside,) = [each for each in answers if (each.stage, each.id) == (one.stage, one.id)]
            assert beside.probabilities == pytest.approx(one.probabilities, abs=1e-4)


def compare_export(base: BaseModelConfig, chain: list[Link], one: Path) -> None:
    """The chain and the one adapter that it was exported to give the same logits."""
    tokenizer = load_tokenizer(base, one)
    ids = torch.tensor([tokenizer.encode("질문: 아스피린 고혈압증 answer:", add_special_tokens=False)])
    with torch.no_grad():
        model = load_base(base, tokenizer)
        plain = model(ids).logits
        names = [link.name for link in chain]
        model = load_chain(model, [*((link.name, link.folder) for link in chain), ("one", one)]).eval()
        activate(model, names)
        whole = model(ids).logits
        activate(model, ["one"])
        joined = model(ids).logits
    torch.testing.assert_close(whole, joined, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, plain, atol=1e-4)


def compare_merged(base: BaseModelConfig, chain: list[Link], out: Path) -> None:
    """The chain and the model that it was merged into give the same logits, and end an answer at the same tokens."""
    out.mkdir()
    write_export(Export(base, chain, "merged", "float32"), out)
    check_base(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer.encode("질문: 아스피린 고혈압증 answer:", add_special_tokens=False)])
    with torch.no_grad():
        model = load_base(base, tokenizer)
        stops = stop_token_ids(tokenizer, model)
        whole = load_chain(model, [(link.name, link.folder) for link in chain]).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        torch.testing.assert_close(merged(ids).logits, whole, atol=1e-4, rtol=1e-4)
    found = merged.generation_config.eos_token_id
    assert sorted(found if isinstance(found, list) else [found]) == stops


@pytest.mark.parametrize("name", ["Phi-3", "Llama 3", "Gemma 4", "gpt-oss"])
def test_an_answer_ends_where_its_turn_does(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = BaseModelConfig(model=build_family(family, tmp_path))
    tokenizer: Any = load_tokenizer(base)
    model = load_base(base, tokenizer)
    words = {*family.stops, *(family.end or (family.eos,)), family.eos}
    assert stop_token_ids(tokenizer, model) == sorted(tokenizer.convert_tokens_to_ids(word) for word in words)
