"""Prose stays readable: sentences of 15 to 20 words on average, in every document that people read from top to bottom."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "medlora").rglob("README.md")),
]
MOST_WORDS = 21
"""Words a sentence, on average."""

LEAST_WORDS = 4
"""Fewer are a label, not a sentence."""

SHOWN = 5


def list_sentences(text: str) -> list[str]:
    """The sentences of a document: its tables, headings, code blocks and indented lines are left out."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in without_code.split("\n") if not line.startswith(("|", "#", "    "))]
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", "\n".join(lines))]
    return [sentence for sentence in sentences if len(sentence.split()) >= LEAST_WORDS]


def measure_words(sentences: list[str]) -> float:
    return sum(len(sentence.split()) for sentence in sentences) / max(1, len(sentences))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short_enough_to_read_once(document: Path) -> None:
    sentences = list_sentences(document.read_text(encoding="utf-8"))
    mean = measure_words(sentences)
    longest = sorted(sentences, key=lambda sentence: -len(sentence.split()))[:SHOWN]
    shown = "\n".join(f"  {len(sentence.split())} words: {sentence[:160]}" for sentence in longest)
    assert mean <= MOST_WORDS, (
        f"{document.relative_to(ROOT)}: {mean:.1f} words a sentence on average, {MOST_WORDS} at most; the longest:\n{shown}"
    )


@pytest.mark.parametrize(
    ("document", "most"),
    [(ROOT / "README.md", 160), *((path, 40) for path in DOCUMENTS if path.parent.parent == ROOT / "medlora")],
)
def test_what_is_read_first_stays_short(document: Path, most: int) -> None:
    assert len(document.read_text(encoding="utf-8").splitlines()) <= most


def test_what_is_counted_is_prose() -> None:
    text = "# A heading of many words that nobody counts\n\nOne two three four five. Six seven\neight nine! No.\n"
    text += "| a | table |\n```sh\npython jobs/sweep.py\n```\n    an indented line of code\n- A list item has five.\n"
    assert list_sentences(text) == ["One two three four five.", "Six seven eight nine!", "- A list item has five."]
    assert measure_words(list_sentences(text)) == pytest.approx(5)


MOST_DOCSTRING_WORDS = 20
"""Words a sentence of the docstrings, on average."""

LONGEST_DOCSTRING_SENTENCE = 45


def list_docstring_sentences(source: str) -> list[tuple[int, str]]:
    """The sentences of docstrings, also of those below a field or a constant, each with the line of its docstring."""
    strings = [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return [
        (line, sentence)
        for line, text in strings
        for part in re.split(r"\n\s*\n", inspect.cleandoc(text))
        for sentence in list_sentences(part)
        if not part.startswith(("medlora ", "python ", "PYTHONPATH="))  # commands, one a line
    ]


def test_docstrings_are_short_sentences() -> None:
    sentences = [
        (f"{path.relative_to(ROOT)}:{line}", sentence)
        for path in sorted((ROOT / "medlora").rglob("*.py"))
        for line, sentence in list_docstring_sentences(path.read_text(encoding="utf-8"))
    ]
    mean = measure_words([sentence for _, sentence in sentences])
    assert mean <= MOST_DOCSTRING_WORDS, f"docstrings have {mean:.1f} words a sentence, {MOST_DOCSTRING_WORDS} at most"
    long = [(len(sentence.split()), place, sentence) for place, sentence in sentences]
    shown = "\n".join(
        f"  {words} words at {place}: {sentence[:120]}"
        for words, place, sentence in sorted(long, reverse=True)
        if words > LONGEST_DOCSTRING_SENTENCE
    )
    assert not shown, f"sentences of docstrings have {LONGEST_DOCSTRING_SENTENCE} words at most; split these:\n{shown}"


def test_docstrings_are_counted_by_paragraph_and_without_indented_trees() -> None:
    source = (
        '"""The module does one thing\n\n    a/tree/of files in four lines\n\nThis is one sentence. This is the next one.\n"""\n'
        'LIMIT = 3\n"""Most tries of a step."""\nprint("no docstring is this one")\n'
    )
    assert [line for line, _ in list_docstring_sentences(source)] == [1, 1, 1, 8]
    assert [text for _, text in list_docstring_sentences(source)][0] == "The module does one thing"
