"""Train a base model through a curriculum of phases and score every stage.

medlora train                                               the miniature, configs/quickstart.yaml
medlora train --config medgemma-4b.yaml --set phases.01.learning_rate=5e-5
medlora train --config 4b.yaml --config 27b.yaml            side by side, each on its own GPUs

On a cluster, the same as a job:
ray job submit --working-dir . -- python jobs/curriculum.py --config ... --run-dir /shared/runs/mine
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from medlora.cli.common import find_config

if TYPE_CHECKING:
    from medlora.config.run import RunConfig
    from medlora.runs.folders import RunFolder


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what can be set in the config has no flag of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = find_config("quickstart.yaml")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="the run config (default: configs/quickstart.yaml); repeatable: several run side by side",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key, e.g. phases.01.epochs=2; repeatable",
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="the run's folder or s3:// URI (default: <storage.folder>/<name>)"
    )
    parser.add_argument("--redo", metavar="PHASE", help="train this phase again; the old one is set aside")
    parser.add_argument(
        "--force", action="store_true", help="begin from adapters in `start` that were made for another base or stage"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan (as `medlora plan`) and start nothing")
    arguments = parser.parse_args(argv)
    arguments.config = arguments.config or [default]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the run is done; `endings.run_job` gives the code where it is not."""
    arguments = parse(argv)
    from medlora import endings
    from medlora.config.loading.files import load
    from medlora.curriculum.checks import check_inputs
    from medlora.errors import InputError
    from medlora.planning.memory import settle_quantization
    from medlora.runs import mirror
    from medlora.runs.environment import log_to
    from medlora.runs.folders import describe_progress, open_run
    from medlora.runs.locks import hold_file_lock

    if len(arguments.config) > 1 and (arguments.run_dir or arguments.redo):
        raise InputError("--run-dir and --redo are for one run; several go to <storage.folder>/<name> of their configs")
    configs = [load(path, arguments.overrides) for path in arguments.config]
    if arguments.dry_run:
        from medlora.cli.starting.plan import show_plan

        for config in configs:
            show_plan(config, arguments.run_dir, arguments.force)
        return 0
    settled = [settle_quantization(config) for config in configs]
    for text in filter(None, (text for _, text in settled)):
        print(f"medlora: {text}", file=sys.stderr)
    configs = [config for config, _ in settled]
    for config in configs:
        for doubt in check_inputs(config, arguments.force):
            print(f"medlora: --force: {doubt}", file=sys.stderr)
    folders = []
    for config in configs:
        where = arguments.run_dir or mirror.join(config.storage.folder, config.name)
        folders.append(open_run(mirror.find_copy(where, config.storage.cache)))
    from medlora.artifacts.adapter_origin import shorten_place
    from medlora.planning.forecast import Forecast
    from medlora.reporting.progress import Display
    from medlora.reporting.tables import print_next, print_report

    if len(configs) > 1:
        return run_several(configs, folders)
    (config,), (run,) = configs, folders
    with (
        hold_file_lock(run.lock, f"run {run.root}"),
        mirror.hold_run(run.root),
        log_to((logging.getLogger("medlora.run"), run.log)),
        Display(phases={phase.name: phase.description for phase in config.phases}, outlook=Forecast()) as display,
    ):
        endings.describe_progress(lambda: describe_progress(run, [p.name for p in config.phases]), run.log)
        from medlora.drivers.curriculum import run_curriculum

        outcome = run_curriculum(config, run, arguments.redo, display.show)
    print_report(outcome.report, outcome.worked)
    print(f"run: {mirror.name_place(run.root)}")
    if outcome.report is not None:
        print_next(run.evaluation)
    stage = f"{shorten_place(run.root)}:{config.phases[-1].name}"
    print(f"next: medlora chat {stage}\nnext: medlora export {stage} out")
    return 0


def run_several(configs: Sequence[RunConfig], folders: Sequence[RunFolder]) -> int:
    """Runs side by side; everything that can be wrong with any of them is said before one starts."""
    from medlora import endings
    from medlora.drivers.curriculum import begin
    from medlora.drivers.side_by_side import run_side_by_side
    from medlora.errors import InputError, RunError
    from medlora.planning.forecast import Forecast
    from medlora.reporting.progress import Display
    from medlora.reporting.tables import print_reports
    from medlora.runs import mirror
    from medlora.runs.disk_errors import explain
    from medlora.runs.environment import log_to
    from medlora.runs.locks import hold_file_lock

    names = [run.name for run in folders]
    if len(set(names)) < len(names):
        raise InputError(f"runs side by side need names that differ, found {', '.join(names)}; set name in each config")
    with ExitStack() as held:
        first = held.enter_context(Display())
        begun = []
        for config, run in zip(configs, folders, strict=True):
            held.enter_context(hold_file_lock(run.lock, f"run {run.root}"))
            held.enter_context(mirror.hold_run(run.root))
            held.enter_context(log_to((logging.getLogger(f"medlora.run.{run.name}"), run.log)))
            endings.describe_progress(lambda: _describe_several(configs, folders), folders[0].log)
            phases = {phase.name: phase.description for phase in config.phases}
            display = Display(name=run.name, beside=first, phases=phases, outlook=Forecast())
            begun.append(begin(config, run, None, display.show))
        ends = run_side_by_side(begun)
    failed = {
        run.name: explain(end, run.root) or end
        for run, end in zip(folders, ends, strict=True)
        if isinstance(end, Exception)
    }
    outcomes = {name: end for name, end in zip(names, ends, strict=True) if not isinstance(end, Exception)}
    print_reports(
        {name: end.report for name, end in outcomes.items()},
        bool(failed) or any(end.worked for end in outcomes.values()),
    )
    for run in folders:
        print(f"run: {mirror.name_place(run.root)}" + (" (failed)" if run.name in failed else ""))
    for name, error in failed.items():
        if not isinstance(error, InputError | RunError):
            traceback.print_exception(error)
        print(f"medlora: {name}: {error}", file=sys.stderr)
    return 0 if not failed else 2 if all(isinstance(error, InputError) for error in failed.values()) else 1


def _describe_several(configs: Sequence[RunConfig], folders: Sequence[RunFolder]) -> str:
    from medlora.runs.folders import describe_progress

    each = [
        f"{run.name}: {describe_progress(run, [p.name for p in config.phases])}"
        for config, run in zip(configs, folders, strict=True)
    ]
    return "; ".join(each)
