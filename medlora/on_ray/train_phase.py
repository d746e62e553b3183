"""A phase as a Ray Train run."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict, cast

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from medlora import endings, events
from medlora.config.placement import Placement
from medlora.curriculum.jobs import PhaseJob
from medlora.errors import InputError, RunError
from medlora.events import Event, Failed, OnEvent
from medlora.on_ray.cluster import Cluster
from medlora.on_ray.inbox import Inbox, listen
from medlora.on_ray.placement import count_gpus, describe_worker, report_while_waiting
from medlora.on_ray.tokenise import prepare_on_ray
from medlora.on_ray.workers.failures import (
    WorkerFailed,
    describe_exception,
    describe_lost,
    is_death,
    is_lost_peer,
    report_failure,
    split_failures,
)
from medlora.on_ray.workers.stalls import StallWatch, beating, find_beat_s
from medlora.on_ray.workers.trainer import PhaseTrainer, set_up_workers
from medlora.runs import mirror
from medlora.runs.disk_errors import explaining
from medlora.runs.files import remove
from medlora.runs.folders import PhaseFolder, RunFolder
from medlora.runs.manifests import PhaseManifest, read_manifest
from medlora.startup import enter_folder, importing


class _Loop(TypedDict):
    """What travels to each worker of a phase."""

    job: dict[str, object]
    folder: str
    run: str
    nonce: str
    inbox: Inbox
    cwd: str
    gpu: bool
    show_host: bool
    beat_s: float


class PlaceWatcher(Protocol):
    """What wants to know when a phase waits for its workers: `drivers.early_scoring.EarlyScoring`."""

    def phase_asks(self, placement: Placement, gpus: float) -> None:
        """The phase asks for its workers, each with so many GPUs."""

    def phase_has(self) -> None:
        """The phase has its workers."""


def train_on_ray(
    job: PhaseJob,
    run: RunFolder,
    placement: Placement,
    cluster: Cluster,
    on_event: OnEvent,
    watcher: PlaceWatcher | None = None,
) -> PhaseManifest:
    """Train one phase on the workers its placement asks for and return its manifest.

    A worker or node that dies costs one of `placement.retries`: the phase resumes from its last whole checkpoint, which
    is ours (hashed, sealed by a manifest) rather than Ray's. A node that is drained (preempted) costs none: the phase
    makes a checkpoint and resumes elsewhere. An exception in the phase ends it at once, since it would come again.
    `watcher` learns when the phase asks for its workers and when it has them. Raises InputError for what only the user
    can fix, RunError for an exception of a worker and for deaths beyond the retries.
    """
    prepare_on_ray(job, cluster, on_event)
    training = _Training(job, run, placement, cluster, on_event, watcher)
    with (
        listen(training.receive) as inbox,
        training.stalls.watching(),
        endings.saving(inbox.ask_to_leave, placement.grace_s) as training.saved,
    ):
        training.run_attempts(inbox)
    if training.refusals:
        raise InputError(training.refusals[0])
    if training.failure is not None:
        raise _explain(training.failure, training.failed, job.phase.name, run, placement)
    return _read_manifest(run, job.phase.name)


class _Training:
    """One phase in training: its attempts on Ray Train, and what its workers have reported."""

    def __init__(
        self,
        job: PhaseJob,
        run: RunFolder,
        placement: Placement,
        cluster: Cluster,
        on_event: OnEvent,
        watcher: PlaceWatcher | None,
    ) -> None:
        self.job, self.run, self.placement, self.cluster = job, run, placement, cluster
        self.on_event, self.watcher = on_event, watcher
        self.phase, self.gpus = job.phase.name, count_gpus(placement, cluster)
        self.log = logging.getLogger(f"medlora.run.{run.name}")
        self.stalls = StallWatch(placement, self.phase, on_event, self.log)
        self.saved, self.begun, self.leaving = threading.Event(), threading.Event(), threading.Event()
        self.refusals: list[str] = []
        self.reasons: list[str] = []
        self.failed: list[Failed] = []
        self.failure: Exception | None = None
        count = f"{placement.workers} worker{'s' * (placement.workers != 1)}"
        self.note(f"starting {count} with {describe_worker(placement, self.gpus)} each")
        self.nonce = mirror.leave_nonce(run.root)

    def note(self, text: str) -> None:
        """Report a line about the phase."""
        self.on_event(events.note(self.phase, text))

    def receive(self, event: Event) -> None:
        """Take an event of a worker."""
        if self.watcher is not None and not self.begun.is_set():
            self.watcher.phase_has()
        self.begun.set()
        if event["event"] == "beat":
            self.stalls.receive(event)
        elif event["event"] == "refused":
            self.refusals.append(event["text"])
        elif event["event"] == "failed":
            self.failed.append(event)
        elif event["event"] == "leaving":
            if event["why"]:
                self.reasons.append(event["why"])
            if event["rank"] == 0:  # which seals the checkpoint
                self.saved.set()
                self.leaving.set()
        else:
            if event["event"] == "training":
                self.saved.clear()
            self.on_event(event)

    def run_attempts(self, inbox: Inbox) -> None:
        """Run the phase until it is finished, or until it fails: then `failure` or `refusals` give the reason."""
        deaths = 0
        while True:
            endings.check()
            trainer = self._make_trainer(inbox)
            self.begun.clear()
            self.stalls.forget()
            self.saved.set()
            if self.watcher is not None:
                self.watcher.phase_asks(self.placement, self.gpus)
            try:
                self._fit(trainer)
                if not self.leaving.is_set():
                    return
                endings.check()
                self.note(f"{self.reasons.pop()}: resumes from the checkpoint just made, on another")
            except PreemptionError:
                endings.check()
                self.note("its node was taken away before a step had ended: resumes from the last checkpoint")
            except (WorkerGroupError, ControllerError) as error:
                endings.check()
                died = _find_deaths(error)
                if not died or self.refusals or deaths == self.placement.retries:
                    self.failure = error
                    return
                deaths += 1
                self.log.warning("phase %s: %s", self.phase, error)
                self.failed.clear()  # of a worker that lost another one; the next attempt reports for itself
                self.note(f"{died}; attempt {deaths} of {self.placement.retries} to resume from the last checkpoint")
            finally:
                remove(self.run.ray)
            self.leaving.clear()

    def _fit(self, trainer: PhaseTrainer) -> None:
        workers = self.placement.workers
        with report_while_waiting(
            self.placement, self.gpus, workers, self.phase, self.begun.is_set, self.on_event, as_group=True
        ):
            trainer.fit()

    def _make_trainer(self, inbox: Inbox) -> PhaseTrainer:
        """A Ray Train run of its own for each attempt: it would take up its own snapshot of an earlier one."""
        placement, gpus = self.placement, self.gpus
        return PhaseTrainer(
            _train_loop,
            train_loop_config={
                "job": self.job.model_dump(mode="json"),
                "folder": str(self.run.phase(self.phase).root),
                "run": str(self.run.root),
                "nonce": self.nonce,
                "inbox": inbox,
                "cwd": os.getcwd(),
                "gpu": gpus > 0,
                "show_host": self.cluster.nodes > 1,
                "beat_s": find_beat_s(placement),
            },
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": placement.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
                accelerator_type=placement.accelerator_type,
                label_selector=placement.label_selector or None,
            ),
            backend_config=set_up_workers(placement.workers, gpus > 0),
            run_config=RayRunConfig(
                name=f"{self.phase}-{uuid.uuid4().hex[:8]}",
                storage_path=str(self.run.ray),
                # Retries are ours: Ray's would take a worker that has left for one that has finished.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        )


def _read_manifest(run: RunFolder, phase: str) -> PhaseManifest:
    folder = run.phase(phase).root
    mirror.pull(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(
            f"phase {phase} ended without a manifest in {folder}: its worker writes elsewhere; "
            "storage.folder must be a mount that every node sees, or s3:// or gs://"
        )
    return cast(PhaseManifest, manifest)


def _find_deaths(error: object) -> str:
    """Which workers died (were killed, lost their node), as text; empty where any of them raised an exception of ours."""
    failures = getattr(error, "worker_failures", None)
    if failures is None:
        return "its workers could not be started" if is_death(getattr(error, "controller_failure", None)) else ""
    lost, own = split_failures(failures)
    return describe_lost(failures, lost) if lost and not own else ""


def _explain(error: object, failed: Sequence[Failed], phase: str, run: RunFolder, placement: Placement) -> RunError:
    """The one message for a phase that cannot be resumed by itself; tracebacks go to the run's log."""
    log = logging.getLogger(f"medlora.run.{run.name}")
    resume = "the same command resumes from the last checkpoint"
    if died := _find_deaths(error):
        log.error("phase %s: %s", phase, error)
        return RunError(
            f"phase {phase}: {died}, after {placement.retries} retries (placement.retries); look for a full memory or "
            f"a lost node in {run.log} and in Ray's logs; {resume}"
        )
    if not failed:  # no worker could report it
        failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
        _, own = split_failures(failures)
        failed = [events.failed(rank, describe_exception(cause)) for rank, cause in (own or failures).items()]
        log.error("phase %s: %s", phase, error)
    for event in failed:
        log.error("phase %s, worker %d on %s:\n%s", phase, event["rank"], event["host"], event["traceback"])
    first = failed[0]
    return RunError(
        f"phase {phase}: {first['text']} (worker {first['rank']} on {first['host']}, {first['at']}); it would come again, so "
        f"it is not retried. The traceback is in {run.log}; once the cause is fixed, {resume}"
    )


