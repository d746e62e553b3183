"""The tests of a run as tasks of lm-evaluation-harness, for a model that was exported.

Its command then asks the same questions with the same prompts, token for token, and knows nothing of medlora. A task is a
YAML file and JSON lines beside it. `medlora compare` reads what the harness writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medlora.answering.answerer import find_letter_ids
from medlora.config.base import McqStyle
from medlora.config.run import RunConfig
from medlora.errors import InputError
from medlora.evaluation.questions import Asked, read_asked
from medlora.prompts import ANSWER_FIELD, Example, render_mcq
from medlora.records import LETTERS, McqRecord
from medlora.tokens.encode import encode_prompts, encode_texts, write_prompts
from medlora.tokens.tokenizer import Tokenizer

TAG = "medlora"
"""What all tasks of a folder are asked by: `--tasks medlora`."""


@dataclass(frozen=True)
class Tasks:
    """What was written, and what the harness must be told of the model's tokenizer."""

    names: tuple[str, ...]
    questions: int
    adds_bos: bool
    """Whether the harness's own tokenizing gives the ids of our prompts; if not, it needs `add_bos_token=False`."""

    def write_command(self, model: Path, folder: Path) -> str:
        """The command that asks the model in folder `model`."""
        arguments = f"pretrained={model},dtype=float32" + ("" if self.adds_bos else ",add_bos_token=False")
        return (
            f"lm_eval run --model hf --model_args {arguments} --include_path {folder} --tasks {TAG} "
            "--log_samples --output_path answers"
        )


def read_tests(config: RunConfig) -> Asked:
    """What the run's evaluation asks; raises InputError where the harness cannot ask it in the same way."""
    evaluation = config.evaluation
    if evaluation is None:
        raise InputError("--lm-eval: the run's config has no `evaluation`, so there are no tests to write")
    if evaluation.scoring != "letter" or evaluation.rotations:
        found = "rotations: true" if evaluation.rotations else f"scoring: {evaluation.scoring}"
        raise InputError(
            f"--lm-eval: the run is scored with evaluation.{found}, which the harness has no task for; "
            "it can ask as `scoring: letter` does. Export without --lm-eval"
        )
    return read_asked(evaluation, config.seed, config.data.max_bad_fraction)


def write_tasks(
    asked: Asked, style: McqStyle, tokenizer: Tokenizer, exported: Tokenizer, making: Path, out: Path
) -> Tasks:
    """Write a task for each test into the folder `making`, which will be `out`.

    `tokenizer` is the stage's; `exported`, as it is loaded from the exported folder, must give the same ids for the texts.
    Raises InputError where it gives others.
    """
    prompts = {name: _Prompts(style, tokenizer, asked, records) for name, records in asked.tests.items()}
    adds_bos = all(each.match(exported, add_special_tokens=True) for each in prompts.values())
    if not adds_bos and not all(each.match(exported, add_special_tokens=False) for each in prompts.values()):
        raise InputError(
            "--lm-eval: the exported tokenizer makes other tokens of the prompts' text than medlora shows; "
            "export without --lm-eval"
        )
    for name, records in asked.tests.items():
        lines = [_make_line(record, text) for record, text in zip(records, prompts[name].texts, strict=True)]
        (making / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        task = _make_task(name, str((out / f"{name}.jsonl").absolute()), prompts[name].space)
        (making / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return Tasks(tuple(asked.tests), asked.count, adds_bos)


class _Prompts:
    """The prompts of a test: the texts before the letter, and the ids that a stage is shown for them."""

    def __init__(self, style: McqStyle, tokenizer: Tokenizer, asked: Asked, records: Sequence[McqRecord]) -> None:
        examples: list[Example] = [render_mcq(record, style, asked.worked, asked.shots) for record in records]
        lead = ANSWER_FIELD if style in ("reasoning", "reasoning_full") else ""
        self.space = " " if style == "kormedmcqa" else ""
        self.texts = [text + lead for text in write_prompts(tokenizer, examples)]
        (ids,) = encode_texts(tokenizer, [lead]) if lead else ([],)
        self.ids = [[*prompt, *ids] for prompt in encode_prompts(tokenizer, examples)]
        self.letters = [find_letter_ids(tokenizer, style, record.letters) for record in records]

    def match(self, exported: Any, add_special_tokens: bool) -> bool:
        """Whether a tokenizer gives these ids for the whole texts, each with its first and last letter behind it."""
        for text, ids, letters in zip(self.texts, self.ids, self.letters, strict=True):
            for number in (0, len(letters) - 1):
                whole = exported(f"{text}{self.space}{LETTERS[number]}", add_special_tokens=add_special_tokens)
                # A tokenizer may keep the space before a letter apart.
                *before, last = whole.input_ids
                if before[: len(ids)] != ids or len(before) - len(ids) > len(self.space) or last != letters[number]:
                    return False
        return True


def _make_line(record: McqRecord, prompt: str) -> str:
    """A question in columns that `medlora compare` reads again, with what the harness asks."""
    row: dict[str, object] = {"id": record.id, "subject": record.subject, "question": record.question}
    row |= {"options": list(record.options), "answer": record.answer, "prompt": prompt}
    row |= {"letters": list(record.letters), "target": record.letters.index(record.answer)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _make_task(name: str, file: str, space: str) -> dict[str, object]:
    return {
        "task": name,
        "tag": TAG,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "letters",
        "doc_to_target": "target",
        "target_delimiter": space,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
