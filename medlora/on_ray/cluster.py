"""Connect to Ray, and see what nodes there are."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from medlora import endings
from medlora.errors import InputError
from medlora.on_ray.address import START_S, explain_slow_start, find_ray
from medlora.runs.files import read_json

_ACCELERATOR = "accelerator_type:"


_WATCHES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's setting; in a Ray of this job's own nobody takes a node away, so no phase needs a process that watches."""


_OPTIONS: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}


@dataclass(frozen=True)
class Node:
    """What one node has: CPUs, GPUs, kinds of accelerators, labels."""

    cpus: float
    gpus: float
    accelerators: tuple[str, ...]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
        """A node from Ray's words for it."""
        kinds = sorted(key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR))
        return cls(resources.get("CPU", 0), resources.get("GPU", 0), tuple(kinds), dict(labels))

    def is_like(self, kind: Node) -> bool:
        """Whether this may be one of that kind: as large, with at least its accelerators and labels."""
        same = (self.cpus, self.gpus) == (kind.cpus, kind.gpus) and set(kind.accelerators) <= set(self.accelerators)
        return same and kind.labels.items() <= self.labels.items()

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.accelerators)})" if self.accelerators else ""
        shown = [f"{key}={value}" for key, value in sorted(self.labels.items()) if not key.startswith("ray.io/")]
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{kinds}" + (f", {' '.join(shown)}" if shown else "")


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, and those that its autoscaler may add, each with how many of them."""

    there: tuple[Node, ...]
    may_add: tuple[tuple[Node, int], ...] = ()
    grows_unseen: bool = False
    """An autoscaler adds nodes of kinds that are not known here."""
    started_here: bool = False

    @property
    def nodes(self) -> int:
        """Nodes that are there."""
        return len(self.there)

    @property
    def cpus(self) -> float:
        """CPUs that are there."""
        return sum(node.cpus for node in self.there)

    def kinds(self) -> list[tuple[Node, int]]:
        """Every node that is there or may come, and how many of it."""
        return [*((node, 1) for node in self.there), *self.may_add]

    def __str__(self) -> str:
        accelerators = sorted({kind for node in self.there for kind in node.accelerators})
        kinds = f" ({', '.join(accelerators)})" if accelerators else ""
        gpus = sum(node.gpus for node in self.there)
        text = f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs, {gpus:g} GPUs{kinds}"
        if self.may_add:
            text += "; its autoscaler may add " + ", ".join(f"{count} x [{node}]" for node, count in self.may_add)
        return text + ("; its autoscaler may add more" if self.grows_unseen else "")


@contextmanager
def connect() -> Iterator[Cluster]:
    """Connect to the running cluster, or start a local one with token authentication where there is none.

    RAY_ADDRESS names the cluster where there are several; `local` always starts one. A cluster that was started here
    ends with the block; one that was found is only left.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    already = ray.is_initialized()
    started_here, watches = False, os.environ.get(_WATCHES)
    try:
        if not already:
            with _quiet():
                address = find_ray()
                started_here = address is None
                if started_here:
                    _start_local()
                    os.environ.setdefault(_WATCHES, "0")
                else:
                    ray.init(address=address, **_OPTIONS)
        yield _look_around(started_here)
    finally:
        if not already:
            _disconnect(started_here)
        if watches is None:
            os.environ.pop(_WATCHES, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what Ray's C++ core writes to stderr while it connects: errors are raised, too, and are in its logs."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        if not endings.is_ending():
            os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _start_local() -> None:
    # Ray 2.60 turns token authentication on for a cluster of its own when RAY_AUTH_MODE is not set.
    _write_token()
    timer = threading.Timer(START_S, lambda: endings.fail(explain_slow_start()))
    timer.daemon = True
    timer.start()
    try:
        with _on_loopback():
            ray.init(address="local", include_dashboard=False, **_OPTIONS)
    except Exception as error:  # Ray raises all kinds where it does not start, plain Exception among them
        endings.check()
        raise InputError(explain_slow_start(str(error).strip().partition("\n")[0])) from error
    finally:
        timer.cancel()


def _disconnect(started_here: bool) -> None:
    """Leave Ray; one that was started here ends with all its processes.

    They block SIGTERM, as this process does (`endings`), and Ray would wait a second for each: they are killed once this
    process has left them. Killed before, they would take no last events of its tasks, for which Ray waits 5 s. Where a
    signal ends the job, it leaves without goodbye, and `endings` kills them.
    """
    if endings.is_ending():
        return

    def kill() -> None:
        while hasattr(ray._private.worker.global_worker, "core_worker"):
            time.sleep(0.02)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    family = psutil.Process().children(recursive=True) if started_here else []
    thread = threading.Thread(target=kill, name="medlora-end", daemon=True)
    thread.start()
    ray.shutdown()
    thread.join()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen on 127.0.0.1 alone. Its servers listen on every address (2.60) unless the
    node's own is that one, which `_node_ip_address` refuses to be. This switch, meant for laptops, is the way."""
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
    there = tuple(Node.of(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"])
    if started_here:
        return Cluster(there, started_here=True)
    # `ray up` leaves on the head, where a submitted job's driver runs, what its autoscaler reads.
    launched = read_json(Path("~/ray_bootstrap_config.yaml").expanduser())
    if launched is None:
        # KubeRay's autoscaler runs beside the head, with limits that no Ray process knows.
        return Cluster(there, grows_unseen="--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", ""))
    return Cluster(there, find_addable(launched, there))


def find_addable(launched: Mapping[str, Any], there: Sequence[Node]) -> tuple[tuple[Node, int], ...]:
    """The kinds of nodes that the autoscaler of a launched cluster may add to those that are there, and how many of each.

    On-premise hosts, whose resources only Ray on them finds out, are left out: they are up from the start.
    """
    left = launched.get("max_workers", 0) - (len(there) - 1)
    addable = []
    for name, kind in launched.get("available_node_types", {}).items():
        node = Node.of(kind["resources"], kind.get("labels", {}))
        count = min(left, kind.get("max_workers", 0) - sum(each.is_like(node) for each in there))
        if count > 0 and kind["resources"] and name != launched.get("head_node_type"):
            addable.append((node, count))
    return tuple(addable)


def quiet_ray_data() -> None:
    """No bars and warnings of Ray Data's own: our display shows how far it is."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
