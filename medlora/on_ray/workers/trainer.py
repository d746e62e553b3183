"""The Ray Train trainer of a phase: which processes it starts beside the workers, and what it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from medlora import events
from medlora.on_ray.inbox import Inbox
from medlora.on_ray.workers.leaving import AloneConfig

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup


class PhaseTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train without what a phase has no use for; each of its helpers is a process that imports Ray for 1.4 s.

    - SIGINT is left to `endings`: Ray Train's handler prints nothing and always exits with 1.
    - No actor for datasets: none is given to it.
    - No cleaner of placement groups: a driver that dies leaves that detached actor behind for good (2.60), since it
      asks to exit in a thread. Ray frees the group when the job ends, `free_group` when only the controller has died.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        pass

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]


class TellGroup(WorkerGroupCallback):  # type: ignore[misc]
    """Reports the placement group of a phase's workers to the driver."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Called in the controller, before the workers begin."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self.inbox.put(events.reserved(group.id.hex()))


def free_group(group: str) -> None:
    """Free the placement group of that id, which its controller can no longer do; nothing happens if it is free."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def set_up_workers(workers: int, gpu: bool) -> BackendConfig:
    """How Ray Train sets the workers of a phase up."""
    if workers == 1:
        return AloneConfig()
    from medlora.on_ray.workers.process_group import LeavingTorchConfig

    return LeavingTorchConfig(backend="nccl" if gpu else "gloo")
