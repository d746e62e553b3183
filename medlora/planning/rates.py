"""How fast earlier runs in the same storage folder trained and answered: measured there, never a guess."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medlora.config.evaluation import EvaluationConfig
from medlora.runs.files import read_json_lines, read_mapping
from medlora.runs.folders import PhaseFolder
from medlora.runs.manifests import MANIFEST

_MOST_RUNS = 500


@dataclass(frozen=True)
class Rate:
    """The mean rate of a finished phase, and where it was measured."""

    phase: str
    tokens_per_s: float
    basis: str
    modified: float


def find_rates(storage: Path, base_files: str, quantization: str) -> list[Rate]:
    """Rates of finished phases on the same base in the same quantization, the newest first."""
    found = list(_read_rates(storage, base_files, quantization)) if storage.is_dir() else []
    return sorted(found, key=lambda rate: -rate.modified)


def choose_rate(rates: list[Rate], phase: str) -> Rate | None:
    """The newest rate of a phase of that name, else the newest of any."""
    return next((rate for rate in rates if rate.phase == phase), rates[0] if rates else None)


def find_evaluation_s(storage: Path, base_files: str, asked: int, wanted: EvaluationConfig) -> float | None:
    """Seconds that `asked` answers take, as the newest evaluation of the same kind took; None where there is none.

    The start of its actors, until the first answer, counts once.
    """
    paths = sorted(storage.glob("*/evaluation/report.json"), key=lambda path: -path.stat().st_mtime)
    for path in paths[:_MOST_RUNS]:
        report = read_mapping(path) or {}
        was = (report.get("config") or {}).get("evaluation") or {}
        hashes, questions = report.get("hashes") or {}, report.get("questions_asked")
        alike = all(was.get(key) == getattr(wanted, key) for key in ("scoring", "samples", "rotations", "max_tokens"))
        if not alike or not questions or hashes.get("base_files") != base_files or not hashes.get("stages"):
            continue
        if not isinstance(report.get("seconds"), (int, float)):
            continue
        start_s = report.get("seconds_to_first_answer") or 0.0
        answers = questions * len(hashes["stages"])
        return float(start_s + (report["seconds"] - start_s) * asked / answers)
    return None


def _read_rates(storage: Path, base_files: str, quantization: str) -> Iterator[Rate]:
    for path in sorted(storage.glob(f"*/phases/*/{MANIFEST}"))[:_MOST_RUNS]:
        folder = PhaseFolder(path.parent)
        manifest = read_mapping(path) or {}
        fingerprint = manifest.get("fingerprint") or {}
        base = fingerprint.get("base") or {}
        if fingerprint.get("base_files") != base_files or base.get("quantization") != quantization:
            continue
        measured = [row["tokens_per_s"] for row in read_json_lines(folder.metrics, keys=("tokens_per_s",))]
        # The first line holds the first step, which also warms up.
        if steady := [rate for rate in measured[1:] or measured if rate > 0]:
            rate = statistics.harmonic_mean(steady)  # each line is of as many steps
            where = f"{folder.root.parent.parent.name}, phase {folder.root.name}, on {manifest.get('device', 'an unknown device')}"
            yield Rate(folder.root.name, rate, f"{rate:,.0f} tokens/s in {where}", path.stat().st_mtime)
