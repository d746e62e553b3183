"""Steps that the curriculum and the sweep share: look through the data, connect, train one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from medlora import events
from medlora.config.placement import Placement
from medlora.config.run import RunConfig
from medlora.curriculum.jobs import PhaseJob
from medlora.data.card import DataCard, check_data, describe_findings, read_card
from medlora.data.quarantine import check_rows
from medlora.events import OnEvent
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import PhaseManifest

if TYPE_CHECKING:
    from medlora.on_ray.cluster import Cluster
    from medlora.on_ray.train_phase import PlaceWatcher


def look_through_data(config: RunConfig, folder: RunFolder, on_event: OnEvent) -> DataCard:
    """Check every row that the run reads, report what is new in it, and return the data card, which is not written yet.

    Raises InputError for rows, overlaps and personal data that the config does not allow.
    """
    check_rows(config, folder.quarantine)
    known = read_card(folder.data)
    card = check_data(config, known, lambda text: on_event(events.note("data", text, kind="data")))
    for text in describe_findings(card) if card != known else ():
        on_event(events.note("data", text, kind="data"))
    return card


@contextmanager
def connect_and_report(on_events: Sequence[OnEvent]) -> Iterator[Cluster]:
    """Connect to Ray and report the cluster that was found to each of `on_events`."""
    from medlora.on_ray.cluster import connect

    began = time.monotonic()
    with connect() as cluster:
        found = events.cluster_found(str(cluster), cluster.started_here, time.monotonic() - began)
        for on_event in on_events:
            on_event(found)
        yield cluster


def train_and_report(
    job: PhaseJob,
    run: RunFolder,
    placement: Placement,
    cluster: Cluster,
    on_event: OnEvent,
    watcher: PlaceWatcher | None = None,
) -> PhaseManifest:
    """Train a phase on Ray, report that it is finished, and return its manifest."""
    from medlora.on_ray.train_phase import train_on_ray

    began = time.monotonic()
    manifest = train_on_ray(job, run, placement, cluster, on_event, watcher)
    seconds = manifest["seconds"]["all"]
    on_event(events.finished(job.phase.name, seconds, time.monotonic() - began - seconds))
    return manifest
