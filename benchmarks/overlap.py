"""How fast and how big: training records looked up among test questions, on one core.

python benchmarks/overlap.py                          # 100,000 records against 10,000 questions
python benchmarks/overlap.py --records 10000 --tests 1000
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Iterator

from medlora.data.overlap import TestIndex
from medlora.records import McqRecord, Record, TextRecord


def make_records(n: int, seed: int, words: list[str]) -> Iterator[Record]:
    """Questions of 25 words with five options, and every fifth a text of 200 words; a stream."""
    draw = random.Random(seed)
    for i in range(n):
        if i % 5 == 4:
            yield TextRecord(f"{seed}-{i}", " ".join(draw.choices(words, k=200)))
        else:
            options = tuple(" ".join(draw.choices(words, k=2)) + f" {k}" for k in range(5))
            yield McqRecord(f"{seed}-{i}", " ".join(draw.choices(words, k=25)), options, "A")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--tests", type=int, default=10_000)
    arguments = parser.parse_args()
    draw = random.Random(0)
    words = [
        "".join(draw.choices("가나다라마바사아자차카타파하병약통증열", k=draw.randint(2, 4))) for _ in range(20_000)
    ]
    questions = [r for r in make_records(arguments.tests * 5 // 4 + 5, 1, words) if isinstance(r, McqRecord)]
    started = time.perf_counter()
    index = TestIndex({"t": questions[: arguments.tests]})
    built_s = time.perf_counter() - started
    print(f"index of {arguments.tests} questions: {built_s:.1f} s, {_peak_mib():.0f} MiB")
    hits = 0
    for i, record in enumerate(make_records(arguments.records, 2, words), 1):
        hits += bool(index.find(record))
        if i % max(1, arguments.records // 4) == 0:
            took = time.perf_counter() - started - built_s
            print(f"{i} records: {took:.1f} s, {i / took:.0f} records/s, peak {_peak_mib():.0f} MiB, {hits} hits")
    print(f"all: {time.perf_counter() - started:.1f} s")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
