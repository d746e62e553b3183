"""Death, torn writes, power loss and failing writes at every file event of a driver's start, a checkpoint and a commit.

    python benchmarks/faults/events.py                         all, about half an hour on 2 cores
    python benchmarks/faults/events.py --every 5               every fifth event
    python benchmarks/faults/events.py --faults kill,ENOSPC    these alone

After each fault the same command is given again: it must end well, with the same adapter bytes as a run without faults.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import Row, drive, hash_weights, is_one_message, is_whole, make_config, run_in_fork, start_over, warm_up
from injection import KILL, POWER, TEAR, Injector

PLACES = ("start", "save", "commit")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EMFILE")


def drive_with_fault(config: Any, folder: Path, place: str, injector: Injector) -> None:
    """A run whose injector is armed at its start, at its last checkpoint, or where its adapter is written at the end."""
    from medlora.drivers import curriculum
    from medlora.training import phase, trainer

    if place == "start":
        injector.arm()
        begin = curriculum.begin

        def end_after_start(*arguments: Any) -> Any:
            begun = begin(*arguments)
            injector.on = False
            return begun

        curriculum.begin = end_after_start
    elif place == "save":
        save = trainer._AdapterTrainer._save_checkpoint

        def save_armed(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == config.phases[0].max_steps:
                injector.arm()
            return save(self, *arguments, **options)

        trainer._AdapterTrainer._save_checkpoint = save_armed  # type: ignore[method-assign]
        _stop_before(phase, "save_adapter", injector)
    else:
        adapter = phase.save_adapter

        def adapter_armed(*arguments: Any, **options: Any) -> Any:
            injector.arm()
            return adapter(*arguments, **options)

        phase.save_adapter = adapter_armed
    drive(config, folder)
    if injector.fault == POWER and injector.at == 0:
        injector.cut_power()  # right after the command has ended well


def _stop_before(module: Any, name: str, injector: Injector) -> None:
    act = getattr(module, name)

    def first_stop(*arguments: Any, **options: Any) -> Any:
        injector.on = False
        return act(*arguments, **options)

    setattr(module, name, first_stop)


def prepare(config: Any, place: str, scratch: Path) -> None:
    """The run as it is just before a place, in `scratch`/before: each trial goes on from a copy of it."""
    start_over(scratch / "before")
    if place != "start":
        run_in_fork(lambda: drive_with_fault(config, scratch / "before", place, _Dying()), scratch / "log")
        assert (scratch / "before" / "run.json").is_file(), (scratch / "log").read_text()


class _Dying(Injector):
    """Ends the process where it is armed."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), None)

    def arm(self) -> None:
        os._exit(137)


def go_back(scratch: Path, folder: Path) -> None:
    """Make a folder what the run was before the place of the fault."""
    start_over(folder)
    if (scratch / "before").exists():
        shutil.copytree(scratch / "before", folder)


def list_events(config: Any, place: str, scratch: Path) -> list[tuple[str, str]]:
    """The file events of a place in a run without fault."""
    prepare(config, place, scratch)
    go_back(scratch, scratch / "dry")
    injector = Injector(scratch / "dry", None)

    def act() -> None:
        drive_with_fault(config, scratch / "dry", place, injector)
        injector.on = False
        (scratch / "events.json").write_text(json.dumps(injector.events))

    status, text = run_in_fork(act, scratch / "log")
    assert status == 0, text
    return [(kind, name) for kind, name in json.loads((scratch / "events.json").read_text())]


def try_every_event(config: Any, place: str, fault: str, scratch: Path, every: int = 1, events: Any = None) -> Row:
    """A fault at every event of a place, each in a run of its own that is then taken up again."""
    events = events or list_events(config, place, scratch)
    code: str | int = getattr(errno, fault) if fault in ERRORS else fault
    if not (scratch / "whole").exists():
        assert run_in_fork(lambda: drive(config, scratch / "whole"), scratch / "log")[0] == 0
    wanted = hash_weights(scratch / "whole")
    row = Row(f"{place}, {fault}")
    points = [*range(1, len(events) + 1, every), *([0] if fault == POWER and place == "commit" else [])]
    for at in points:
        folder = scratch / "run"
        go_back(scratch, folder)
        injector = Injector(folder, at, code)
        first, text = run_in_fork(lambda: drive_with_fault(config, folder, place, injector), scratch / "log")  # noqa: B023
        died = first in (137, 0) if code in (KILL, TEAR, POWER) else is_one_message(first, text)
        second, more = run_in_fork(lambda: drive(config, folder), scratch / "log")  # noqa: B023
        right = died and second == 0 and hash_weights(folder) == wanted and is_whole(folder)
        name = " ".join(events[at - 1]) if at else "after the end"
        row.add(right, f"{at} ({name}): {first}, then {second}: {(text + more).strip()[-400:]}")
    return row


def main() -> None:
    """Print a table row for each place and fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--faults", default=",".join((KILL, TEAR, POWER, *ERRORS)))
    parser.add_argument("--places", default=",".join(PLACES))
    arguments = parser.parse_args()
    # In memory, where there is such a folder: what a power cut leaves is made by the injector, not by the disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        scratch = Path(name)
        config = make_config(scratch, steps=4)
        warm_up(config, scratch / "whole")
        for place in arguments.places.split(","):
            events = None
            for fault in arguments.faults.split(","):
                events = events or list_events(config, place, scratch)
                began = time.monotonic()
                row = try_every_event(config, place, fault, scratch, arguments.every, events)
                row.show()
                print(f"  {(time.monotonic() - began) / max(row.tried, 1):.2f} s a trial", flush=True)


if __name__ == "__main__":
    main()
