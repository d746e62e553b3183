"""Does a placement fit the cluster, node by node; and what is reported while it has to wait for one."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray

from medlora import events
from medlora.config.placement import Placement
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.on_ray.cluster import Cluster, Node

NOTE_EVERY_S = 60.0
"""How often a wait for room is spoken of."""


def count_gpus(placement: Placement, cluster: Cluster) -> float:
    """GPUs that one worker gets: as configured, else one where the cluster has any or may add one."""
    if placement.gpus_per_worker is not None:
        return placement.gpus_per_worker
    return float(any(node.gpus for node, _ in cluster.kinds()))


def describe_worker(placement: Placement, gpus: float) -> str:
    """What one worker asks for: `4 CPU and 1 GPU of type L4 on a node with pool=big`."""
    text = f"{placement.cpus_per_worker} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    if placement.accelerator_type:
        text += f" of type {placement.accelerator_type}"
    if placement.label_selector:
        text += " on a node with " + ", ".join(f"{key}={value}" for key, value in placement.label_selector.items())
    return text


def count_room(placement: Placement, gpus: float, node: Node) -> int:
    """How many workers the node has room for when nothing else runs on it."""
    if placement.accelerator_type and placement.accelerator_type not in node.accelerators:
        return 0
    if any(not _matches(node.labels.get(key), value) for key, value in placement.label_selector.items()):
        return 0
    rooms = [math.floor(node.cpus / placement.cpus_per_worker)]
    if gpus >= 1:
        rooms.append(math.floor(node.gpus / gpus))
    elif gpus > 0:
        rooms.append(int(node.gpus) * math.floor(1 / gpus + 1e-9))  # a worker's fraction is of one GPU
    return min(rooms)


def _matches(label: str | None, wanted: str) -> bool:
    """Ray's label selectors: a value, `!value`, `in(a,b)` or `!in(a,b)`."""
    negative = wanted.startswith("!")
    plain = wanted.removeprefix("!")
    values = plain[3:-1].split(",") if plain.startswith("in(") and plain.endswith(")") else [plain]
    return (label in [value.strip() for value in values]) != negative


def check_placement(placement: Placement, cluster: Cluster, key: str) -> None:
    """Raise InputError when the cluster can never hold the placement; the message lists what it has and what may be
    added.

    Where an autoscaler adds nodes of kinds that Ray does not report, nothing is refused: we wait, and report it.
    """
    if cluster.grows_unseen:
        return
    workers, gpus = placement.least_workers, count_gpus(placement, cluster)
    kinds = cluster.kinds()
    all_gpus, all_cpus = (sum(getattr(node, what) * count for node, count in kinds) for what in ("gpus", "cpus"))
    if workers * gpus > all_gpus:
        raise InputError(
            f"{key}: {workers} workers x {gpus:g} GPUs = {workers * gpus:g} GPUs asked; the cluster has {cluster}; "
            f"lower {key}.workers or {key}.gpus_per_worker, or add nodes"
        )
    cpus = workers * placement.cpus_per_worker
    if cpus > all_cpus:
        raise InputError(
            f"{key}: {workers} workers x {placement.cpus_per_worker} CPUs = {cpus} CPUs asked; the cluster has {cluster}; "
            f"{_advise(placement, key, all_cpus)}"
        )
    accelerators = {kind for node, _ in kinds for kind in node.accelerators}
    if placement.accelerator_type and placement.accelerator_type not in accelerators:
        raise InputError(
            f"{key}.accelerator_type: {placement.accelerator_type!r} is not there; the cluster has {cluster}"
        )
    wanted = placement.label_selector
    if wanted and not any(all(_matches(node.labels.get(k), v) for k, v in wanted.items()) for node, _ in kinds):
        raise InputError(
            f"{key}.label_selector: no node has {wanted}; the nodes have {[dict(n.labels) for n, _ in kinds]}"
        )
    room = sum(count_room(placement, gpus, node) * count for node, count in kinds)
    if room < workers:
        nodes = "; ".join(f"{count} x {node}" for node, count in kinds)
        raise InputError(
            f"{key}: {workers} workers, each with {describe_worker(placement, gpus)}, asked; a worker runs on one node, "
            f"and node by node there is room for {room}: {nodes}; lower {key}.workers, {key}.cpus_per_worker or {key}.gpus_per_worker"
        )


def _advise(placement: Placement, key: str, cpus: float) -> str:
    """Which key to lower until the workers' CPUs are there: CPUs of a worker only where one is enough for each."""
    workers = placement.least_workers
    if placement.cpus_per_worker > 1 and workers <= cpus:
        return f"lower {key}.cpus_per_worker to {int(cpus // workers)}, or add nodes"
    if not (room := int(cpus // placement.cpus_per_worker)):
        return "add nodes"
    return f"lower {key}.{'workers' if workers == placement.workers else 'min_workers'} to {room}, or add nodes"


def find_concurrency(concurrency: int | None, placement: Placement, cluster: Cluster) -> int:
    """Trials at a time; raises InputError, with what the cluster has, when there is and can be no room for so many."""
    gpus = count_gpus(placement, cluster)
    slots = sum(count_room(placement, gpus, node) * count for node, count in cluster.kinds())
    if slots < (concurrency or 1) and not (cluster.grows_unseen and concurrency):
        raise InputError(
            f"concurrency: {concurrency or 1} trials at a time with {describe_worker(placement, gpus)} each; the cluster "
            f"({cluster}) has room for {slots}; lower concurrency, placement.cpus_per_worker or placement.gpus_per_worker"
        )
    return concurrency or slots


@contextmanager
def report_while_waiting(
    placement: Placement,
    gpus: float,
    workers: int,
    phase: str,
    has_begun: Callable[[], bool],
    on_event: OnEvent,
    as_group: bool = False,
) -> Iterator[None]:
    """While inside, and until `has_begun`, report every minute what is waited for and what the cluster has free.

    Workers that come `as_group`, as Ray Train's do, are waited for no more once the group has its place: they start.
    """
    ended = threading.Event()

    def watch() -> None:
        waited_s = 0.0
        while not ended.wait(NOTE_EVERY_S):
            waited_s += NOTE_EVERY_S
            if has_begun():
                return
            free = find_free()
            if as_group and not is_group_waiting():
                continue
            if sum(count_room(placement, gpus, node) for node in free) >= workers:
                continue  # there is room: it is starting
            asked = f"{workers} worker{'s' * (workers != 1)} with {describe_worker(placement, gpus)} each"
            counted = Counter(str(node) for node in free)
            have = "; ".join(f"{count} x {node}" for node, count in counted.items()) or "no node"
            text = f"waiting for {asked} ({waited_s:.0f} s); free now: {have}"
            on_event(events.note(phase, text))

    thread = threading.Thread(target=watch, name="medlora-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def is_group_waiting() -> bool:
    """Whether a group of workers, of any driver, has no place yet."""
    from ray.util import placement_group_table

    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def find_free() -> list[Node]:
    """What is free now on each node that takes work."""
    free = ray._private.state.available_resources_per_node()
    leaving = ray._private.state.state.get_draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [
        Node.of(_without_accelerators(node, free.get(node["NodeID"], {})), node.get("Labels", {})) for node in alive
    ]


def _without_accelerators(node: Mapping[str, dict[str, float]], free: Mapping[str, float]) -> dict[str, float]:
    kinds = {name: value for name, value in node["Resources"].items() if name.startswith("accelerator_type:")}
    return {"CPU": free.get("CPU", 0.0), "GPU": free.get("GPU", 0.0), **kinds}
