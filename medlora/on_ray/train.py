"""A phase as a Ray Train run."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

from medlora import runs, storage
from medlora.config import Placement
from medlora.errors import InputError
from medlora.lineage import PhaseJob
from medlora.on_ray.cluster import Cluster, OnEvent, count_gpus, listen
from medlora.on_ray.prepare import prepare_on_ray

log = logging.getLogger("medlora.run")


def train_on_ray(
    job: PhaseJob, run: runs.RunFolder, placement: Placement, cluster: Cluster, on_event: OnEvent
) -> dict[str, Any]:
    """Train one phase on the workers its placement asks for and return its manifest.

    A worker or node that dies costs one of `placement.retries`: the phase goes on from its last whole checkpoint, which
    is ours (hashed, sealed by a manifest) rather than Ray's. An exception in the phase is raised at once, since it would
    come again. Raises InputError for what only the user can mend.
    """
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    prepare_on_ray(job, cluster, on_event)
    gpus = count_gpus(placement, cluster)
    folder = run.phase(job.phase.name)
    refusals: list[str] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "refused":
            refusals.append(event["text"])
        else:
            on_event(event)

    each = f"{placement.cpus_per_worker} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    count = f"{placement.workers} worker{'s' * (placement.workers != 1)}"
    on_event({"event": "note", "phase": job.phase.name, "text": f"starting {count} with {each} each"})
    nonce = storage.leave_nonce(run.root)
    attempts = 0
    failure: Exception | None = None
    with listen(hear) as inbox:
        while True:
            # A name of its own for every attempt: Ray Train would take up its own snapshot of an earlier one.
            trainer = TorchTrainer(
                _train_loop,
                train_loop_config={
                    "job": job.model_dump(mode="json"),
                    "folder": str(folder.root),
                    "run": str(run.root),
                    "nonce": nonce,
                    "inbox": inbox,
                    "cwd": os.getcwd(),
                    "gpu": gpus > 0,
                },
                scaling_config=ScalingConfig(
                    num_workers=placement.workers,
                    use_gpu=gpus > 0,
                    resources_per_worker={"CPU": placement.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
                    accelerator_type=placement.accelerator_type,
                    label_selector=placement.label_selector or None,
                ),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RayRunConfig(name=f"{job.phase.name}-{uuid.uuid4().hex[:8]}", storage_path=str(run.ray)),
            )
            try:
                trainer.fit()
                break
            except WorkerGroupError as error:
                died = _find_deaths(error)
                if not died or attempts == placement.retries:
                    failure = error
                    break
                attempts += 1
                text = f"{died}; attempt {attempts} of {placement.retries} to go on from the last checkpoint"
                log.warning("phase %s: %s", job.phase.name, text)
                on_event({"event": "note", "phase": job.phase.name, "text": text})
            finally:
                runs.remove(run.ray)
    if refusals:
        raise InputError(refusals[0])
    if failure is not None:
        raise failure
    storage.pull(folder.root)
    manifest = runs.read_manifest(folder.root)
    if manifest is None:
        raise InputError(
            f"phase {job.phase.name} ended without a manifest in {folder.root}: its worker writes elsewhere; "
            "storage.folder must be a mount that every node sees, or s3:// or gs://"
        )
    return manifest


def _find_deaths(error: Any) -> str:
    """Which workers died (were killed, lost their node), as text; empty when it was an exception of ours."""
    # The one sign of a worker's own exception is this class; all else is Ray's: a lost process, node or heartbeat.
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    dead = [rank for rank, cause in error.worker_failures.items() if not isinstance(cause, UserExceptionWithTraceback)]
    return f"worker {', '.join(map(str, sorted(dead)))} died" if dead else ""


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: rebuild the job from plain values and hand it to `run_phase`."""
    import torch.distributed as dist

    alone = dist.get_world_size() == 1
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])
    if alone:
        # One worker has nobody to talk to: without this Trainer would wrap the model for distributed training.
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    from medlora.phases import run_phase

    inbox = config["inbox"]
    try:
        storage.check_seen(Path(config["run"]), config["nonce"])
        run_phase(
            PhaseJob.model_validate(config["job"]),
            runs.PhaseFolder(Path(config["folder"])),
            inbox.put,
            "cuda" if config["gpu"] else "cpu",
        )
    except InputError as error:
        inbox.put({"event": "refused", "text": str(error)})
        if not alone:
            raise  # so that Ray ends the workers that wait for this one
