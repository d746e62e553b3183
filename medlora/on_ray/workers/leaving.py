"""When a training worker leaves its phase with a checkpoint: its node is drained, it got SIGTERM, or its driver ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

import ray
from ray.train.backend import Backend, BackendConfig

from medlora.on_ray.inbox import Inbox

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

_TERMINATED = threading.Event()
"""This process got SIGTERM."""


_ASKED = threading.Event()
"""The driver of this process wants a checkpoint."""


_WATCHED: set[str] = set()
"""The inboxes whose drivers may ask for it."""


def is_leaving() -> bool:
    """Whether this worker should make a checkpoint and leave.

    `ray.train.get_preemption_info` would report a drained node, too. It asks an actor that every step would wait for,
    and that may be on the node that leaves.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    drained = get_train_context().preemption_context.preemption_info is not None
    return drained or _TERMINATED.is_set() or _ASKED.is_set()


def explain_leaving() -> str:
    """Why this worker has left; empty where another worker or the driver wanted it."""
    from ray.train.v2._internal.execution.context import get_train_context

    if _TERMINATED.is_set():
        return "its process got SIGTERM"
    drained = get_train_context().preemption_context.preemption_info is not None
    return "its node is about to be taken away" if drained else ""


def watch_inbox(inbox: Inbox) -> threading.Event:
    """The event that is set when the driver asks its workers to leave."""
    if inbox.name in _WATCHED:
        return _ASKED

    def wait() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the driver ended without asking
            if inbox.wait_to_leave():
                _ASKED.set()

    _WATCHED.add(inbox.name)
    threading.Thread(target=wait, name="medlora-leaving", daemon=True).start()
    return _ASKED


def take_sigterm() -> None:
    """Let SIGTERM ask for a checkpoint; to be called in a worker's main thread. Without it Ray ends the worker at once."""
    signal.signal(signal.SIGTERM, lambda signum, frame: _TERMINATED.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # where the driver's own Ray inherited the block


class _AloneBackend(Backend):  # type: ignore[misc]
    def on_start(self, worker_group: WorkerGroup, backend_config: BackendConfig) -> None:
        worker_group.execute(take_sigterm)


class AloneConfig(BackendConfig):  # type: ignore[misc]
    """Ray Train's set-up of a single worker: it has nobody to talk to, so the driver does not import torch."""

    @property
    def backend_cls(self) -> object:
        """The class that sets the worker up."""
        return _AloneBackend
