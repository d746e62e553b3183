"""Does training data hold test questions? The tests are indexed, the training data streams past."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy

from medlora.records import McqRecord, Record, TextRecord

if TYPE_CHECKING:
    from datasketch import MinHash

Kind = Literal["exact", "ngram", "near"]


GRAMS = (13, 8)
"""Words that two texts have in a row, as in Brown et al. 2020, appendix C (13), and Llama 2, appendix A.6 (8 or more)."""


LEAST_CONTAINED = {13: 0.3, 8: 0.6}
"""Share of a question's n-grams that a text must hold. One alone is no leak: exam questions begin alike ("A 45-year-old
man comes to the physician because of ...")."""


LEAST_SIMILAR = 0.72
"""Jaccard similarity of SHINGLE characters in a row, of question and options, from which on two questions are one."""


SHINGLE, PERMUTATIONS = 5, 64


_DISTINCTIVE = 40
"""Letters, those of Korean and Chinese counting twice, from which on a question is clear without its options
("Which of the following is right?" does not)."""


_ANCHOR = 12
"""First letters of a question by which it is looked up in running text before the whole of it is compared."""


LEAST_SHARED = 0.7
"""Two questions are one where this share of their words is the same and their options are. They are one, too, where the
words are the same and this share of the options is."""


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
    stem: str
    """Letters and digits alone."""
    words: Counter[str]
    options: frozenset[str]


class TestIndex:
    """What is looked up in training data: every question of every test; grows with the tests alone."""

    __test__ = False  # for pytest, which collects what is named so

    def __init__(self, tests: Mapping[str, Sequence[McqRecord]]) -> None:
        self.questions: list[_Question] = []
        self._exact: dict[bytes, list[int]] = {}
        self._options: dict[bytes, list[int]] = {}
        self._stems: dict[str, list[int]] = {}
        stems: dict[str, set[bytes]] = {}
        self._grams: dict[int, dict[int, list[int]]] = {n: {} for n in GRAMS}
        self._counts: dict[int, list[int]] = {n: [] for n in GRAMS}
        from datasketch import MinHashLSH

        self._near = MinHashLSH(threshold=0.5, num_perm=PERMUTATIONS)
        for records in tests.values():
            for record in records:
                stems.setdefault(_squeeze(record.question), set()).add(_hash_options(record))
        # A stem that tests ask with several sets of options ("which is exact?") identifies no question by itself.
        self._distinctive = {
            stem for stem, options in stems.items() if len(options) == 1 and _weigh(stem) >= _DISTINCTIVE
        }
        for test, records in tests.items():
            for record in records:
                self._add(test, record)
        anchored = [
            (i, question.stem) for i, question in enumerate(self.questions) if question.stem in self._distinctive
        ]
        hashes = [int(_hash_windows(stem[:_ANCHOR], _ANCHOR)[0]) for _, stem in anchored]
        order = numpy.argsort(numpy.array(hashes, dtype=numpy.uint64), kind="stable")
        self._anchors = numpy.array(hashes, dtype=numpy.uint64)[order]
        self._anchored = [anchored[i][0] for i in order.tolist()]

    def _add(self, test: str, record: McqRecord) -> None:
        number = len(self.questions)
        shingles = _hash_shingles(_join_question(record))
        squeezed = _squeeze(record.question)
        stem = _split_words(record.question)
        options = frozenset(map(_squeeze, record.options))
        self.questions.append(
            _Question(test, record.id, frozenset(shingles.tolist()), squeezed, Counter(stem), options)
        )
        self._stems.setdefault(squeezed, []).append(number)
        for key in self._name_exactly(record):
            self._exact.setdefault(key, []).append(number)
        self._options.setdefault(_hash_options(record), []).append(number)
        words = _split_words(f"{record.question} {' '.join(record.options)}")
        for n in GRAMS:
            # A stem that is long enough identifies its question: a text may hold it without its options.
            grams = set(_list_grams(stem if len(stem) >= 2 * n else words, n))
            self._counts[n].append(len(grams))
            for gram in grams:
                self._grams[n].setdefault(gram, []).append(number)
        self._near.insert(number, _sketch(shingles))

    def find(self, record: Record, source: str = "") -> list[Overlap]:
        """The test questions that a training record holds: each once, by the strongest kind, the best score first."""
        found: dict[int, tuple[Kind, float]] = {}
        if isinstance(record, McqRecord):
            for key in self._name_exactly(record):
                found |= {number: ("exact", 1.0) for number in self._exact.get(key, ())}
        text = _join_text(record)
        found |= {number: ("exact", 1.0) for number in self._find_stems(_squeeze(text)) if number not in found}
        words = _split_words(text)
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
            found = {**dict(self._find_alike(record)), **found}
        ranked = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))
        return [
            Overlap(source, record.id, self.questions[number].test, self.questions[number].id, kind, round(score, 4))
            for number, (kind, score) in ranked
        ]

    def _name_exactly(self, record: McqRecord) -> Iterator[bytes]:
        """Keys that another spelling, punctuation or order of the options leaves as they are."""
        stem = _squeeze(record.question)
        yield _hash_text(stem) + _hash_options(record)
        if stem in self._distinctive:
            yield _hash_text(stem)

    def _find_alike(self, record: McqRecord) -> Iterator[tuple[int, tuple[Kind, float]]]:
        """Short questions, of which an edit leaves few shingles: the same options under most of the words, or the same
        words over most of the options."""
        asked = Counter(_split_words(record.question))
        for number in self._options.get(_hash_options(record), ()) if _are_distinctive(record.options) else ():
            words = self.questions[number].words
            if (shared := 2 * (asked & words).total() / max(1, asked.total() + words.total())) >= LEAST_SHARED:
                yield number, ("near", shared)
        options = frozenset(map(_squeeze, record.options))
        for number in self._stems.get(_squeeze(record.question), ()):
            theirs = self.questions[number].options
            if (shared := len(options & theirs) / max(len(options), len(theirs))) >= LEAST_SHARED:
                yield number, ("near", shared)

    def _find_stems(self, squeezed: str) -> Iterator[int]:
        """The questions whose whole stem is somewhere in a text."""
        if len(squeezed) < _ANCHOR or not len(self._anchors):
            return
        windows = numpy.unique(_hash_windows(squeezed, _ANCHOR))
        first = numpy.searchsorted(self._anchors, windows)
        last = numpy.searchsorted(self._anchors, windows, side="right")
        for i, j in zip(first[first < last].tolist(), last[first < last].tolist(), strict=True):
            yield from (number for number in self._anchored[i:j] if self.questions[number].stem in squeezed)


