"""Every pattern that reads answers and options finds its one example, and leaves the other alone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest

from medlora.data.rows import exam_columns, option_lists, option_marks
from medlora.evaluation import answers
from medlora.evaluation.answers.denials import DENIALS
from medlora.evaluation.answers.rules import RULES
from medlora.evaluation.answers.text import mark_options

_ANSWERS = [
    importlib.import_module(found.name)
    for found in pkgutil.iter_modules(answers.__path__, "medlora.evaluation.answers.")
]
MODULES = [*_ANSWERS, option_marks, exam_columns, option_lists]
_PAIRED = {id(each.pattern) for each in (*RULES, *DENIALS)}
"""Their examples are in their own rows, and tests/evaluation/test_answers.py tries them."""


def _find_patterns(module: ModuleType) -> dict[str, re.Pattern[str]]:
    return {name: each for name, each in vars(module).items() if isinstance(each, re.Pattern)}


def _prepare(pattern: re.Pattern[str], text: str) -> str:
    """Patterns with option characters are used behind the step that writes them, others before it."""
    return mark_options(text) if re.search(r"[\ue000-\ue6ff]|\\ue", pattern.pattern) else text


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_pattern_reads_its_example_and_leaves_the_other(module: ModuleType) -> None:
    source, patterns, wrong = inspect.getsource(module), _find_patterns(module), []
    for name, (reads, leaves) in getattr(module, "EXAMPLES", {}).items():
        pattern = patterns[name]
        way = next((way for way in ("fullmatch", "match") if f"{name}.{way}(" in source), "search")
        find = getattr(pattern, way)  # as its module uses it
        if not find(_prepare(pattern, reads)) or find(_prepare(pattern, leaves)):
            wrong.append((name, way))
    assert wrong == []


def test_no_pattern_is_without_examples() -> None:
    shown = {id(_find_patterns(module)[name]) for module in MODULES for name in getattr(module, "EXAMPLES", {})}
    found = {
        f"{module.__name__}.{name}": id(each) for module in MODULES for name, each in _find_patterns(module).items()
    }
    assert [name for name, each in found.items() if each not in shown | _PAIRED] == [] and len(found) > 60
