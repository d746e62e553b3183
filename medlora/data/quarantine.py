"""Rows that make no record: written down, counted, too many of them a reason to stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from medlora.config.evaluation import EvaluationConfig
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig
from medlora.data.card import list_held_out, list_training
from medlora.data.sources import BadRow, scan
from medlora.errors import InputError
from medlora.runs.files import write_bytes


def check_rows(config: RunConfig, quarantine: Path) -> None:
    """Write every bad row of every source to `quarantine`; raises InputError, with the dotted key, where they are too many."""
    sources = {**list_training(config), **list_held_out(config)}
    write_quarantine(quarantine, sources)
    for key, source in sources.items():
        try:
            scan(source).check(config.data.max_bad_fraction)
        except InputError as error:
            where = f"\nall of them: {quarantine}" if quarantine.exists() else ""
            raise InputError(f"{key}.source: {error}{where}") from None


def write_quarantine(path: Path, sources: Mapping[str, SourceConfig]) -> None:
    """One JSON line a bad row (source, where, kind, reason, row); no file where no source has any."""
    lines: list[bytes] = []
    for source in dict.fromkeys(sources.values()):
        bad: list[BadRow] = []
        if scan(source).bad:
            scan(source, bad.append)
        rows = [{"source": source.source, **asdict(each)} for each in bad]
        lines += [
            (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")
            for row in rows
        ]
    if lines:
        write_bytes(path, b"".join(lines))
    else:
        path.unlink(missing_ok=True)


def describe_quarantine(evaluation: EvaluationConfig) -> list[str]:
    """Notes for a report on the rows of its tests that could not be asked; none where all could."""
    notes = []
    for test in evaluation.tests:
        found = scan(test)
        if bad := found.bad.total():
            counts = ", ".join(f"{kind} {n}" for kind, n in found.bad.items())
            notes.append(
                f"test {test.name}: {bad} of {found.rows} rows are no valid questions ({counts}); they are not asked and "
                f"not in the denominator, which is {found.records}"
            )
    return notes
