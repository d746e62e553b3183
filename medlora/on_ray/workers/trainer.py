"""The Ray Train trainer of a phase: which processes it starts beside the workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from medlora.on_ray.workers.leaving import AloneConfig

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.v2._internal.execution.worker_group import Worker
    from ray.train.v2.api.result import Result


class PhaseTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train without what a phase has no use for; each of its helpers is a process that imports Ray for 1.4 s or more.

    - The workers are led from the driver instead of an actor beside it. So nothing is left of a phase when its driver
      dies, and no phase is lost by the death of a process that only leads. SIGINT stays with `endings`: Ray Train's own
      handler, for an actor, prints nothing and always exits with 1.
    - No actor for datasets: none is given to it.
    - No cleaner of placement groups: Ray frees the group when the job ends. The cleaner asks to exit in a thread, so that
      a driver that dies leaves it behind for good (2.60).
    """

    def _initialize_and_run_controller(self, **given: object) -> Result:
        # What it logs as an error it also raises; the terminal is the driver's.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        controller = _Controller(**given)
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    def _init_train_context_on_workers(
        self, workers: Sequence[Worker], sync_actor: ActorHandle, given: Mapping[str, Sequence[object]]
    ) -> None:
        """As Ray Train's, but for the controller's own handle, of which workers would ask for checkpoints of Ray Train."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in given.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _WorkerGroup


def set_up_workers(workers: int, gpu: bool) -> BackendConfig:
    """How Ray Train sets the workers of a phase up."""
    if workers == 1:
        return AloneConfig()
    from medlora.on_ray.workers.process_group import LeavingTorchConfig

    return LeavingTorchConfig(backend="nccl" if gpu else "gloo")