class Duplicates:
    """Finds records that repeat an earlier one; stores 16 bytes and the id of each different one."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def find(self, record: Record) -> str | None:
        """The id of the first record with the same content, None for the first itself."""
        # Another order of the options is another exercise, another answer a contradiction: neither is a duplicate.
        text = _squeeze(_join_text(record)) + (record.answer if isinstance(record, McqRecord) else "")
        key = _hash_text(text)
        first = self._seen.setdefault(key, record.id)
        return None if first == record.id else first


def _hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _hash_options(record: McqRecord) -> bytes:
    """The same for every order and spelling of the options."""
    return _hash_text("\n".join(sorted(map(_squeeze, record.options))))


def _weigh(squeezed: str) -> int:
    return len(squeezed) + sum(letter >= "\u2e80" for letter in squeezed)


def _are_distinctive(options: Sequence[str]) -> bool:
    """Whether options are more than yes and no, A and B, 1 and 2."""
    return sum(_weigh(_squeeze(option)) for option in options) >= 4 * len(options)


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


def _hash_windows(squeezed: str, length: int) -> numpy.ndarray:
    """A 64-bit number for each run of `length` letters."""
    points = numpy.frombuffer(squeezed.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32).astype(numpy.uint64)
    if len(points) < length:
        points = numpy.pad(points, (0, length - len(points)))
    hashed = numpy.zeros(len(points) - length + 1, dtype=numpy.uint64)
    for i in range(length):
        hashed = hashed * numpy.uint64(1_000_003) + points[i : i + len(hashed)]
    mixed: numpy.ndarray = hashed * numpy.uint64(0x9E3779B97F4A7C15)
    return mixed


def _hash_shingles(text: str) -> numpy.ndarray:
    """A 32-bit number for each different run of SHINGLE letters."""
    hashed: numpy.ndarray = numpy.unique(_hash_windows(_squeeze(text), SHINGLE) >> numpy.uint64(32))
    return hashed


@cache
def _make_empty_sketch() -> MinHash:
    """What every sketch starts as: to draw its permutations takes longer than to sketch a question with them."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=int, seed=1)


def _sketch(shingles: numpy.ndarray) -> object:
    sketch = _make_empty_sketch().copy()
    sketch.update_batch(shingles.tolist())
    return sketch
