"""Write a stage of a run as one ordinary PEFT adapter: its whole chain, joined exactly.

medlora export runs/quickstart:02 out/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medlora.curriculum.chains import find_chain
from medlora.errors import InputError
from medlora.evaluation.stages import find_run
from medlora.runs.folders import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the adapter is written; raises InputError for a stage or a folder that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="RUN:STAGE", help="a run's folder or URI and one of its phases")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--force", action="store_true", help="join adapters that were made for different bases")
    arguments = parser.parse_args(argv)
    run, _, stage = arguments.stage.rpartition(":")
    if not run or "/" in stage:
        raise InputError(f"{arguments.stage}: write RUN:STAGE, e.g. runs/quickstart:02")
    if arguments.out.exists():
        raise InputError(f"{arguments.out}: is there already; name a new folder")
    chain = find_chain(RunFolder(find_run(run, None)), stage)
    for link in chain:
        if not Path(link.folder).is_dir():
            raise InputError(f"{link.folder}: phase {link.name} is not finished; train it first")
    from medlora.model.export import export_chain

    export_chain([link.folder for link in chain], arguments.out, force=arguments.force)
    print(f"adapter: {arguments.out} ({' + '.join(link.name for link in chain)})")
    return 0
