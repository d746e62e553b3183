"""Compare other tools' result files with each other, as stages are compared.

medlora compare LOG.csv ... --out DIR                a row a file in the tables, files paired question by question
medlora compare LOG.csv ... --out DIR --reparse      letters read anew from the raw responses
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from medlora.cli.common import print_json, text_to_stderr
from medlora.errors import InputError
from medlora.evaluation.ledger import PAGE, PREDICTIONS, REPORT
from medlora.evaluation.predictions import write_predictions
from medlora.evaluation.result_logs import LogCounts, ResultLog, read_result_log
from medlora.reporting.page import write_page
from medlora.reporting.report import build_report
from medlora.reporting.tables import print_report
from medlora.runs.environment import get_versions
from medlora.runs.files import write_json
from medlora.runs.manifests import hash_file


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG.csv", help="result files, a stage each")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the report")
    parser.add_argument("--reparse", action="store_true", help="read letters from the responses, not from column pred")
    parser.add_argument("--letters", default="ABCDE", help="the letters of the options (default: ABCDE)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print the report as JSON to stdout, all else to stderr")
    return parser.parse_args(argv)


def read_logs(paths: Sequence[Path], letters: str, reparse: bool) -> list[ResultLog]:
    """The logs with one set of questions: all that any of them holds; what one lacks is a failed answer of it.

    Raises InputError when two files have one name, or give a question different gold letters.
    """
    names = [path.stem for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{', '.join(twice)}: several files of that name; rename one, a stage is named by its file")
    expected: dict[str, str] = {}
    for path in paths:
        for prediction in read_result_log(path, letters=letters).predictions:
            expected.setdefault(prediction.id, prediction.gold)
    return [read_result_log(path, letters=letters, expected=expected, reparse=reparse) for path in paths]


def describe_counts(stage: str, counts: LogCounts) -> str | None:
    """One sentence with everything irregular of a file; None where nothing was."""
    found = {name: value if isinstance(value, int) else len(value) for name, value in asdict(counts).items()}
    odd = [f"{n} {name.replace('_', ' ')}" for name, n in found.items() if n and name not in ("rows", "questions")]
    return f"{stage}: {found['rows']} rows, {found['questions']} questions; {', '.join(odd)}" if odd else None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the report is there, 2 when something the user gave is wrong."""
    arguments = parse(argv)
    try:
        with text_to_stderr(arguments.json):
            report = compare(arguments)
    except InputError as error:
        print(f"medlora: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print_json(report)
    return 0


def compare(arguments: argparse.Namespace) -> object:
    """Write the comparison's folder, print its table and return the report."""
    if arguments.out.exists():
        raise InputError(f"--out {arguments.out}: is there already; name a new folder")
    logs = read_logs(arguments.logs, arguments.letters, arguments.reparse)
    notes = [describe_counts(p.stem, log.counts) for p, log in zip(arguments.logs, logs, strict=True)]
    predictions = [prediction for log in logs for prediction in sorted(log.predictions, key=lambda p: p.id)]
    about = {
        "name": arguments.out.name,
        "notes": [note for note in notes if note],
        "config": {"logs": [path.name for path in arguments.logs], "reparse": arguments.reparse},
        "versions": get_versions(),
        "hashes": {path.name: hash_file(path) for path in arguments.logs},
    }
    report = build_report(predictions, about, arguments.seed)
    arguments.out.mkdir(parents=True)
    write_predictions(arguments.out / PREDICTIONS, predictions)
    write_json(arguments.out / REPORT, report)
    write_page(arguments.out / PAGE, report, predictions)
    print_report(report, worked=True)
    print(f"comparison: {arguments.out}")
    return report
