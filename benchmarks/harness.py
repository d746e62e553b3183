"""The task `kormedmcqa` of lm-evaluation-harness, as its own files have it, on local rows."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

LETTERS = "ABCDE"


class _Yaml(yaml.SafeLoader):
    """The task file names its extraction function with a tag."""


_Yaml.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def find_task_folder() -> Path:
    """Where the installed lm_eval keeps the task."""
    (package,) = importlib.util.find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(package) / "tasks" / "kormedmcqa"


def load_extraction() -> Any:
    """The task's own function from text to letter."""
    spec = importlib.util.spec_from_file_location("kormedmcqa_utils", find_task_folder() / "utils.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.extract_choice


def write_tasks(
    folder: Path, test: Sequence[str], few_shot: Sequence[str], max_gen_toks: int, letters: str = LETTERS
) -> Any:
    """A TaskManager that knows `local_generate`, the harness's task, and by log-likelihood `local_letters`, `local_texts`.

    `test` and `few_shot` are rows of KorMedMCQA as JSON lines. Beside where they come from, only the most tokens differ
    from the task file; log-likelihood needs the choices and the answer's index beside it. With fewer `letters` than five
    the task shows as many options.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name, lines in (("test", test), ("fewshot", few_shot)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "utils.py").write_bytes((find_task_folder() / "utils.py").read_bytes())

    template = (find_task_folder() / "_template_yaml").read_text(encoding="utf-8")
    for letter in LETTERS[len(letters) :]:
        template = template.replace(f"\\n{letter}. {{{{{letter}}}}}", "")
    task = yaml.load(template, _Yaml)
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "fewshot")}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder)}}
    task["generation_kwargs"] |= {"max_gen_toks": max_gen_toks}
    scored = {key: value for key, value in task.items() if key not in ("filter_list", "generation_kwargs")}
    scored |= {"output_type": "multiple_choice", "doc_to_target": "{{answer-1}}"}
    scored |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    for name, made in (
        ("local_generate", task),
        ("local_letters", scored | {"doc_to_choice": list(letters)}),
        ("local_texts", scored | {"doc_to_choice": f"{{{{[{', '.join(letters)}]}}}}"}),
    ):
        text = yaml.safe_dump({**made, "task": name}, allow_unicode=True)
        text = re.sub(r"function: '?(utils\.\w+)'?", r"function: !function \1", text)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def ask(
    tasks: Any,
    model: Any,
    tokenizer: Any,
    task: str,
    shots: int,
    batch_size: int | str,
    max_length: int = 8192,
    clock: Callable[..., Callable[..., Any]] = lambda work, sign=1: work,
    max_batch_size: int = 64,
) -> list[dict[str, Any]]:
    """What `lm_eval.simple_evaluate` logs of each question, in their order.

    `clock` wraps the methods that answer requests, so that what is timed is the model and not the reading of the task.
    What the search for `auto` takes, from `max_batch_size` down, is taken off again: a long run pays it once.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        max_batch_size=max_batch_size,
    )
    backend._detect_batch_size = clock(backend._detect_batch_size, sign=-1)
    for name in ("loglikelihood", "generate_until"):
        setattr(backend, name, clock(getattr(backend, name)))
    result = simple_evaluate(
        model=backend,
        tasks=[task],
        task_manager=tasks,
        num_fewshot=shots,
        bootstrap_iters=0,
    )
    return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def read_log_likelihoods(sample: dict[str, Any]) -> list[float]:
    """Of the choices, in their order."""
    return [float(response[0][0]) for response in sample["resps"]]
