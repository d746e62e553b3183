"""Does training data hold test questions? The tests are indexed, the training data streams past."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from medlora.records import McqRecord, Record, TextRecord

Kind = Literal["exact", "ngram", "near"]
GRAMS = (13, 8)
"""Words that two texts have in a row, as in Brown et al. 2020, appendix C (13), and Llama 2, appendix A.6 (8 or more)."""
LEAST_CONTAINED = {13: 0.3, 8: 0.6}
"""Share of a question's n-grams that a text must hold. One alone is no leak: exam questions begin alike ("A 45-year-old
man comes to the physician because of ...")."""
LEAST_SIMILAR = 0.72
"""Jaccard similarity of SHINGLE characters in a row, of question and options, from which on two questions are one."""
SHINGLE, PERMUTATIONS = 5, 64
_TELLING = 24
"""Letters from which on a question says what it asks without its options ("Which of the following is right?" does not)."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training record that holds a test question, or nearly; `score` in (0, 1] is the share of it that was found."""

    source: str
    record: str
    test: str
    question: str
    kind: Kind
    score: float


@dataclass(frozen=True, slots=True)
class _Question:
    test: str
    id: str
    shingles: frozenset[int]


class TestIndex:
    """What is looked up in training data: every question of every test; grows with the tests alone."""

    __test__ = False  # for pytest, which collects what is named so

    def __init__(self, tests: Mapping[str, Sequence[McqRecord]]) -> None:
        self.questions: list[_Question] = []
        self._exact: dict[bytes, list[int]] = {}
        self._grams: dict[int, dict[int, list[int]]] = {n: {} for n in GRAMS}
        self._counts: dict[int, list[int]] = {n: [] for n in GRAMS}
        from datasketch import MinHashLSH

        self._near = MinHashLSH(threshold=0.5, num_perm=PERMUTATIONS)
        for test, records in tests.items():
            for record in records:
                self._add(test, record)

    def _add(self, test: str, record: McqRecord) -> None:
        number = len(self.questions)
        shingles = _hash_shingles(_join_question(record))
        self.questions.append(_Question(test, record.id, frozenset(shingles.tolist())))
        for key in _name_exactly(record):
            self._exact.setdefault(key, []).append(number)
        words = _split_words(f"{record.question} {' '.join(record.options)}")
        stem = _split_words(record.question)
        for n in GRAMS:
            # A stem that is long enough stands for itself: a text may hold it without its options.
            grams = set(_list_grams(stem if len(stem) >= 2 * n else words, n))
            self._counts[n].append(len(grams))
            for gram in grams:
                self._grams[n].setdefault(gram, []).append(number)
        self._near.insert(number, _sketch(shingles))

    def find(self, record: Record, source: str = "") -> list[Overlap]:
        """The test questions that a training record holds: each once, by the strongest kind, the best score first."""
        found: dict[int, tuple[Kind, float]] = {}
        if isinstance(record, McqRecord):
            for key in _name_exactly(record):
                found |= {number: ("exact", 1.0) for number in self._exact.get(key, ())}
        words = _split_words(_join_text(record))
        for n in GRAMS:
            hits: dict[int, int] = {}
            for gram in set(_list_grams(words, n)):
                for number in self._grams[n].get(gram, ()):
                    hits[number] = hits.get(number, 0) + 1
            for number, count in hits.items():
                if (share := count / self._counts[n][number]) >= LEAST_CONTAINED[n]:
                    found.setdefault(number, ("ngram", share))
        if isinstance(record, McqRecord):
            shingles = _hash_shingles(_join_question(record))
            mine = frozenset(shingles.tolist())
            for number in self._near.query(_sketch(shingles)):
                theirs = self.questions[number].shingles
                if (similar := len(mine & theirs) / max(1, len(mine | theirs))) >= LEAST_SIMILAR:
                    found.setdefault(number, ("near", similar))
        ranked = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
        return [
            Overlap(source, record.id, self.questions[number].test, self.questions[number].id, kind, round(score, 4))
            for number, (kind, score) in ranked
        ]


class Duplicates:
    """Finds records that say the same as an earlier one; keeps 16 bytes and the id of each different one."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def find(self, record: Record) -> str | None:
        """The id of the first record that says the same, None for the first itself."""
        # Another order of the options is another exercise, another answer a contradiction: neither is a duplicate.
        text = _squeeze(_join_text(record)) + (record.answer if isinstance(record, McqRecord) else "")
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(key, record.id)
        return None if first == record.id else first


def _name_exactly(record: McqRecord) -> Iterator[bytes]:
    """Keys that another spelling, punctuation or order of the options leaves as they are."""
    stem = _squeeze(record.question)
    options = sorted(map(_squeeze, record.options))
    names = ["\n".join([stem, *options])]
    if len(stem) >= _TELLING:
        names.append(stem)
    for name in names:
        yield hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _join_question(record: McqRecord) -> str:
    return " ".join([record.question, *sorted(record.options, key=_squeeze)])


def _join_text(record: Record) -> str:
    if isinstance(record, McqRecord):
        return " ".join([record.question, *record.options, *record.rationale.values()])
    return record.text if isinstance(record, TextRecord) else f"{record.english}\n{record.korean}"


def _squeeze(text: str) -> str:
    """Letters and digits alone, one spelling of each: NFKC, without case."""
    return "".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _split_words(text: str) -> list[str]:
    """Words without case and punctuation; single letters and digits, which number options, are left out."""
    return [word for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()) if len(word) > 1]


def _list_grams(words: Sequence[str], n: int) -> list[int]:
    return [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]


_POWERS = numpy.array([1_000_003**k % 2**64 for k in range(SHINGLE)], dtype=numpy.uint64)


def _hash_shingles(text: str) -> numpy.ndarray:
    """A 32-bit number for each different run of SHINGLE letters."""
    squeezed = _squeeze(text)
    points = numpy.frombuffer(squeezed.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32).astype(numpy.uint64)
    if len(points) < SHINGLE:
        points = numpy.pad(points, (0, SHINGLE - len(points)))
    windows = numpy.lib.stride_tricks.sliding_window_view(points, SHINGLE)
    mixed = (windows * _POWERS).sum(axis=1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    hashed: numpy.ndarray = numpy.unique(mixed >> numpy.uint64(32))
    return hashed


def _sketch(shingles: numpy.ndarray) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int, seed=1)
    sketch.update_batch(shingles.tolist())
    return sketch