def _train_loop(config: _Loop) -> None:
    """What each Ray Train worker runs: rebuild the job from plain values and hand it to `run_phase`."""
    import ray.train

    alone = ray.train.get_context().get_world_size() == 1
    enter_folder(config["cwd"])
    with importing():
        from medlora.on_ray.workers.leaving import explain_leaving, is_leaving, watch_inbox
        from medlora.training.callbacks import Leaving
        from medlora.training.phase import run_phase

    inbox = config["inbox"]
    watch_inbox(inbox)
    if config["show_host"]:
        text = f"worker {ray.train.get_context().get_world_rank()} runs on {socket.gethostname()}"
        inbox.put(events.note(Path(config["folder"]).name, text))
    try:
        with explaining(Path(config["run"])):
            mirror.check_seen(Path(config["run"]), config["nonce"])
        with beating(inbox, f"worker {ray.train.get_context().get_world_rank()}", config["beat_s"]):
            run_phase(
                PhaseJob.model_validate(config["job"]),
                PhaseFolder(Path(config["folder"])),
                inbox.put,
                "cuda" if config["gpu"] else "cpu",
                is_leaving=is_leaving,
            )
    except Leaving:
        rank = ray.train.get_context().get_world_rank()
        inbox.put(events.leaving(explain_leaving(), rank))
    except InputError as error:
        inbox.put(events.refused(str(error)))
        if not alone:
            raise  # so that Ray ends the workers that wait for this one
    except Exception as error:
        lost_peer = not alone and is_lost_peer(error)
        if not lost_peer:
            report_failure(inbox, error, ray.train.get_context().get_world_rank())
        raise WorkerFailed(describe_exception(error)["text"], lost_peer) from None
