"""Several training workers that talk to each other through torch; only who needs them imports this, and torch with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.train.torch import TorchConfig

from medlora.on_ray.workers.leaving import take_sigterm

if TYPE_CHECKING:
    from ray.train.backend import BackendConfig
    from ray.train.v2._internal.execution.worker_group import WorkerGroup


@dataclass
class LeavingTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's set-up of workers for torch, after which SIGTERM asks a worker for a checkpoint."""

    @property
    def backend_cls(self) -> object:
        """The class that sets the workers up."""

        class _Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: WorkerGroup, backend_config: BackendConfig) -> None:
                super().on_start(worker_group, backend_config)
                worker_group.execute(take_sigterm)

        return _Backend
