"""What ended a worker: its own exception, which would come again, or a death that another attempt may survive."""

from __future__ import annotations

import re
import socket
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medlora import events
from medlora.events import Failure

if TYPE_CHECKING:
    from medlora.on_ray.inbox import Inbox

_LOST_PEER = re.compile(
    r"gloo|NCCL|connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out waiting \d+ ?ms|socket ?timeout"
    r"|watchdog caught collective|process group watchdog",
    re.IGNORECASE,
)
"""How torch's collectives complain when another worker has gone."""


class WorkerFailed(Exception):
    """A worker's own exception as plain text, which travels to the driver without its class being unpickled there.

    `lost_peer`: it means only that another worker could not be reached.
    """

    def __init__(self, text: str, lost_peer: bool = False) -> None:
        super().__init__(text, lost_peer)
        self.text, self.lost_peer = text, lost_peer

    def __str__(self) -> str:
        return self.text


def describe_exception(error: BaseException) -> Failure:
    """An exception as plain text: `text` in one line, `at` its innermost place outside of libraries, `traceback`."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("site-packages", sysconfig.get_path("stdlib"))
    ours = [frame for frame in frames if not any(part in frame.filename for part in libraries)]
    place = (ours or frames)[-1] if frames else None
    lines = str(error).strip().splitlines()
    return {
        "text": f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__,
        "at": f"{Path(place.filename).name}:{place.lineno} in {place.name}" if place else "an unknown place",
        "traceback": "".join(traceback.format_exception(error)),
        "host": socket.gethostname(),
    }


def is_lost_peer(error: BaseException) -> bool:
    """Whether a worker's exception is that of a collective whose other side has gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_LOST_PEER.search(str(error)))


def is_death(error: BaseException | None) -> bool:
    """Whether Ray reports with this that a process, a node or the way to it was lost, and no exception of ours.

    Ray Train 2.60 reports a worker's own exception as it was raised, older versions within
    `UserExceptionWithTraceback`. An exception that cannot be pickled comes as a failed health check.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.train.v2._internal import exceptions as train

    if isinstance(error, train.UserExceptionWithTraceback):
        return is_death(error._base_exc)
    if isinstance(error, train.WorkerHealthCheckFailedError):
        return is_death(error.health_check_failure)
    if isinstance(error, RayTaskError):  # raised by code that ran, here or in another actor
        return error.cause is not error and is_death(error.cause)
    if isinstance(error, train.InsufficientClusterResourcesError | train.CheckpointManagerInitializationError):
        return False
    return isinstance(error, RayError | train.RayTrainError)


def split_failures(failures: Mapping[int, BaseException]) -> tuple[list[int], dict[int, BaseException]]:
    """The ranks that died or lost another worker, and the exceptions of the others, by rank."""
    own: dict[int, BaseException] = {}
    for rank, error in failures.items():
        lost_peer = error.lost_peer if isinstance(error, WorkerFailed) else is_lost_peer(error)
        if not is_death(error) and not lost_peer:
            own[rank] = error
    return sorted(set(failures) - set(own)), own


def describe_lost(failures: Mapping[int, BaseException], ranks: list[int]) -> str:
    """`worker 0, 2 died`, or that workers lost each other where no death was seen."""
    dead = [rank for rank in ranks if is_death(failures[rank])]
    if dead:
        return f"worker {', '.join(map(str, dead))} died"
    return f"worker {', '.join(map(str, ranks))} lost the connection to another worker"


def report_failure(inbox: Inbox, error: BaseException, rank: int = 0) -> None:
    """Send the driver what its message and its log need."""
    inbox.put(events.failed(rank, describe_exception(error)))
