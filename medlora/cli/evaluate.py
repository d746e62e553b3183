"""Score stages (a base with its adapters) on multiple-choice tests.

medlora evaluate                                            the quickstart's stages, configs/evaluate.yaml
medlora evaluate --config mine.yaml --set evaluation.scoring=letter --out evaluations/letter

On a cluster, the same as a job:
ray job submit --working-dir . -- python jobs/evaluate_mcq.py --config mine.yaml --out /shared/evaluations/mine
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medlora.cli.common import find_config, print_json, text_to_stderr


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what can be set in the config has no flag of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = find_config("evaluate.yaml")
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help="the config (default: configs/evaluate.yaml)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key; repeatable"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="the folder or s3:// URI to write (default: <storage.folder>/<name>)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="score adapters made for another base, stage or prompt style; the report says so",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON to stdout, all else to stderr")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the report is there; `endings.run_job` gives the code where it is not."""
    arguments = parse(argv)
    with text_to_stderr(arguments.json):
        report = evaluate(arguments)
    if arguments.json:
        print_json(report)
    return 0


def evaluate(arguments: argparse.Namespace) -> object:
    """Score what is not scored yet, print the table and return the report."""
    from medlora import endings
    from medlora.config.loading.files import load_evaluate_config
    from medlora.evaluation.ledger import FINGERPRINT, find_report
    from medlora.evaluation.plan import check_evaluation, describe_progress, refuse_other
    from medlora.runs import mirror
    from medlora.runs.environment import log_to
    from medlora.runs.folders import open_run
    from medlora.runs.locks import hold_file_lock

    config = load_evaluate_config(arguments.config, arguments.overrides)
    plan = check_evaluation(config, arguments.force)
    where = arguments.out or mirror.join(config.storage.folder, config.name)
    out = open_run(mirror.find_copy(where, config.storage.cache), mark=FINGERPRINT)
    from medlora.reporting.progress import Display
    from medlora.reporting.tables import print_next, print_report

    with (
        hold_file_lock(out.lock, f"evaluation {out.root}"),
        mirror.hold_run(out.root, mark=FINGERPRINT),
        log_to((logging.getLogger("medlora.run"), out.log)),
        Display() as display,
    ):
        refuse_other(out.root, plan.task.fingerprint)
        report = find_report(out.root, plan.task.fingerprint)
        worked = report is None
        if report is None:
            endings.describe_progress(lambda: describe_progress(out.root, list(plan.task.stages)), out.log)
            from medlora.drivers.evaluation import run_evaluation

            report = run_evaluation(config, plan, out, display.show)
    print_report(report, worked)
    print(f"evaluation: {mirror.name_place(out.root)}")
    print_next(out.root)
    return report
