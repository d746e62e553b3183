"""Tokens of a source on disk: made once, the same as in memory, made again for what changes them and for nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from medlora import prompts
from medlora.config.model import BaseModelConfig
from medlora.config.sources import SourceConfig
from medlora.data.sources import read, scan, stream_piece
from medlora.model.tokenizer import load_tokenizer
from medlora.tokens import cache as cache_module
from medlora.tokens.cache import Preparation, TokenStore, finish, new_folder, plan_preparation, prepare, write_part
from medlora.tokens.rows import Rows, encode

WORDS = ["아스피린", "인슐린", "aspirin", "insulin", "해열", "췌장", "은", "어디"]


@pytest.fixture(scope="module")
def tokenizer(bases: dict[str, str]) -> Any:
    return load_tokenizer(BaseModelConfig(model=bases["gemma"]))


def write(path: Path, kind: str, n: int = 700) -> SourceConfig:
    """Records of one kind: more than a batch of them, of many lengths."""
    draw = random.Random(1)

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))

    make = {
        "text": lambda i: {"text": words()},
        "translation": lambda i: {"english": words(), "korean": words()},
        "mcq": lambda i: {"question": f"{words()} {i}?", "A": "해열", "B": "췌장", "answer": "A"},
    }[kind]
    path.write_text("".join(json.dumps(make(i), ensure_ascii=False) + "\n" for i in range(n)), encoding="utf-8")
    return SourceConfig(source=str(path))


def arrange(store: TokenStore, order: list[int], max_tokens: int) -> Rows:
    return Rows(store, store.lengths, store.prompts, store.texts, order, max_tokens, packing=True)


@pytest.mark.parametrize("kind", ["text", "translation", "mcq"])
def test_tokens_on_disk_make_the_rows_that_tokens_in_memory_make(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "rows.jsonl", kind)
    store = prepare(plan_preparation(source, "reasoning", tokenizer, tmp_path), tokenizer)
    records = read(source)
    places = list(range(len(records)))
    random.Random(3).shuffle(places)
    examples = [example for place in places for example in prompts.render(records[place])]
    for max_tokens in (100, 250):
        rows, lengths = encode(tokenizer, examples, max_tokens, packing=True)
        stored = arrange(store, store.order_examples(places), max_tokens)
        assert list(stored) == rows and stored.lengths == lengths and len(rows) > 50
        assert stored.sizes.tolist() == [len(row.input_ids) for row in rows]


def test_the_second_use_tokenises_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_preparation(write(tmp_path / "rows.jsonl", "text"), "reasoning", tokenizer, tmp_path)
    heard: list[tuple[int, int]] = []
    said: list[str] = []
    first = list(prepare(plan, tokenizer, lambda done, total: heard.append((done, total)), said.append))
    assert heard == [(256, 700), (512, 700), (700, 700)]
    assert said == [f"tokens of {tmp_path / 'rows.jsonl'} are made for the first time"]
    monkeypatch.setattr(cache_module, "tokenise", lambda *_: pytest.fail("tokenised again"))
    assert list(prepare(plan, tokenizer)) == first and len(first) == 700


def made_from(source: SourceConfig, tokenizer: Any, cache: Path, style: str = "reasoning") -> Preparation:
    return plan_preparation(source, style, tokenizer, cache)


def test_what_changes_the_tokens_makes_new_ones_and_says_why(
    bases: dict[str, str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    source = write(path, "mcq", 8)
    first = made_from(source, tokenizer, tmp_path)
    assert first.explain() == "for the first time"
    prepare(first, tokenizer)
    assert made_from(source, tokenizer, tmp_path).done

    assert not made_from(source, tokenizer, tmp_path, "answer").done
    other = made_from(source, load_tokenizer(BaseModelConfig(model=bases["llama"])), tmp_path)
    assert not other.done and "tokenizer: was" in other.explain() and ";" not in other.explain()
    longer = load_tokenizer(BaseModelConfig(model=bases["gemma"]), extra_tokens=["고혈압증"])
    assert not made_from(source, longer, tmp_path).done
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "version", lambda: "changed")
        assert 'prompts: was "' in made_from(source, tokenizer, tmp_path).explain()
    write(path, "mcq", 9)
    changed = made_from(source, tokenizer, tmp_path)
    assert not changed.done and "records: was" in changed.explain()


def test_two_phases_with_two_styles_keep_both_in_the_cache(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", "mcq", 8)
    styles = ("answer", "reasoning", "kormedmcqa")
    said: list[str] = []
    made = {
        style: list(prepare(made_from(source, tokenizer, tmp_path, style), tokenizer, note=said.append))
        for style in styles
    }
    assert len({str(tokens) for tokens in made.values()}) == 3
    assert all(text.endswith("for the first time") for text in said) and len(said) == 3
    monkeypatch.setattr(cache_module, "tokenise", lambda *_: pytest.fail("tokenised again"))
    for style in (*styles, *reversed(styles)):
        plan = made_from(source, tokenizer, tmp_path, style)
        assert plan.done and list(prepare(plan, tokenizer, note=said.append)) == made[style]
    assert len(said) == 3


def test_changed_records_are_a_reason_in_each_style(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    source = write(path, "mcq", 8)
    for style in ("answer", "reasoning"):
        prepare(made_from(source, tokenizer, tmp_path, style), tokenizer)
    write(path, "mcq", 9)
    for style in ("answer", "reasoning"):
        why = made_from(source, tokenizer, tmp_path, style).explain()
        assert "records: was" in why and "style" not in why


def test_a_text_knows_no_style(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", "text", 3)
    assert made_from(source, tokenizer, tmp_path).folder == made_from(source, tokenizer, tmp_path, "answer").folder


def test_torn_tokens_are_made_again(tokenizer: Any, tmp_path: Path) -> None:
    plan = plan_preparation(write(tmp_path / "rows.jsonl", "text", 30), "reasoning", tokenizer, tmp_path)
    whole = list(prepare(plan, tokenizer))
    (part,) = plan.folder.glob("part-*.arrow")
    part.write_bytes(part.read_bytes()[:-100])
    assert not plan.done
    assert list(prepare(plan, tokenizer)) == whole and plan.done
    assert [path.name for path in plan.folder.parent.iterdir()] == [plan.folder.name]


def test_parts_in_any_number_hold_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", "translation", 100)
    found = scan(source)
    whole = prepare(plan_preparation(source, "reasoning", tokenizer, tmp_path / "one"), tokenizer)
    plan = plan_preparation(source, "reasoning", tokenizer, tmp_path / "many")
    with new_folder(plan) as folder:
        for n, start in enumerate(range(0, 100, 30)):
            piece = stream_piece(source, found, str(tmp_path / "rows.jsonl"), start, min(start + 30, 100))
            write_part(folder / f"part-{n:05}.arrow", piece, "reasoning", tokenizer)
        finish(plan, folder)
    parts = TokenStore(plan.folder)
    assert list(parts) == list(whole) and len(parts) == 200
    assert parts.order_examples([99, 0]) == [198, 199, 0, 1]


def test_dropped_records_are_left_out_by_id(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", "translation", 10)
    store = prepare(plan_preparation(source, "reasoning", tokenizer, tmp_path), tokenizer)
    assert store.find_included([]) == list(range(10))
    assert store.find_included(["rows.jsonl-1", "rows.jsonl-4", "no such"]) == [1, 2, 4, 5, 6, 7, 8, 9]


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file")
    plan = plan_preparation(write(tmp_path / "rows.jsonl", "text", 3), "reasoning", tokenizer, tmp_path)
    with pytest.raises(cache_module.InputError, match="storage.cache: .*tokens cannot be made"):
        prepare(plan, tokenizer)
