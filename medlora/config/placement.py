"""Where work runs and where runs are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medlora.config.base import Section


class Placement(Section):
    """Where on the cluster something runs."""

    workers: int = Field(1, ge=1)
    """Data-parallel training workers; the global batch is split over them."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """Fractions share a GPU; unset = 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: int = Field(1, ge=1)
    """Also the number of torch threads, which the bytes of a result depend on."""
    accelerator_type: str | None = None
    """Ray's name of an accelerator, e.g. `H200`, `A100-80G`, `L4`."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a worker's node must have."""
    retries: int = Field(2, ge=0)
    """How often a phase resumes from its last checkpoint after a worker or node died."""
    stall_s: float = Field(600, gt=0)
    """Report a worker or actor every minute, with what it did last and a stack, once no step has come from it for so long."""
    stall_kill_s: float | None = Field(None, gt=0)
    """End it after so long, as if it had died; unset = never. More than the longest step, model load or compilation."""
    grace_s: float = Field(20.0, ge=0)
    """How long the job waits for a checkpoint when SIGTERM ends it; less than the time until SIGKILL, which is 30 s in
    Kubernetes and Slurm. `ray job stop` leaves 3 s in all, whatever the value here."""

    @model_validator(mode="after")
    def _check_stall(self) -> Self:
        if self.stall_kill_s is not None and self.stall_kill_s < self.stall_s:
            raise ValueError(
                f"stall_kill_s: {self.stall_kill_s:g} is less than stall_s: {self.stall_s:g}; a stall is reported before it ends"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, object]:
        # As for sources: sweeps that are finished hold a dump of their phases' placements in their fingerprints.
        later = {"stall_s": 600, "stall_kill_s": None, "grace_s": 20.0}
        dumped: dict[str, object] = serialise(self)
        return {key: value for key, value in dumped.items() if key not in later or value != later[key]}

    @property
    def least_workers(self) -> int:
        """How many the cluster must have room for."""
        return self.workers


class ActorPlacement(Placement):
    """Where on the cluster questions are answered; `workers` are actors that each hold the base once."""

    min_workers: int | None = Field(None, ge=1)
    """Begin with so many actors and grow up to `workers` as the cluster has room; unset = all of them from the start."""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        return self

    @property
    def least_workers(self) -> int:
        return self.min_workers or self.workers


class Storage(Section):
    """Where files are stored."""

    folder: str = "runs"
    """The folder of all runs; on a cluster, a mount that every node sees, or `s3://bucket/folder` or `gs://bucket/folder`.
    Endpoint and credentials of a store come from the environment."""
    cache: str | None = None
    """Where a miniature base, tokens and working copies of runs in a store are saved; unset = `~/.cache/medlora`."""

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache` names, or the default one."""
        return find_cache_folder(self.cache)


def find_cache_folder(cache: str | None = None) -> Path:
    """Where a miniature base, tokens and working copies are cached: the folder that a config names, or the default."""
    return Path(cache or "~/.cache/medlora").expanduser().absolute()
