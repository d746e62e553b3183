"""Edits in the text of a config: keys are replaced and removed where they are, and every other line and comment stays."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from medlora.errors import InputError

_ALIAS = re.compile(r"(:\s+)\*\w+")
_COMMENT = re.compile(r"\s+#.*$")


class ConfigText:
    """The text of a config written in block style, as the shipped ones are; keys are named as in `--set`."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"

    def has(self, path: Sequence[str]) -> bool:
        """Whether the text has that key, or a list item of that name."""
        return self._find(path) is not None

    def put(self, path: Sequence[str], value: object) -> None:
        """Give a key another value; a list of mappings gets a line an item. A comment behind a single value stays.

        A key that is not there is added as the last one of its parent. Raises InputError where there is no such parent.
        """
        found = self._find(path)
        if found is None:
            line, column = self._find_end_of_parent(path)
            self.lines[line:line] = _write(path[-1], value, column)
            return
        line, column = found
        end = self._find_end(line, column)
        comment = _COMMENT.search(self.lines[line])
        written = _write(path[-1], value, column)
        if comment and end == line + 1 and len(written) == 1:
            written[0] = f"{written[0]:<{comment.start()}}{comment[0]}"
        self.lines[line:end] = written

    def drop(self, path: Sequence[str]) -> None:
        """Remove a key or a list item with all that is in it; nothing where it is not there."""
        found = self._find(path)
        if found is not None:
            line, column = found
            if self.lines[line].lstrip().startswith("- ") and not self.lines[line][:column].strip():
                column = len(self.lines[line]) - len(self.lines[line].lstrip())
            end = self._find_end(line, column)
            while end < len(self.lines) and not self.lines[end].strip():
                end += 1
            del self.lines[line:end]

    def _find(self, path: Sequence[str]) -> tuple[int, int] | None:
        """The line and column where a key or a list item begins."""
        # An alias may be without its anchor between two edits; what it means matters to no key's place.
        text = _ALIAS.sub(r"\1alias", "\n".join(self.lines))
        node: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
        place: tuple[int, int] | None = None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pair = next(((key, value) for key, value in node.value if key.value == part), None)
                if pair is None:
                    return None
                place, node = (pair[0].start_mark.line, pair[0].start_mark.column), pair[1]
            elif isinstance(node, yaml.SequenceNode):
                node = next((item for item in node.value if _name(item) == part), None)
                if node is None:
                    return None
                place = (node.start_mark.line, node.start_mark.column - 2)
            else:
                return None
        return place

    def _find_end(self, line: int, column: int) -> int:
        """The first line behind what begins at this place; comments and blank lines before the next key are not part of it."""
        end = line + 1
        for at in range(line + 1, len(self.lines)):
            text = self.lines[at]
            if not text.strip() or text.lstrip().startswith("#"):
                continue
            if len(text) - len(text.lstrip()) <= column:
                break
            end = at + 1
        return end

    def _find_end_of_parent(self, path: Sequence[str]) -> tuple[int, int]:
        if len(path) == 1:
            return len(self.lines), 0
        parent = self._find(path[:-1])
        if parent is None:
            raise InputError(f"{'.'.join(path[:-1])}: the config has no such section")
        line, column = parent
        return self._find_end(line, column), column + 2


def _name(item: yaml.Node) -> str | None:
    pairs = item.value if isinstance(item, yaml.MappingNode) else ()
    return next((str(value.value) for key, value in pairs if key.value == "name"), None)


def _write(key: str, value: object, column: int) -> list[str]:
    indent = " " * column
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [f"{indent}{key}:", *(f"{indent}  - {_flow(item)}" for item in value)]
    return [f"{indent}{key}: {_flow(value)}"]


def _flow(value: object) -> str:
    """A value on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return (
            value
            if re.fullmatch(r"[A-Za-z0-9_./-]*[A-Za-z_/][\w./-]*|0\d", value)
            else yaml.dump(value, default_style='"', allow_unicode=True, width=10**6).strip()
        )
    return str(value)
