"""Where the keys of a config are in its YAML file, and keys that appear there twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import yaml


def name_item(item: Mapping[str, object]) -> object:
    """What an item of a list is called: its name, the phase that a replay repeats, the last part of where a source is."""
    for key in ("name", "phase"):
        if key in item:
            return item[key]
    return re.split(r"[:/|]", str(item["source"]))[-1].partition(".")[0] if "source" in item else None


KeyPath = tuple[int | str, ...]
"""The parts of a dotted key, positions in lists as numbers."""


def refuse_twice(root: yaml.Node | None) -> None:
    """Raise yaml.YAMLError where one mapping has a key twice: the first value would be lost without a word."""
    for node in _walk(root):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                where = f"in lines {lines[name]} and {line}" if lines[name] != line else f"twice in line {line}"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value[:100]!r} appears {where} of one mapping; remove one of the two",
                    problem_mark=key.start_mark,
                )
            lines[name] = line


def _walk(root: yaml.Node | None) -> Iterator[yaml.Node]:
    seen: set[int] = set()
    nodes = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            nodes += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in reversed(node.value) for part in reversed(pair)]


def find_lines(root: yaml.Node | None) -> dict[KeyPath, int]:
    """The line of every key and item of a YAML file."""
    lines: dict[KeyPath, int] = {}

    def visit(node: object, path: KeyPath, depth: int) -> None:
        if depth > 20:
            return
        if isinstance(node, yaml.SequenceNode):
            pairs: Iterable[tuple[int | str, yaml.Node, yaml.Node]] = (
                (i, part, part) for i, part in enumerate(node.value)
            )
        elif isinstance(node, yaml.MappingNode):
            pairs = ((key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
        else:
            return
        for name, key, value in pairs:
            lines[(*path, name)] = key.start_mark.line + 1
            visit(value, (*path, name), depth + 1)

    visit(root, (), 0)
    return lines


class Places:
    """Where the keys of a config are: in its file, in `phase_defaults`, or on the command line."""

    def __init__(
        self, text: str, raw: Mapping[str, object], overrides: Iterable[str], loader: type[yaml.SafeLoader]
    ) -> None:
        self._raw = raw
        self._set = {override.partition("=")[0].strip() for override in overrides}
        try:
            self._lines = find_lines(yaml.compose(text, loader))
        except (yaml.YAMLError, RecursionError):
            self._lines = {}

    def describe(self, message: str) -> str:
        """A message that begins with a dotted key, behind its place and behind the key by names: `line 7 (phases.01.chain)`."""
        dotted = re.match(r"[A-Za-z0-9_.-]+(?=[:,])", message)
        path: KeyPath = tuple(int(p) if p.isdecimal() else p for p in dotted[0].split(".")) if dotted else ()
        if not path:
            return message
        named = self._name(path)
        where = self._find(path, named)
        by_name = f" ({named})" if named != dotted[0] else ""  # type: ignore[index]
        return f"{where}{by_name}: {message}".lstrip() if where or by_name else message

    def _find(self, path: KeyPath, named: str) -> str:
        plain = ".".join(map(str, path))
        if self._set & {plain, named}:
            return "--set"
        line = self._lines.get(path)
        if line is None and path[0] == "phases":
            line = self._lines.get(("phase_defaults", *path[2:])) if len(path) > 2 else None
        for end in range(len(path) - 1, 0, -1):  # a key that is missing: where its section begins
            if line is None:
                line = self._lines.get(path[:end])
        return f"line {line}" if line else ""

    def _name(self, path: KeyPath) -> str:
        from medlora.config.loading.places import name_item

        node: object = self._raw
        names: list[str] = []
        for part in path:
            if isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
                called = name_item(node) if isinstance(node, dict) else None
                names.append(str(called) if isinstance(called, str | int) else str(part))
            else:
                node = node.get(part) if isinstance(node, dict) else None
                names.append(str(part))
        return ".".join(names)
