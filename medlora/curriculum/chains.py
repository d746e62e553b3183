"""The chain of adapters of a stage: new, continue, stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medlora.artifacts.adapters import fetch_adapter
from medlora.config.base import Section
from medlora.config.loading.files import load
from medlora.config.phase import PhaseConfig
from medlora.config.run import RunConfig
from medlora.errors import InputError
from medlora.runs.folders import RunFolder


class Link(Section):
    """One adapter of a stage's chain: the name of the phase that trained it and its folder."""

    name: str
    folder: str


def extend_chain(parent: Sequence[Link], phase: PhaseConfig, adapter: Path) -> tuple[Link, ...]:
    """The chain of the stage that a phase ends with."""
    kept = {"new": (), "continue": tuple(parent[:-1]), "stack": tuple(parent)}[phase.chain]
    return (*kept, Link(name=phase.name, folder=str(adapter)))


def find_chain(run: RunFolder, phase: str) -> tuple[Link, ...]:
    """The chain of the stage that a phase of a run ends with, finished or not. The phase is trained on the chain of the
    one before it. Raises InputError when the run has no such phase."""
    config = load(run.config)
    chain = start_chain(config)
    for each in config.phases:
        chain = extend_chain(chain, each, run.phase(each.name).adapter)
        if each.name == phase:
            return chain
    raise InputError(f"{run.root}: has no phase {phase}; phases: {', '.join(each.name for each in config.phases)}")


def start_chain(config: RunConfig) -> tuple[Link, ...]:
    """The adapters from elsewhere below the first phase; raises InputError for a place that holds none."""
    chain = []
    for i, folder in enumerate(config.start):
        try:
            found = fetch_adapter(folder, config.storage.cache)
        except InputError as error:
            raise InputError(f"start.{i}: {error}") from None
        chain.append(Link(name=f"start-{i}", folder=str(found)))
    return tuple(chain)
