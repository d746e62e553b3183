"""Make the examples of docs/examples: the report of a run, and a comparison of csv logs without the models' texts.

python benchmarks/examples.py --run runs/quickstart --logs FOLDER_OF_CSV_LOGS
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from medlora.evaluation.ledger import PAGE
from medlora.evaluation.logs.inputs import Reading, parse_input, read_inputs
from medlora.evaluation.logs.pairing import pair_logs
from medlora.reporting.page import Beside, write_page
from medlora.reporting.report import build_report
from medlora.reporting.results.browse import BROWSE
from medlora.reporting.results.drawings import Drawings
from medlora.reporting.results.figures import FOLDER, write_figures
from medlora.reporting.results.paper import TABLES, write_tables

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def copy_run(run: Path, out: Path) -> None:
    """What people read of a run's evaluation."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in (PAGE, BROWSE, *TABLES):
        shutil.copyfile(run / "evaluation" / name, out / name)
    shutil.copytree(run / "evaluation" / FOLDER, out / FOLDER)


def compare_logs(logs: Path, out: Path) -> None:
    """`medlora compare` of all logs, but what the models wrote: the figures are ours, their texts are not."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    inputs = [parse_input(str(path)) for path in sorted(logs.glob("*.csv"))]
    paired = pair_logs(read_inputs(inputs, Reading("ABCDE", reparse=False)))
    answers = [replace(prediction, text="") for prediction in paired.predictions]
    about = {"name": "Seven models on KorMedMCQA", "notes": list(paired.notes), "paired": list(paired.counts)}
    report = build_report(answers, about, seed=0)
    draw = Drawings(report)
    write_tables(out, report)
    figures = [f"{FOLDER}/{name}" for name in write_figures(out / FOLDER, report, draw)]
    write_page(out / PAGE, report, answers, beside=Beside(figures=figures), draw=draw)


def main() -> int:
    """Write both, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the quickstart")
    parser.add_argument("--logs", type=Path, help="a folder of csv logs")
    arguments = parser.parse_args()
    if arguments.run:
        copy_run(arguments.run, EXAMPLES / "quickstart")
    if arguments.logs:
        compare_logs(arguments.logs, EXAMPLES / "seven-models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
