"""Train a base model through a curriculum of phases and score every stage.

python jobs/curriculum.py                                   the miniature, configs/quickstart.yaml
python jobs/curriculum.py --config configs/medgemma-4b.yaml --set phases.01.learning_rate=5e-5
ray job submit --working-dir . -- python jobs/curriculum.py --config ... --run-dir /shared/runs/mine
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what can be set in the config has no flag of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help="the run config (default: configs/quickstart.yaml)"
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the run is done, 2 when something the user gave is wrong, 130 when interrupted."""
    arguments = parse(argv)
    from medlora.errors import InputError

    try:
        from medlora import runs, storage
        from medlora.config_file import load
        from medlora.lineage import check_inputs

        config = load(arguments.config, arguments.overrides)
        check_inputs(config)
        where = arguments.run_dir or storage.join(config.storage.folder, config.name)
        run = runs.open_run(storage.find_copy(where, config.storage.cache))
        from medlora.display import Display, print_report

        with (
            runs.hold(run.lock, f"run {run.root}"),
            storage.hold(run.root),
            runs.log_to((logging.getLogger("medlora.run"), run.log)),
            Display() as display,
        ):
            from medlora.on_ray.curriculum import run_curriculum

            outcome = run_curriculum(config, run, arguments.redo, display.show)
        print_report(outcome.report, outcome.worked)
        print(f"run: {storage.name_place(run.root)}")
        return 0
    except InputError as error:
        print(f"medlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("medlora: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # Ray's workers outlive an interpreter that is torn down in the wrong order; nothing is left to do here.
    sys.exit(main())
