"""Search the hyperparameters of a run's phases with Ray Tune, judged on dev; the test split is never looked at.

medlora sweep                                               learning rate x rank on the miniature, configs/sweep.yaml
medlora sweep --config mine.yaml --set trials=32 --out sweeps/larger
medlora sweep --config mine.yaml --final-test               score the winner on the run config's tests, once

On a cluster, the same as a job:
ray job submit --working-dir . -- python jobs/sweep.py --config mine.yaml --out /shared/sweeps/mine
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medlora.cli.common import find_config


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what can be set in the config has no flag of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = find_config("sweep.yaml")
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help="the sweep config (default: configs/sweep.yaml)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key; repeatable"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="the sweep's folder or s3:// URI (default: <storage.folder>/<name>)"
    )
    parser.add_argument(
        "--final-test", action="store_true", help="at the end score the winner on the run config's tests, once"
    )
    parser.add_argument(
        "--force", action="store_true", help="begin from adapters in `start` that were made for another base or stage"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the sweep is done; `endings.run_job` gives the code where it is not."""
    arguments = parse(argv)
    from medlora import endings
    from medlora.config.loading.files import load_sweep_config
    from medlora.errors import InputError
    from medlora.runs import mirror
    from medlora.runs.environment import log_to
    from medlora.runs.folders import open_run
    from medlora.runs.locks import hold_file_lock
    from medlora.sweep.checks import check_sweep, refuse_other
    from medlora.sweep.ledger import BEST, FINGERPRINT, LEDGER, Ledger

    config = load_sweep_config(arguments.config, arguments.overrides)
    plan = check_sweep(config, arguments.force)
    if arguments.final_test and plan.run.evaluation is None:
        raise InputError(f"--final-test: {config.config} has no evaluation; name the tests there")
    where = arguments.out or mirror.join(config.storage.folder, config.name)
    folder = open_run(mirror.find_copy(where, config.storage.cache), mark=FINGERPRINT)
    from medlora.reporting.sweep_progress import SweepDisplay
    from medlora.reporting.tables import print_sweep
    from medlora.sweep.results import find_summary

    with (
        hold_file_lock(folder.lock, f"sweep {folder.root}"),
        mirror.hold_run(folder.root, mark=FINGERPRINT),
        log_to((logging.getLogger("medlora.run"), folder.log)),
    ):
        refuse_other(folder.root, plan)
        ledger = Ledger(folder.root / LEDGER)
        summary = find_summary(folder.root, plan, ledger, arguments.final_test)
        worked = summary is None
        if summary is None:
            endings.describe_progress(ledger.describe_progress, folder.log)
            with SweepDisplay(ledger, plan.trials) as display:
                from medlora.drivers.sweep import run_sweep

                summary = run_sweep(plan, folder, ledger, arguments.final_test, display.show)
    print_sweep(summary, ledger, worked)
    print(f"sweep: {mirror.name_place(folder.root)}")
    if (best := folder.root / BEST).is_file():
        print(f"best config: {best}")
        print(f"next: medlora train --config {best}")
    return 0
