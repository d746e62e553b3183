"""Compare answers from anywhere with each other, as stages are compared: question by question.

medlora compare runs/a evaluations/b --out DIR           every stage of a run and of an evaluation
medlora compare runs/a:02=before runs/b:02=after --out DIR   stages of one name, under names of your own
medlora compare out/model/samples_*.jsonl evaluations/b --out DIR   files of lm-evaluation-harness
medlora compare LOG.csv ... --out DIR --reparse          csv logs, letters read anew from the raw responses
medlora compare evaluations/b --out DIR --lm-eval        also as files of lm-evaluation-harness, in DIR/lm_eval

The verdict compares the last stage with the first. Questions are paired by test and id, else by their text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from medlora.cli.common import print_json, text_to_stderr
from medlora.errors import InputError
from medlora.evaluation.ledger import PREDICTIONS
from medlora.evaluation.logs.inputs import Input, Reading, list_files, parse_input, read_inputs
from medlora.evaluation.logs.lm_eval_files import write_lm_eval
from medlora.evaluation.logs.log import Log
from medlora.evaluation.logs.pairing import Paired, pair_logs
from medlora.evaluation.predictions import write_predictions
from medlora.evaluation.reports import TotalRow
from medlora.evaluation.statistics import wilson
from medlora.reporting.report import build_report
from medlora.reporting.results.files import write_results
from medlora.reporting.tables import print_next, print_report
from medlora.runs.environment import get_versions
from medlora.runs.manifests import hash_file


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "logs", nargs="+", metavar="PATH[:STAGE,...][=NAME]", help="folders and files of answers; see above"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the report")
    parser.add_argument(
        "--reparse", action="store_true", help="read letters from the responses, not as the file has them"
    )
    parser.add_argument("--letters", default="ABCDE", help="the letters of a csv's options (default: ABCDE)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print the report as JSON to stdout, all else to stderr")
    parser.add_argument("--lm-eval", action="store_true", help="also write files of lm-evaluation-harness")
    return parser.parse_args(argv)


def list_totals(logs: Sequence[Log]) -> list[TotalRow]:
    """Results that are known as sums alone, with their intervals: they stand beside the comparison."""
    return [
        {
            "stage": log.stage,
            "test": total.test,
            "metric": total.metric,
            "correct": total.correct,
            "total": total.total,
            "interval": list(wilson(total.correct, total.total)),
        }
        for log in logs
        for total in log.totals
    ]


def describe(
    inputs: Sequence[Input], logs: Sequence[Log], paired: Paired, arguments: argparse.Namespace
) -> dict[str, object]:
    """What the report says of where its answers come from."""
    return {
        "name": arguments.out.name,
        "notes": list(paired.notes),
        "paired": list(paired.counts),
        "totals": list_totals(logs),
        "config": {"logs": [each.path.name for each in inputs], "reparse": arguments.reparse},
        "versions": get_versions(),
        "hashes": {
            f"{path.parent.name}/{path.name}" if path.suffix == ".parquet" else path.name: hash_file(path)
            for path in list_files(inputs)
        },
    }


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
    inputs = [parse_input(text) for text in arguments.logs]
    logs = read_inputs(inputs, Reading(arguments.letters, arguments.reparse))
    paired = pair_logs(logs)
    if not paired.predictions:
        raise InputError(
            f"{arguments.logs[0]}: holds sums and no answers, so nothing can be paired; "
            "run lm_eval with --log_samples, or add an evaluation with answers"
        )
    report = build_report(paired.predictions, describe(inputs, logs, paired, arguments), arguments.seed)
    arguments.out.mkdir(parents=True)
    write_predictions(arguments.out / PREDICTIONS, paired.predictions)
    write_results(arguments.out, report, paired.predictions, paired.questions)
    if arguments.lm_eval:
        write_lm_eval(arguments.out / "lm_eval", paired.predictions, paired.questions, datetime.now())
    print_report(report, worked=True)
    print(f"comparison: {arguments.out}")
    print_next(arguments.out)
    return report
