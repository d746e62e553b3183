"""What pydantic finds wrong with a config, in our words: what is allowed at a key, and what was found there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

_NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "none": "nothing (null)",
    "tuple": "a list",
    "list": "a list",
    "set": "a list",
    "dict": "a mapping of keys to values",
    "mapping": "a mapping of keys to values",
    "model": "a mapping of keys to values",
    "dataclass": "a mapping of keys to values",
    "path": "a path",
}
"""By the beginning of pydantic's name for an error (`int_parsing`, `tuple_type`)."""


_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def describe_problem(problems: Sequence[Mapping[str, object]]) -> str:
    """What is allowed at a key, by all of pydantic's errors for it (a union complains once for each of its kinds)."""
    wanted = list(dict.fromkeys(_describe_wanted(problem) for problem in problems))
    found = show_value(problems[0]["input"])
    text = " or ".join(wanted)
    hint = ""
    if wanted == ["text"] and isinstance(problems[0]["input"], int | float):
        hint = '; put it in quotes: "..."'
    return f"must be {text}, found {found}{hint}"


def show_value(value: object) -> str:
    """A value as a message shows it: as JSON writes it, cut where it is long."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _describe_wanted(problem: Mapping[str, Any]) -> str:
    kind, context = str(problem["type"]), problem.get("ctx") or {}
    bound = next((context[name] for name in ("gt", "ge", "lt", "le") if name in context), None)
    if kind in _BOUNDS:
        return f"{_BOUNDS[kind]} {bound:g}" if isinstance(bound, int | float) else f"{_BOUNDS[kind]} {bound}"
    if kind == "literal_error":
        return re.sub(r"'([^']*)'", r"\1", str(context["expected"]))
    if kind == "string_pattern_mismatch":
        if context.get("pattern") == _NAME_PATTERN:
            return "a name of letters, digits, `_` and `-`, at most 64 of them, the first a letter or digit"
        return f"text of the form {context.get('pattern')}"
    if kind in ("too_short", "too_long"):
        number = context.get("min_length", context.get("max_length"))
        return f"a list of {'at least' if kind == 'too_short' else 'at most'} {number} item{'s' * (number != 1)}"
    if kind in ("string_too_short", "string_too_long"):
        number = context.get("min_length", context.get("max_length"))
        return f"text of {'at least' if 'short' in kind else 'at most'} {number} character{'s' * (number != 1)}"
    if kind in ("union_tag_invalid", "enum"):
        return f"one of {context.get('expected_tags', context.get('expected'))}"
    words = next((words for begin, words in _WORDS.items() if kind.startswith(begin)), None)
    return words or re.sub(r"^(Input|Value|String|List|Tuple) should (be|have)\s+", "", str(problem["msg"]))


_BRANCH = re.compile(r"bool|int|float|str|none|dict|list|tuple|[A-Z][a-z]+(?:[A-Z][a-z]+)+")


def is_key(part: int | str) -> bool:
    """Whether a part of pydantic's location is in the file; the branch names of unions (`literal[...]`) are not."""
    return isinstance(part, int) or (re.fullmatch(r"[A-Za-z0-9_-]+", part) is not None and not _BRANCH.fullmatch(part))


def name_key(location: Sequence[int | str]) -> str:
    """The dotted key of one of pydantic's locations."""
    return ".".join(str(part) for part in location if is_key(part))


def keys_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys that the section at `path` knows; empty where it is no section."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return []
        current = _section_of(current.model_fields[part].annotation)
    return list(current.model_fields) if current else []


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _section_of(argument):
            return found
    return None
