"""The options of a question out of the one column that holds them all: lists, mappings, pairs, JSON or Python as text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from medlora.bounds import clean, list_names, name_type
from medlora.data.rows.option_marks import read_answer, read_mark
from medlora.records import LETTERS, RecordError

_LABELS = ("label", "labels", "letter", "key", "id", "no", "number", "번호")


_TEXTS = ("text", "texts", "content", "value", "option", "choice", "내용", "보기")


_MAX_CHARS, _MAX_OPENED = 500_000, 200
"""A text with more is no list of options; literal_eval would build what it describes."""


_STRING = re.compile(r"'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\"", re.S)


_ARRAY = re.compile(r"\barray\((\[[^\[\]]*\])(?:,\s*dtype=[^()\[\]]{1,20})?\)")
"""How pandas writes numpy arrays inside a mapping."""


EXAMPLES = {
    "_STRING": (r"['it\'s']", "[1, 2]"),
    "_ARRAY": ("array(['a', 'b'], dtype=object)", "subarray(['a', 'b'])"),
}
"""A text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def list_options(found: Any, name: str) -> tuple[tuple[object, ...], int | None]:
    """The options in order, and the number of the first one where they are keyed by numbers.

    Raises RecordError, which names the column, for what is no list of options or has more than one meaning.
    """
    if isinstance(found, str):
        found = _parse_text(found, name)
    if isinstance(found, Mapping):
        labels, texts = _get(found, _LABELS), _get(found, _TEXTS)
        if _is_list(labels) and _is_list(texts):
            if len(labels) != len(texts):
                raise RecordError(f"`{name}` has {len(labels)} labels and {len(texts)} texts", "wrong letters")
            return _order(list(zip(labels, texts, strict=True)), name)
        # parquet and the hub fill up what other rows have
        return _order([(label, text) for label, text in found.items() if text is not None], name)
    if not _is_list(found):
        raise RecordError(f"`{name}` must be a list or a mapping, found {name_type(found)}", "wrong type")
    found = list(found)
    if found and all(isinstance(part, Mapping) for part in found):
        pairs = [(_get(part, _LABELS), _get(part, _TEXTS)) for part in found]
        if any(text is None for _, text in pairs):
            raise RecordError(f"`{name}` has parts without a text (columns {list_names(found[0])})", "wrong type")
        return (tuple(text for _, text in pairs), None) if all(p[0] is None for p in pairs) else _order(pairs, name)
    if found and all(_is_list(part) and len(part) == 2 for part in found):
        return _order([(part[0], part[1]) for part in found if part[1] is not None], name)
    return tuple(found), None


def _get(found: Mapping[object, Any], keys: Sequence[str]) -> Any:
    return next((found[key] for key in keys if key in found), None)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _order(pairs: Sequence[tuple[object, object]], name: str) -> tuple[tuple[object, ...], int | None]:
    """Texts in the order of their labels: A, B, ...; 1, 2, ...; 0, 1, ...; ①, 가 and their like."""
    shown = list_names(label for label, _ in pairs)
    places = [_read_label(label) for label, _ in pairs]
    if None in places or len({family for family, _ in filter(None, places)}) > 1:
        raise RecordError(f"`{name}` has the letters {shown}, not A, B, ... or 1, 2, ... in a row", "wrong letters")
    numbers = [place for _, place in filter(None, places)]
    if len(set(numbers)) < len(numbers):
        raise RecordError(f"`{name}` has a letter twice ({shown})", "wrong letters")
    first = 0 if places and places[0] and places[0][0] == "number" and 0 in numbers else 1
    if sorted(numbers) != list(range(first, first + len(numbers))):
        raise RecordError(f"`{name}` has the letters {shown}, not A, B, ... or 1, 2, ... in a row", "wrong letters")
    ordered = [text for _, text in sorted(zip(numbers, (text for _, text in pairs), strict=True), key=lambda p: p[0])]
    return tuple(ordered), first if places and places[0] and places[0][0] == "number" else None


def _read_label(label: object) -> tuple[str, int] | None:
    text = re.sub(r"(?i)^\s*(?:option|choice|opt|보기|선택지|선지)\s*_?\s*", "", str(label)).strip()
    if re.fullmatch(r"10|[0-9]", text):
        return "number", int(text)
    mark = read_answer(text)
    if mark is None or mark.rest:
        return None
    return "number" if mark.family in ("digit", "(digit)", "numbered") else mark.family.strip("()"), mark.place


def _parse_text(text: str, name: str) -> object:
    """A text as the list or mapping that it spells: JSON, Python, or lines that begin with marks."""
    bare = text.strip()
    if bare[:1] in ("[", "{", "("):
        if len(bare) > _MAX_CHARS or sum(map(bare.count, "[{(")) > _MAX_OPENED:
            raise RecordError(
                f"`{name}` is a text of {len(bare):,} characters, which is no list of options", "wrong type"
            )
        try:
            return json.loads(bare)
        except (ValueError, RecursionError):
            pass
        if (parsed := _parse_python(bare, name)) is not None:
            return parsed
    if (marked := _split_marked(bare)) is not None:
        return marked
    raise RecordError(
        f"`{name}` must be a list or a mapping, found a text ({clean(bare, 60)}); write a list, JSON, or a line for each "
        "option with its mark: ① ..., A. ...",
        "wrong type",
    )


def _parse_python(text: str, name: str) -> object:
    plain = _ARRAY.sub(r"\1", text)
    try:
        parsed = ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    if isinstance(parsed, set):
        raise RecordError(f"`{name}` is a set, which has no order; write a list", "wrong type")
    if not isinstance(parsed, list | tuple | dict):
        return None
    if len(_STRING.findall(plain)) != _count_texts(parsed):
        # numpy prints ['a' 'b'], which Python joins into one text
        raise RecordError(f"`{name}` has texts side by side without commas; write a list", "wrong type")
    return parsed


def _count_texts(value: object) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return sum(map(_count_texts, [*value, *value.values()]))
    return sum(map(_count_texts, value)) if isinstance(value, list | tuple) else 0


def _split_marked(text: str) -> dict[str, str] | None:
    """Options in lines of their own, or one behind another, each behind its mark; None where there are none."""
    lines = [line for line in text.splitlines() if line.strip()]
    marks = [read_mark(line) for line in lines]
    if len(lines) < 2:
        parts = [part for part in re.split(r"(?=[①-⑩])|(?=(?<!\S)\([1-9A-J]\)\s)", text) if part.strip()]
        marks = [read_mark(part) for part in parts]
    found = [mark for mark in marks if mark and mark.rest]
    if len(found) < 2 or len(found) < len(marks) or len({mark.family for mark in found}) > 1:
        return None
    if [mark.place for mark in found] != list(range(1, len(found) + 1)) or len(found) > len(LETTERS):
        raise RecordError(
            f"the marks of the options are {', '.join(str(mark.place) for mark in found)}, not 1, 2, ... in a row",
            "mark and place disagree",
        )
    return {LETTERS[mark.place - 1]: mark.rest for mark in found}
