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
from medlora.data.sources import Scan, scan, stream
from medlora.prompts import Example, render
from medlora.prompts import version as prompts_version
from medlora.records import McqRecord, Record
from medlora.runs.files import read_mapping
from medlora.runs.manifests import MANIFEST
from medlora.seeds import derive_seed
from medlora.tokens.cache import TokenStore
from medlora.tokens.rows import Rows
from medlora.turns import Convention, Render, learn_in_time, load_renderer, render_in_time, write_prompt

MEASURED = 10_000
"""Records of a source that are tokenised; of a larger source these stand for the rest."""

_COMPARED = 256
"""Records by which cached tokens are known to be of this tokenizer."""

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
    longest_document: int | None
    """Tokens of the longest example in any row; packed rows hold several."""
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
        self.convention: Convention | None = learn_in_time(*found) if found else None

    def _is_token(self, word: str) -> bool:
        return any(len(self.tokenizer.encode(text, add_special_tokens=False).ids) == 1 for text in (word, f" {word}"))

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return [len(each.ids) for each in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def measure(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Tokens of each example, and of its prompt."""
        prompts = self.count(self._write(examples))
        prompts = [
            n + (0 if example.chat and self.convention and example.prompt else self.start)
            for n, example in zip(prompts, examples, strict=True)
        ]
        completions = self.count([example.completion for example in examples])
        return [a + b + 1 for a, b in zip(prompts, completions, strict=True)], prompts

    def _write(self, examples: Sequence[Example]) -> list[str]:
        convention = self.convention
        if self.render is None or convention is None:
            return [example.prompt + ("\n" if example.chat and example.prompt else "") for example in examples]

        def write(render: Render, example: Example) -> str:
            if not example.prompt or not example.chat:
                return example.prompt
            return write_prompt(render, convention, [("user", example.prompt)], self.name)

        return render_in_time(self.render, self.name, lambda render: [write(render, each) for each in examples])


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
    cache: Path
    """Where tokens of large sources may be."""

    def measure(self, key: str, source: TrainSource) -> SourceLengths:
        """The examples of a source as rows of the phase."""
        found = scan(source)
        total = found.records - len(self.dropped.get(source.source, ()))
        wanted = min(total, source.sample or total)
        records = list(islice(stream_kept(source, self.dropped), MEASURED))
        if self.tokenizer is None and not self.is_miniature:
            examples = round(wanted / max(1, len(records)) * sum(1 for _ in _render(records, source.style)))
            basis = "unknown: the base has no tokenizer.json here"
            return SourceLengths(source.source, found.kind, wanted, examples, None, None, 0, None, None, basis)
        if len(records) < total and (store := self._find_cached(source, found, records)) is not None:
            return self._measure_cached(key, source, store)
        is_whole = len(records) == total
        if is_whole:
            random.Random(derive_seed(self.seed, key)).shuffle(records)
        records = records[:wanted]
        rendered = list(_render(records, source.style))
        lengths, prompts = self._count(rendered, found.kind)
        texts = numpy.array([not example.prompt for example in rendered], dtype=bool)
        rows = self._arrange(numpy.array(lengths), numpy.array(prompts), texts, range(len(rendered)))
        basis = "all records" if is_whole else f"the first {len(records):,} records"
        basis += "" if self.tokenizer else ", by characters"
        return _describe(source.source, found.kind, wanted, rows, wanted / max(1, len(records)), basis)

    def count_cut_answers(self) -> dict[str, tuple[int, int]]:
        """For each dev source whose answers are written: how many are longer than `validation.max_tokens`, of how many.

        Empty where nothing is written, or where no tokenizer is here. A byte-level tokenizer spends several tokens on a
        Korean syllable, so a length that is plenty for English cuts Korean off.
        """
        validation, tokenizer, cut = self.phase.validation, self.tokenizer, dict[str, tuple[int, int]]()
        if validation is None or tokenizer is None:
            return cut
        for source in validation.sources:
            kind = scan(source).kind
            if kind != "translation" and not (kind == "mcq" and validation.scoring == "reason"):
                continue
            examples = list(_render(list(islice(stream(source), MEASURED)), "reasoning"))
            lengths = tokenizer.count([example.completion for example in examples])
            cut[source.source] = (sum(n > validation.max_tokens for n in lengths), len(lengths))
        return cut

    def _arrange(
        self, lengths: numpy.ndarray, prompts: numpy.ndarray, texts: numpy.ndarray, order: Sequence[int]
    ) -> Rows:
        lengths, prompts = lengths.astype(numpy.int64), prompts.astype(numpy.int64)
        return Rows([], lengths, prompts, texts, order, self.phase.max_tokens, self.phase.packing)

    def _find_cached(self, source: TrainSource, found: Scan, records: Sequence[Record]) -> TokenStore | None:
        """Tokens of a large source in the cache, if the first of them are as long as this tokenizer makes them."""
        style = source.style if found.kind == "mcq" else ""
        wanted = {"source": source.source, "records": found.hash, "style": style, "prompts": prompts_version()}
        lengths = self._count(list(_render(records[:_COMPARED], source.style)), found.kind)[0]
        for path in sorted((self.cache / "tokens").glob(f"*/{MANIFEST}")):
            made = (read_mapping(path) or {}).get("fingerprint") or {}
            if not self.dropped.get(source.source) and all(made.get(key) == value for key, value in wanted.items()):
                store = TokenStore(path.parent)
                if abs(int(store.lengths[: len(lengths)].sum()) - sum(lengths)) <= 0.02 * sum(lengths):
                    return store
        return None

    def _measure_cached(self, key: str, source: TrainSource, store: TokenStore) -> SourceLengths:
        """The rows of a source whose tokens are in the cache, in the order in which they are trained."""
        records = store.find_included(self.dropped.get(source.source, ()))
        random.Random(derive_seed(self.seed, key)).shuffle(records)
        records = records[: source.sample]
        rows = self._arrange(store.lengths, store.prompts, store.texts, store.order_examples(records))
        return _describe(source.source, scan(source).kind, len(records), rows, 1.0, "the token cache")

    def _count(self, examples: Sequence[Example], kind: str) -> tuple[list[int], list[int]]:
        if self.tokenizer is not None:
            return self.tokenizer.measure(examples)
        ratio = _MINIATURE.get(kind, 0.5)
        prompts = [round(len(example.prompt) * ratio) for example in examples]
        return [n + round(len(each.completion) * ratio) + 1 for n, each in zip(prompts, examples, strict=True)], prompts


def _describe(source: str, kind: str, records: int, rows: Rows, share: float, basis: str) -> SourceLengths:
    """The figures of rows that stand for `share` times as many."""
    lengths, longest = rows.lengths, int(rows.sizes.max()) if len(rows) else 0
    return SourceLengths(
        source=source,
        kind=kind,
        records=records,
        examples=round(share * lengths.examples),
        rows=round(share * len(rows)),
        tokens=round(share * lengths.tokens),
        too_long=round(share * lengths.dropped),
        longest=longest,
        longest_document=min(longest, lengths.longest),
        basis=basis,
    )


def _render(records: Sequence[Record], style: str) -> Iterator[Example]:
    for record in records:
        yield from render(record, style if isinstance(record, McqRecord) else "reasoning")
