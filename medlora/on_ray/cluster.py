"""Connect to Ray, see what is there, turn "one GPU" into resources."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.config import Placement
from medlora.errors import InputError

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Sources are named relative to where the driver runs, not to Ray Train's own folder.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray  # noqa: E402
from ray.util.queue import Empty, Queue  # noqa: E402

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Cluster:
    """What Ray has: CPUs, GPUs, kinds of accelerators, labels of its nodes."""

    cpus: float
    gpus: float
    accelerators: tuple[str, ...]
    labels: tuple[dict[str, str], ...]
    nodes: int
    started_here: bool

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.accelerators)})" if self.accelerators else ""
        return f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs, {self.gpus:g} GPUs{kinds}"


@contextmanager
def connect() -> Iterator[Cluster]:
    """Connect to the running cluster, or start a local one with token authentication where there is none.

    RAY_ADDRESS names the cluster where several are there; `local` starts one whatever is there. Whatever was started here
    ends with the block; a cluster that was found is only left.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    already = ray.is_initialized()
    started_here = False
    if not already:
        try:
            if os.environ.get("RAY_ADDRESS") == "local":
                raise ConnectionError
            ray.init(address="auto", **options)
        except ConnectionError:
            # Ray 2.60 turns token authentication on for a cluster of its own when RAY_AUTH_MODE is not set.
            _write_token()
            with _on_loopback():
                ray.init(address="local", include_dashboard=False, **options)
            started_here = True
    try:
        yield _look_around(started_here)
    finally:
        if not already:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen on 127.0.0.1 alone: its servers listen on every address (2.60) unless the
    node's own is that one, which `_node_ip_address` refuses to be; this switch, meant for laptops, is the way."""
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


def _write_token() -> None:
    """A token that its owner alone can read, where there is none: Ray would write one for everybody (2.60)."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(path.stat().st_mode & ~0o077)


def _look_around(started_here: bool) -> Cluster:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    kinds = sorted(name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    labels = tuple(node.get("Labels", {}) for node in nodes)
    return Cluster(resources.get("CPU", 0), resources.get("GPU", 0), tuple(kinds), labels, len(nodes), started_here)


def count_gpus(placement: Placement, cluster: Cluster) -> float:
    """GPUs that one worker gets: as configured, else one where the cluster has any."""
    return placement.gpus_per_worker if placement.gpus_per_worker is not None else float(cluster.gpus > 0)


def check_placement(placement: Placement, cluster: Cluster, key: str) -> None:
    """Raise InputError when the cluster can never hold the placement, saying what it has."""
    workers = placement.least_workers
    gpus = workers * count_gpus(placement, cluster)
    if gpus > cluster.gpus:
        raise InputError(
            f"{key}: {workers} workers x {count_gpus(placement, cluster):g} GPUs = {gpus:g} GPUs asked; the cluster has {cluster}; "
            f"lower {key}.workers or {key}.gpus_per_worker, or add nodes"
        )
    cpus = workers * placement.cpus_per_worker
    if cpus > cluster.cpus:
        raise InputError(
            f"{key}: {workers} workers x {placement.cpus_per_worker} CPUs = {cpus} CPUs asked; the cluster has {cluster}; "
            f"lower {key}.cpus_per_worker"
        )
    if placement.accelerator_type and placement.accelerator_type not in cluster.accelerators:
        raise InputError(
            f"{key}.accelerator_type: {placement.accelerator_type!r} is not there; the cluster has {cluster}"
        )
    wanted = placement.label_selector
    if wanted and not any(
        all(labels.get(name) == value for name, value in wanted.items()) for labels in cluster.labels
    ):
        raise InputError(f"{key}.label_selector: no node has {wanted}; the nodes have {list(cluster.labels)}")


@contextmanager
def listen(on_event: OnEvent) -> Iterator[Queue]:
    """An inbox that workers put plain dicts into; each is handed to `on_event` in a thread of the driver, in order."""
    inbox = Queue(actor_options={"num_cpus": 0})
    ended = threading.Event()

    def deliver() -> None:
        while True:
            try:
                on_event(inbox.get(timeout=0.2))
            except Empty:
                if ended.is_set():
                    return

    thread = threading.Thread(target=deliver, name="medlora-inbox", daemon=True)
    thread.start()
    try:
        yield inbox
    finally:
        ended.set()
        thread.join(timeout=10)
        inbox.shutdown(force=True)


def quiet_ray_data() -> None:
    """No bars and warnings of Ray Data's own: our display shows how far it is."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
