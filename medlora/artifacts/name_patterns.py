"""Regular expressions of adapter configs, matched in bounded time.

Python's `re` backtracks: a pattern of thirty characters can run for years, and nothing interrupts it. Here the
set of all places where a match can end is carried from node to node, so that time grows with pattern and name alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from re import _constants as ops  # type: ignore[attr-defined]  # typeshed leaves both out
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from medlora.errors import InputError

_LONGEST = 4_000


_LONGEST_NAME = 500


_STEPS = 2_000_000
"""Steps that all matches of one pattern may take together: about a second."""


_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


_ASSERTIONS = (ops.ASSERT, ops.ASSERT_NOT)


_CATEGORIES: dict[object, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdigit,
    ops.CATEGORY_NOT_DIGIT: lambda c: not c.isdigit(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    ops.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    ops.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class NamePattern:
    """One pattern, compiled; raises InputError for one that is no regular expression, too long, or of a kind left out."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise InputError(f"a pattern of {len(pattern):,} characters; at most {_LONGEST:,} are read")
        try:
            self.tree = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{pattern[:100]!r} is no regular expression: {error}") from None
        if self.tree.state.flags & ~re.UNICODE:
            raise InputError(f"{pattern[:100]!r}: flags such as (?i) are not supported in a pattern of module names")
        self.pattern, self.steps = pattern, 0
        self._match(self.tree, "", {0})  # a node that is not supported is found where it is, or below

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches, as `re.fullmatch` has it."""
        return len(name) in self._match(self.tree, name[:_LONGEST_NAME], {0})

    def match_end(self, name: str) -> bool:
        """Whether the name, or what follows one of its dots, matches whole: how PEFT reads keys of `rank_pattern`."""
        starts = {0, *(i + 1 for i, c in enumerate(name) if c == ".")}
        return len(name) in self._match(self.tree, name[:_LONGEST_NAME], starts)

    def _match(self, nodes: Iterable[tuple[object, object]], name: str, places: set[int]) -> set[int]:
        for op, argument in nodes:
            self.steps += 1 + len(places)
            if self.steps > _STEPS:
                raise InputError(
                    f"{self.pattern[:100]!r} takes too long to match; write a simpler pattern, or plain names"
                )
            places = self._step(op, argument, name, places)
        return places

    def _step(self, op: object, argument: Any, name: str, places: set[int]) -> set[int]:
        if op is ops.SUBPATTERN:
            group, add, remove, inner = argument
            if add or remove:
                raise InputError(f"{self.pattern[:100]!r}: flags such as (?i:...) are not supported")
            return self._match(inner, name, places)
        if op is ops.BRANCH:
            return set[int]().union(*(self._match(branch, name, places) for branch in argument[1]))
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, inner = argument
            return self._repeat(least, most, inner, name, places)
        if op in _ASSERTIONS:
            direction, inner = argument
            if direction < 0:
                raise InputError(
                    f"{self.pattern[:100]!r}: looking behind is not supported in a pattern of module names"
                )
            wanted = op is ops.ASSERT
            return {place for place in places if bool(self._match(inner, name, {place})) is wanted}
        if op is ops.AT:
            return {place for place in places if self._is_at(argument, name, place)}
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return {place + 1 for place in places if place < len(name) and self._is_char(op, argument, name[place])}
        raise InputError(f"{self.pattern[:100]!r}: {str(op).lower()} is not supported in a pattern of module names")

    def _repeat(self, least: int, most: int, inner: Any, name: str, places: set[int]) -> set[int]:
        # More steps than the name is long reach nothing new.
        bound = len(name) + 1
        ends = set(places) if least == 0 else set[int]()
        for count in range(1, min(most, least + bound, 2 * bound) + 1):
            following = self._match(inner, name, places)
            if count >= min(least, bound):
                if following <= ends and count > min(least, bound):
                    break
                ends |= following
            if not following:
                break
            places = following
        return ends

    def _is_at(self, where: object, name: str, place: int) -> bool:
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return place == 0
        if where in (ops.AT_END, ops.AT_END_STRING):
            return place == len(name)
        if where in (ops.AT_BOUNDARY, ops.AT_NON_BOUNDARY):
            before = place > 0 and name[place - 1] in _WORD
            after = place < len(name) and name[place] in _WORD
            return (before != after) is (where is ops.AT_BOUNDARY)
        raise InputError(f"{self.pattern[:100]!r}: {str(where).lower()} is not supported in a pattern of module names")

    def _is_char(self, op: object, argument: Any, char: str) -> bool:
        if op is ops.ANY:
            return char != "\n"
        if op is ops.LITERAL:
            return bool(ord(char) == argument)
        if op is ops.NOT_LITERAL:
            return bool(ord(char) != argument)
        return self._is_in(argument, char)

    def _is_in(self, members: Sequence[tuple[object, Any]], char: str) -> bool:
        negated = members[0][0] is ops.NEGATE
        for op, argument in members[negated:]:
            hit = (
                ord(char) == argument
                if op is ops.LITERAL
                else argument[0] <= ord(char) <= argument[1]
                if op is ops.RANGE
                else _CATEGORIES[argument](char)
            )
            if hit:
                return not negated
        return negated
