"""What sources are, before anything is trained on them: schema, rows, answers, lengths, bad rows, samples."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from medlora.config.loading.files import explain
from medlora.config.model import BaseModelConfig
from medlora.config.placement import find_cache_folder
from medlora.config.sources import Columns, TrainSource
from medlora.data.rows.schemas import EXAMS, SCHEMAS
from medlora.data.sources import Scan, scan, stream
from medlora.errors import InputError
from medlora.prompts import render
from medlora.tokens.tokenizer import Tokenizer

_SAMPLES = 3


_MEASURED = 2_000
"""Records whose tokens are counted: a seeded sample of a larger source."""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every source could be described, 2 when one could not be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="as `source` in a config")
    parser.add_argument("--schemas", action="store_true", help="list the schemas that are known by their columns")
    parser.add_argument("--kind", default="auto", choices=["auto", "text", "translation", "mcq"])
    parser.add_argument("--adaptor", help="name of a schema, where the columns fit several")
    parser.add_argument("--columns", type=json.loads, metavar="JSON", help='as `columns` in a config: {"text": "body"}')
    parser.add_argument("--encoding", default="auto", choices=["auto", "utf-8", "cp949", "euc-kr", "utf-16"])
    parser.add_argument("--separator", default="auto", choices=["auto", ",", ";", "tab", "|"])
    parser.add_argument("--style", default="reasoning", choices=["reasoning", "answer", "kormedmcqa"])
    parser.add_argument("--base", metavar="MODEL", help="folder or hub id (or miniature): also count its tokens")
    parser.add_argument("--limit", type=int, help="look at the first so many records only")
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="write every bad row to this file")
    arguments = parser.parse_args(argv)
    if not arguments.sources and not arguments.schemas:
        parser.error("name a SOURCE, or say --schemas")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if arguments.schemas:
        _print_schemas(console)
        return 0
    try:
        tokenizer = _load_tokenizer(arguments.base) if arguments.base else None
        sources = [_make_source(name, arguments) for name in arguments.sources]
        for source in sources:
            _print_source(console, source, tokenizer)
        if arguments.quarantine:
            from medlora.data.quarantine import write_quarantine

            write_quarantine(arguments.quarantine, {source.source: source for source in sources})
        return 0
    except InputError as error:
        print(f"medlora: {error}", file=sys.stderr)
        return 2


def _make_source(name: str, arguments: argparse.Namespace) -> TrainSource:
    try:
        columns = Columns.model_validate(arguments.columns) if arguments.columns is not None else None
        return TrainSource(
            source=name,
            kind=arguments.kind,
            adaptor=arguments.adaptor,
            columns=columns,
            limit=arguments.limit,
            encoding=arguments.encoding,
            separator=arguments.separator,
            style=arguments.style,
        )
    except ValidationError as error:
        raise InputError(f"{name}: {'; '.join(explain(error, TrainSource))}") from None


def _load_tokenizer(model: str) -> Tokenizer:
    from medlora.artifacts.bases import find_base
    from medlora.model.base import locate_base
    from medlora.model.tokenizer import load_tokenizer

    base = BaseModelConfig(model=model)
    find_base(base)
    return load_tokenizer(locate_base(base, str(find_cache_folder()), 0))


def _print_schemas(console: Console) -> None:
    table = Table("name", "known by the columns", "what")
    for schema in (*SCHEMAS, *EXAMS.values()):
        table.add_row(schema.name, ", ".join(schema.needs), schema.about)
    console.print(table)


def _print_source(console: Console, source: TrainSource, tokenizer: Tokenizer | None) -> None:
    found = scan(source)
    table = Table(title=source.source, show_header=False, title_justify="left")
    for name, value in describe(found).items():
        table.add_row(name, value)
    if found.records:
        for name, counts in measure(source, tokenizer).items():
            table.add_row(name, counts)
    console.print(table)
    for bad in found.shown:
        console.print(f"bad row  {bad}", markup=False)
    if found.bad.total() > len(found.shown):
        console.print(f"... and {found.bad.total() - len(found.shown)} more; --quarantine FILE writes them all")
    for n, record in enumerate(_sample(source, _SAMPLES), 1):
        console.rule(f"sample {n}: {record.id}", align="left")
        example = render(record, source.style)[0]
        if tokenizer is not None:
            from medlora.tokens.encode import tokenise

            tokens = tokenise(tokenizer, [example])[0]
            prompt, completion = (
                tokenizer.decode(ids) for ids in (tokens.ids[: tokens.prompt], tokens.ids[tokens.prompt :])
            )
        else:
            prompt, completion = f"{example.prompt}\n" if example.prompt else "", example.completion
        console.print(prompt, style="dim", markup=False, end="")
        console.print(completion, style="bold", markup=False)


def describe(found: Scan) -> dict[str, str]:
    """What a scan found, as lines of a table."""

    def count(counts: Counter[Any], most: int = 12) -> str:
        shown = ", ".join(f"{key or '(none)'} {n:,}" for key, n in counts.most_common(most))
        return f"{shown}, and {len(counts) - most} others" if len(counts) > most else shown

    first = "" if found.base is None else f"; the data numbers the first option {found.base}"
    files = len(found.files)
    lines = {
        "schema": f"{found.schema} ({found.kind or 'nothing'}){first}",
        "rows": f"{found.rows:,} in {files} file{'s' * (files != 1)}, {found.records:,} valid",
        "bad rows": count(found.bad) or "none",
        "odd but kept": count(found.flags) or "nothing",
    }
    if found.kind == "mcq":
        letters = Counter({letter: found.answers[letter] for letter in found.letters})
        lines |= {
            "subjects": count(found.subjects),
            "answers": "  ".join(f"{letter} {n:,}" for letter, n in sorted(letters.items())),
            "options": ", ".join(f"{n:,} questions of {options}" for options, n in sorted(found.options.items())),
        }
    return lines


def measure(source: TrainSource, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Lengths of the examples as the model sees them: in characters, and in tokens where there is a tokenizer."""
    import numpy

    examples = [example for record in _sample(source, _MEASURED) for example in render(record, source.style)]
    lengths = {"characters": [len(example.prompt) + len(example.completion) for example in examples]}
    if tokenizer is not None:
        from medlora.tokens.encode import tokenise

        lengths["tokens"] = [len(tokens.ids) for tokens in tokenise(tokenizer, examples)]
    described = {}
    for name, of in lengths.items():
        p50, p90, p99 = (int(value) for value in numpy.percentile(of, (50, 90, 99), method="higher"))
        described[name] = f"median {p50:,}, 90 % {p90:,}, 99 % {p99:,}, longest {max(of):,} (of {len(of):,} examples)"
    return described


def _sample(source: TrainSource, n: int) -> list[Any]:
    """A seeded sample, in order."""
    total = scan(source).records
    chosen = set(random.Random(0).sample(range(total), min(n, total)))
    return [record for i, record in enumerate(stream(source)) if i in chosen]
