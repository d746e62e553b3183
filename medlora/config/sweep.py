"""The keys of a config for a sweep."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, field_validator

from medlora.config.base import Name, Scoring, Section
from medlora.config.placement import Placement, Storage
from medlora.config.sources import SourceConfig


class Dev(Section):
    """How trials are scored."""

    sources: tuple[SourceConfig, ...] = ()
    """Questions of dev splits; unset = those that validate the last searched phase."""
    sample: int = Field(256, ge=1)
    """Seeded sample of so many questions per source, the same for every trial; the best trials are scored on all."""
    every_steps: int = Field(25, ge=1)
    """Optimiser steps between two scores."""
    scoring: Scoring | None = None
    """Unset = `letter`, the log-likelihood of each option's letter, which is fast; `reason` where the phase has a full_prompt."""
    max_tokens: int = Field(128, ge=1)
    """Most new tokens of scoring by `reason` or `generate`."""


class Scheduler(Section):
    """Which trials are stopped before they are done."""

    kind: Literal["asha", "pbt", "none"] = "asha"
    """`asha`: asynchronous successive halving (arXiv 1810.05934) on dev accuracy; its resource is optimiser steps. `pbt`:
    population based training (arXiv 1711.09846), whose best schedule becomes phases that continue each other."""
    grace_steps: int | None = Field(None, ge=1)
    """No trial is stopped before so many steps of the last searched phase; unset = at its first score."""
    reduction: int = Field(3, ge=2, le=16)
    """At each rung the best 1/reduction continues; the next rung is at `reduction` times the steps."""
    population: int = Field(4, ge=2)
    """Members of `pbt`."""
    generations: int = Field(3, ge=2)
    """Into so many parts `pbt` divides the phase's max_steps; after each the worst quarter continues from the best."""


class Mlflow(Section):
    """Trials as MLflow runs; the server is named by the environment (MLFLOW_TRACKING_URI), which may hold a secret."""

    experiment: str


class SweepConfig(Section):
    """What `jobs/sweep.py` reads: a run config, the keys of it that are searched, and how."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    config: str
    """The run config that trials start from, with its own keys changed by `set`."""
    set: tuple[str, ...] = ()
    """`KEY=VALUE` overrides of the run config."""
    phases: Literal["all"] | tuple[Name, ...] | None = None
    """The phases that every trial trains, in a row; unset = the last one. A trial is scored in the last of them."""
    start: str | None = None
    """A run whose finished earlier phases every trial starts from; unset = they are trained once, in the sweep's folder."""
    space: dict[str, str | list[object]]
    """Keys of the run config and what they may be: `choice [8, 16]`, `uniform 0 0.1`, `loguniform 5e-5 5e-4`, `int 1 8`."""
    search: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe`: Optuna's tree-structured Parzen estimator."""
    trials: int | None = Field(None, ge=1)
    """Trials in all, the unchanged config among them; unset = 16, and all combinations of a grid."""
    scheduler: Scheduler = Scheduler()
    dev: Dev = Dev()
    concurrency: int | None = Field(None, ge=1)
    """Trials at a time; unset = as many as the cluster has room for."""
    placement: Placement = Placement()
    """Of one trial; `gpus_per_worker: 0.5` puts two on a GPU. `retries`: how often a dead one is resumed."""
    best: int = Field(3, ge=1)
    """So many of the best trials are scored on all of dev and compared with the unchanged config."""
    mlflow: Mlflow | None = None
    """Also log the trials to MLflow, where it is installed; TensorBoard files are always written."""
    storage: Storage = Storage(folder="sweeps")

    @field_validator("space", mode="before")
    @classmethod
    def _check_space(cls, space: object) -> object:
        for key, text in space.items() if isinstance(space, dict) else ():
            if not isinstance(text, str | list):
                raise ValueError(f"{key} is {json.dumps(text, default=str)}, which is no domain; write {KINDS}")
        return space


KINDS = "`choice [8, 16, 32]`, `uniform 0 0.1`, `loguniform 5e-5 5e-4`, `int 1 8`, or a list of values"
