"""Several curricula at the same time on one cluster."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medlora import endings, events
from medlora.drivers.curriculum import Begun, Outcome, connect_for, finish

if TYPE_CHECKING:
    from medlora.on_ray.cluster import Cluster


def run_side_by_side(begun: Sequence[Begun]) -> list[Outcome | Exception]:
    """Runs that were begun, at the same time, each on the GPUs and CPUs that its placement asks for.

    A later error in one ends it alone, is reported to its `on_event`, and takes its place in the result.
    """
    ends: list[Outcome | Exception | None] = [each.outcome for each in begun]

    def follow(i: int, cluster: Cluster) -> None:
        try:
            ends[i] = finish(begun[i], cluster)
        except KeyboardInterrupt:  # a signal ends the job, whose main thread reports it
            return
        except Exception as error:  # the caller reports it, once the others have ended
            if endings.is_ending():
                return
            ends[i] = error
            text = (
                f"ends here, the others continue: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
            )
            begun[i].on_event(events.note("run", text))

    active = [i for i, end in enumerate(ends) if end is None]
    if active:
        with connect_for([begun[i] for i in active]) as cluster:
            # Daemons: Ctrl-C ends the driver, and Ray then ends their work.
            threads = [
                threading.Thread(target=follow, args=(i, cluster), name=begun[i].config.name, daemon=True)
                for i in active
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(timeout=0.5)
    return [end for end in ends if end is not None]
