"""Tables, JSON, tags and boxes in a model's output -> plain lines such as `answer: B`, which `text.normalise` reads on.

A structure that names several answers becomes nothing: which of them was meant is not ours to choose.
"""

from __future__ import annotations

import re

_KEYS = (
    r"(?:최종[ _]?)?(?:정답|답안?|답변|선택|선택지)(?:[ _]?번호)?|(?:final|correct|best|selected|chosen|predicted)?"
    r"[ _]?(?:answer|choice|option|letter)(?:[ _]?(?:letter|choice|index|key))?|prediction|predicted"
)


_VALUE = r"\"(?P<text>[^\"\n]{0,80})\"|'(?P<single>[^'\n]{0,80})'|(?P<number>\d{1,2})(?=\s*[,}\n])"


_JSON = re.compile(rf"[\"'](?:{_KEYS})[\"']\s*:\s*(?:{_VALUE})\s*,?", re.I)


_QUESTION_KEY = re.compile(
    r"[\"'](?:id|no|number|num|question\w*|q_?\d+|문제\w*|문항\w*|번호)[\"']\s*:|[\"']q?\d+[\"']\s*:", re.I
)


_JUDGED = re.compile(
    r"[\"']([A-J])[\"']\s*:\s*[\"']?(true|false|정답|오답|맞음|틀림|correct|incorrect|wrong|O|X)[\"']?(?=\s*[,}\n])",
    re.I,
)


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


_TAGGED = re.compile(
    r"</?(?:answer|정답|답|final_answer|final|choice|correct_answer|option|선택|result|output|response)>(?![^<\n]*</?think)",
    re.I,
)


_RULE_LINE = re.compile(r"\s*\|?(?:\s*:?-{2,}:?\s*\|)+\s*(?::?-{2,}:?)?\s*")


_OPTION_CELL = re.compile(
    r"[\W_]*(?:(?:option|choice|선택지|보기)\s*)?[(\[]?([A-Ja-j]|[①-⑩㉠-㉣㉮-㉱]|10|[1-9])(?![A-Za-z0-9])(?:번|[)\].:]|\s|\Z)",
    re.I,
)


_RIGHT_CELL = re.compile(
    r"[\W_]*(?:정답|맞음|맞다|옳음|옳다|적절(?:함|하다)?|가장 적절.*|해당(?:함)?|O|○|◯|⭕|✅|✓|✔|☑|correct|yes|true|right|best"
    r"|(?:the )?(?:best|correct) (?:answer|choice|option))[\W_]*",
    re.I,
)


_TICK = re.compile("[⭕✅✓✔☑]")


_ANSWER_HEAD = re.compile(r"[\W_]*(?:최종\s*)?(?:정답|답|answer|final answer|choice)[\W_]*", re.I)


EXAMPLES = {
    "_JSON": ('{"answer": "B"}', '{"reason": "B"}'),
    "_QUESTION_KEY": ('{"id": 3}', '{"idea": 3}'),
    "_JUDGED": ('{"A": true}', '{"A": "폐렴"}'),
    "_BOXED": (r"\boxed{B}", r"\text{B}"),
    "_TAGGED": ("<answer>B</answer>", "<answers>B</answers>"),
    "_RULE_LINE": ("|---|:---:|", "| - | B |"),
    "_OPTION_CELL": ("(B) 폐렴", "BCG"),
    "_RIGHT_CELL": ("**정답**", "정답 아님"),
    "_TICK": ("✅ 폐렴", "❌ 폐렴"),
    "_ANSWER_HEAD": ("**정답**", "정답률"),
}
"""A text that each pattern must read, and one that it must not; tests/test_patterns.py tries both."""


def flatten(text: str) -> str:
    """Text with its tables, JSON answers, answer tags and LaTeX boxes written as lines of their own."""
    text = _flatten_json(_flatten_tables(text))
    for _ in range(2):
        text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|textrm|bf)\s*\{([^{}]*)\}", r"\1", text)
    text = _BOXED.sub(r"\nanswer: \1\n", text)
    text = re.sub(r"<answer\s[^>\n]*=\s*[\"']([^\"'\n]{1,40})[\"']\s*/>", r"\nanswer: \1\n", text, flags=re.I)
    return _TAGGED.sub("\nanswer:\n", text).removesuffix("\nanswer:\n")


def _flatten_json(text: str) -> str:
    judged = _JUDGED.findall(text)
    true = [
        letter for letter, value in judged if value.lower() not in ("false", "x", "오답", "wrong", "incorrect", "틀림")
    ]
    if len(judged) > 1 and len(true) == 1 and not _JSON.search(text):
        return f"{text[: text.index('{')]}\nanswer: {true[0]}\n"
    found = list(_JSON.finditer(text))
    values = {(match["text"] or match["single"] or match["number"] or "").strip() for match in found}
    several = len(found) > 1 and (len(values) > 1 or _QUESTION_KEY.search(text))
    return _JSON.sub("\n", text) if several else _JSON.sub(_write_field, text)


def _write_field(match: re.Match[str]) -> str:
    return f"\nanswer: {(match['text'] or match['single'] or match['number'] or '').strip()}\n"


def _flatten_tables(text: str) -> str:
    """Text in which each table is one `answer:` line, where it gives one answer, and gone otherwise."""
    written: list[str] = []
    table: list[list[str]] = []
    for line in [*text.split("\n"), None]:
        cells = _split_cells(line) if line is not None else None
        if cells is not None:
            table.append(cells)
            continue
        if table:
            written += _read_table(table)
            table = []
        if line is not None:
            written.append(line)
    return "\n".join(written)


def _split_cells(line: str) -> list[str] | None:
    if _RULE_LINE.fullmatch(line):
        return []
    bare = line.strip()
    if bare.count("|") < 1 or not (bare.startswith("|") or re.fullmatch(r"[^|]{1,40}\|[^|]{1,80}", bare)):
        return None
    if re.match(r"<\|", bare):
        return None
    return [cell.strip() for cell in bare.strip("|").split("|")]


def _read_table(table: list[list[str]]) -> list[str]:
    rows = [cells for cells in table if cells]
    if not rows:
        return []
    for column, head in enumerate(rows[0]):
        below = [cells[column] for cells in rows[1:] if column < len(cells)]
        if _ANSWER_HEAD.fullmatch(head) and len(below) == 1 and _OPTION_CELL.match(below[0]):
            return ["", f"answer: {below[0]}", ""]
    named = [cells[1] for cells in rows if len(cells) == 2 and _ANSWER_HEAD.fullmatch(cells[0])]
    if len(named) == 1:
        return ["", f"answer: {named[0]}", ""]
    right = [cells[0] for cells in rows if _is_right(cells)]
    if len(right) == 1 and (option := _OPTION_CELL.match(right[0])):
        letter = option[1]
        return ["", f"answer: {letter}번" if letter.isascii() and letter.isdigit() else f"answer: {letter}", ""]
    return ["", ""]


def _is_right(cells: list[str]) -> bool:
    return bool(_OPTION_CELL.match(cells[0])) and any(
        _RIGHT_CELL.fullmatch(cell) or _TICK.search(cell) for cell in cells[1:]
    )
