"""What a run will do, without starting it: phases, steps, memory, time, disk, what is reused, what to beware of.

medlora plan --config my.yaml --set phases.01.epochs=2
medlora plan my.yaml --json                        for programs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medlora.cli.common import find_config
from medlora.errors import InputError

if TYPE_CHECKING:
    from medlora.config.run import RunConfig
    from medlora.planning.figures import RunPlan


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, metavar="CONFIG", help="the run config (default: the quickstart)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key; repeatable"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder (default: <storage.folder>/<name>)")
    parser.add_argument(
        "--force", action="store_true", help="as in train: adapters in `start` of another base or stage"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--cluster", action="store_true", help="also ask the Ray cluster whether it has room for it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the plan is printed; raises InputError for what `train` would refuse."""
    arguments = parse(argv)
    if arguments.file and arguments.config:
        raise InputError("name the config once: as CONFIG or as --config FILE")
    from medlora.config.loading.files import load

    path = arguments.file or arguments.config or find_config("quickstart.yaml")
    config = load(path, arguments.overrides)
    show_plan(config, arguments.run_dir, arguments.force, as_json=arguments.json, ask_cluster=arguments.cluster)
    return 0


def show_plan(
    config: RunConfig, run_dir: str | None, force: bool, as_json: bool = False, ask_cluster: bool = False
) -> None:
    """Print the plan of a run whose inputs are checked first; nothing is written."""
    from medlora.curriculum.checks import check_inputs
    from medlora.planning.memory import guess_device, settle_quantization
    from medlora.planning.plan import make_plan
    from medlora.planning.table import print_plan
    from medlora.runs import mirror
    from medlora.runs.folders import RunFolder

    config, chosen = settle_quantization(config)
    if chosen:
        print(f"medlora: {chosen}", file=sys.stderr)
    for doubt in check_inputs(config, force):
        print(f"medlora: --force: {doubt}", file=sys.stderr)
    where = run_dir or mirror.join(config.storage.folder, config.name)
    run = RunFolder(Path(os.path.abspath(mirror.find_copy(where, config.storage.cache).expanduser())))
    plan = make_plan(config, run, guess_device(config.placement))
    if ask_cluster:
        plan = _ask_cluster(config, plan)
    if as_json:
        print(json.dumps(plan.as_plain(), indent=2, ensure_ascii=False))
    else:
        print_plan(plan)


def _ask_cluster(config: RunConfig, plan: RunPlan) -> RunPlan:
    """The plan with what the cluster has, and which phases its cards may be too small for; raises InputError where it never has room for a phase or the evaluation."""
    from medlora.drivers.curriculum import find_evaluation_placement
    from medlora.on_ray.cluster import connect
    from medlora.on_ray.placement import check_placement
    from medlora.planning.memory import find_memory_warnings

    with connect() as cluster:
        for phase in config.phases:
            key = f"phases.{phase.name}.placement" if phase.placement else "placement"
            check_placement(phase.placement or config.placement, cluster, key)
        if config.evaluation is not None:
            placement, key = find_evaluation_placement(config)
            check_placement(placement, cluster, key)
        cards = {name for node, _ in cluster.kinds() for name in node.accelerators}
        warnings = (*plan.warnings, *find_memory_warnings(plan, cards))
        return replace(plan, cluster=f"{cluster}, which has room for every phase", warnings=warnings)
