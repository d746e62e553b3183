"""How long the examples of a source are: by the base's `tokenizer.json`, without transformers, on all records or a sample."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy

from medlora.config.phase import PhaseConfig
from medlora.config.sources import TrainSource
from medlora.data.card import stream_kept
from medlora.data.sources import scan
from medlora.prompts import Example, render
from medlora.records import McqRecord, Record
from medlora.seeds import derive_seed
from medlora.tokens.rows import Rows
from medlora.turns import Convention, Render, learn, load_renderer, write_prompt

MEASURED = 10_000
"""Records of a source that are tokenised; of a larger source these stand for the rest."""

_MINIATURE = {"text": 0.54, "translation": 0.42, "mcq": 0.47}
"""Tokens per character of the miniature's corpus, measured once; used until the miniature is built."""


@dataclass(frozen=True)
class SourceLengths:
    """What a phase gets from a source; rows and tokens are of one pass over it, None where no tokenizer is here."""

    source: str
    kind: str
    records: int
    examples: int
    rows: int | None
    tokens: int | None
    too_long: int
    """Examples that are longer than `max_tokens` and left out."""
    longest: int | None
    """Tokens of the longest row."""
    basis: str
    """How rows and tokens were found."""

    @property
    def mean_tokens(self) -> float:
        """Of a row."""
        return (self.tokens or 0) / max(1, self.rows or 0)


class FileTokenizer:
    """A base's tokenizer as its `tokenizer.json` has it, with a run's added words, and the base's chat template."""

    def __init__(self, folder: Path, words: Sequence[str] = ()) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.marks_spaces = bool(self.tokenizer.normalizer and self.tokenizer.normalizer.normalize_str("x x") == "x▁x")
        self.new_words = [word for word in dict.fromkeys(words) if not self._is_token(word)]
        content = [f"▁{word}" if self.marks_spaces else word for word in self.new_words]
        self.tokenizer.add_tokens([AddedToken(word, normalized=True) for word in content])
        whole, bare = (len(self.tokenizer.encode("a", add_special_tokens=special).ids) for special in (True, False))
        self.start = min(whole - bare, 1)
        found = load_renderer(folder)
        self.render: Render | None = found[0] if found else None
        self.name = found[1] if found else ""
        self.convention: Convention | None = learn(*found) if found else None

    def _is_token(self, word: str) -> bool:
        return any(len(self.tokenizer.encode(text, add_special_tokens=False).ids) == 1 for text in (word, f" {word}"))

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return [len(each.ids) for each in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def measure(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Tokens of each example, and of its prompt."""
        prompts = self.count([self._write(example) for example in examples])
        prompts = [
            n + (0 if example.chat and self.convention and example.prompt else self.start)
            for n, example in zip(prompts, examples, strict=True)
        ]
        completions = self.count([example.completion for example in examples])
        return [a + b + 1 for a, b in zip(prompts, completions, strict=True)], prompts

    def _write(self, example: Example) -> str:
        if not example.prompt:
            return ""
        if not example.chat or self.render is None or self.convention is None:
            return example.prompt + ("\n" if example.chat else "")
        return write_prompt(self.render, self.convention, [("user", example.prompt)], self.name)


def open_tokenizer(folder: Path | None, words: Sequence[str]) -> FileTokenizer | None:
    """The tokenizer in a base's folder; None where it has no `tokenizer.json`."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return FileTokenizer(folder, words)


@dataclass(frozen=True)
class Measuring:
    """What sources of a phase are measured with."""

    phase: PhaseConfig
    seed: int
    """Of the phase: rows are packed in the order in which they are drawn."""
    tokenizer: FileTokenizer | None
    is_miniature: bool
    dropped: Mapping[str, Sequence[str]]

    def measure(self, key: str, source: TrainSource) -> SourceLengths:
        """The examples of a source as rows of the phase."""
        found = scan(source)
        total = found.records - len(self.dropped.get(source.source, ()))
        records = list(islice(stream_kept(source, self.dropped), MEASURED))
        is_whole = len(records) == total
        if is_whole:
            random.Random(derive_seed(self.seed, key)).shuffle(records)
        wanted = min(total, source.sample or total)
        records = records[:wanted]
        examples = list(_render(records, source.style))
        share = wanted / max(1, len(records))
        whole = round(share * len(examples))
        if self.tokenizer is None and not self.is_miniature:
            basis = "unknown: the base has no tokenizer.json here"
            return SourceLengths(source.source, found.kind, wanted, whole, None, None, 0, None, basis)
        lengths, prompts = self._count(examples, found.kind)
        texts = [not example.prompt for example in examples]
        order = range(len(examples))
        rows = Rows(
            [],
            numpy.array(lengths, dtype=numpy.int64),
            numpy.array(prompts, dtype=numpy.int64),
            numpy.array(texts, dtype=bool),
            order,
            self.phase.max_tokens,
            self.phase.packing,
        )
        basis = "all records" if is_whole else f"the first {len(records):,} records"
        return SourceLengths(
            source.source,
            found.kind,
            wanted,
            whole,
            round(share * len(rows)),
            round(share * rows.lengths.tokens),
            round(share * rows.lengths.dropped),
            int(rows.sizes.max()) if len(rows) else 0,
            basis + ("" if self.tokenizer else ", by characters"),
        )

    def _count(self, examples: Sequence[Example], kind: str) -> tuple[list[int], list[int]]:
        if self.tokenizer is not None:
            return self.tokenizer.measure(examples)
        ratio = _MINIATURE.get(kind, 0.5)
        prompts = [round(len(example.prompt) * ratio) for example in examples]
        return [n + round(len(each.completion) * ratio) + 1 for n, each in zip(prompts, examples, strict=True)], prompts


def _render(records: Sequence[Record], style: str) -> Iterator[Example]:
    for record in records:
        yield from render(record, style if isinstance(record, McqRecord) else "reasoning")
