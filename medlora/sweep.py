"""A sweep before it starts: its config, and what is searched on top of which run config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from medlora import runs
from medlora.config import EvaluationConfig, PhaseConfig, Placement, RunConfig, Scoring, Storage, Validation
from medlora.config_file import load
from medlora.config_sources import Name, Section, SourceConfig
from medlora.sweep_population import make_schedule, name_generation
from medlora.sweep_space import KINDS, Choice, Domain, Params, apply_params, validate

FINGERPRINT, LEDGER, REPORT, TABLE, PAGE, BEST = (
    "fingerprint.json",
    "trials.jsonl",
    "sweep.json",
    "trials.parquet",
    "sweep.html",
    "best.yaml",
)
"""Files of a sweep's folder."""


class Dev(Section):
    """How trials are judged."""

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
    """At each rung the best 1/reduction goes on; the next rung is at `reduction` times the steps."""
    population: int = Field(4, ge=2)
    """Members of `pbt`."""
    generations: int = Field(3, ge=2)
    """Into so many parts `pbt` divides the phase's max_steps; after each the worst quarter goes on from the best."""


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
    """The phases that every trial trains, in a row; unset = the last one. A trial is judged in the last of them."""
    start: str | None = None
    """A run whose finished earlier phases every trial starts from; unset = they are trained once, in the sweep's folder."""
    space: dict[str, str | list[Any]]
    """Keys of the run config and what they may be: `choice [8, 16]`, `uniform 0 0.1`, `loguniform 5e-5 5e-4`, `int 1 8`."""
    search: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe`: Optuna's tree-structured Parzen estimator."""
    trials: int | None = Field(None, ge=1)
    """Trials in all, the config as it stands among them; unset = 16, and all combinations of a grid."""
    scheduler: Scheduler = Scheduler()
    dev: Dev = Dev()
    concurrency: int | None = Field(None, ge=1)
    """Trials at a time; unset = as many as the cluster has room for."""
    placement: Placement = Placement()
    """Of one trial; `gpus_per_worker: 0.5` puts two on a GPU. `retries`: how often one whose process died goes on."""
    best: int = Field(3, ge=1)
    """So many of the best trials are scored on all of dev and compared with the config as it stands."""
    mlflow: Mlflow | None = None
    """Also log the trials to MLflow, where it is installed; TensorBoard files are always written."""
    storage: Storage = Storage(folder="sweeps")

    @field_validator("space", mode="before")
    @classmethod
    def _check_space(cls, space: Any) -> Any:
        for key, text in space.items() if isinstance(space, dict) else ():
            if not isinstance(text, str | list):
                raise ValueError(f"{key} is {json.dumps(text, default=str)}, which is no domain; write {KINDS}")
        return space


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose every part was found: what `jobs/sweep.py` hands on."""

    config: SweepConfig
    raw: dict[str, Any]
    """The run config as it stands in its file."""
    run: RunConfig
    searched: tuple[str, ...]
    space: dict[str, Domain]
    dev: tuple[SourceConfig, ...]
    scoring: Scoring
    start_params: dict[str, Any]
    """The values of the config as it stands: the first trial."""
    dropped: dict[str, tuple[str, ...]]

    @property
    def everything(self) -> bool:
        """Whether every phase is searched."""
        return len(self.searched) == len(self.run.phases)

    @property
    def judged(self) -> str:
        """The phase in which trials are judged."""
        return self.searched[-1]

    @property
    def trials(self) -> int:
        """How many trials there are in all."""
        if self.config.scheduler.kind == "pbt":
            return 1 + self.config.scheduler.population * self.config.scheduler.generations
        return self.config.trials or (len(self.list_grid()) if self.config.search == "grid" else 16)

    def list_grid(self) -> list[dict[str, Any]]:
        """Every combination of a grid's values, the config as it stands first."""
        domains = [domain.values for domain in self.space.values() if isinstance(domain, Choice)]
        combined = [dict(zip(self.space, values, strict=True)) for values in itertools.product(*domains)]
        return [self.start_params, *(params for params in combined if params != self.start_params)]

    def make_raw(self, lineage: Sequence[Params], whole: bool = True) -> dict[str, Any]:
        """The run config of a trial as `best.yaml` holds it; `lineage` are its values, of a population those of all its
        generations. `whole`: not parted into generations. Raises InputError where a key leads nowhere."""
        made = [
            dict(self.raw)
            if params == self.start_params
            else apply_params(self.raw, params, self.searched, self.everything)
            for params in lineage
        ]
        return made[0] if whole else make_schedule(self.raw, made, self.judged, self.config.scheduler.generations)

    def make_trial(self, lineage: Sequence[Params], name: str, whole: bool = True) -> RunConfig:
        """The config that a trial trains: no evaluation, the sweep's placement, scored on dev in its last phase.

        Raises InputError when it is not valid.
        """
        run = validate(self.make_raw(lineage, whole))
        judged = self.judged if whole else name_generation(self.judged, len(lineage))
        last = [phase.name for phase in run.phases].index(judged)
        dev = {
            "sources": [source.model_dump(mode="json") for source in self.dev],
            "sample": self.config.dev.sample,
            "every_steps": self.config.dev.every_steps,
            "scoring": self.scoring,
            "max_tokens": self.config.dev.max_tokens,
        }
        phases = [phase.model_dump(mode="json") for phase in run.phases[: last + 1]]
        for phase in phases:
            if phase["name"] not in [each.name for each in list_earlier(self)]:
                phase["placement"] = self.config.placement.model_dump(mode="json")
        phases[-1]["validation"] = {**(phases[-1]["validation"] or {}), **dev}
        made = run.model_dump(mode="json") | {"name": name, "phases": phases, "evaluation": None}
        return RunConfig.model_validate(made)

    def check_against(self) -> RunConfig:
        """The run config with dev as the sweep names it and the tests: what training data may hold nothing of."""
        phases = []
        for phase in self.run.phases:
            if phase.name == self.judged:
                validation = (phase.validation or Validation(sources=self.dev)).model_copy(update={"sources": self.dev})
                phase = phase.model_copy(update={"validation": validation})
            phases.append(phase)
        return self.run.model_copy(update={"phases": tuple(phases)})

    def describe_dev(self, batch_size: int = 32) -> EvaluationConfig:
        """The evaluation of whole dev splits, scored as the trials were."""
        validation = self.run.phase(self.judged).validation
        names = ["dev"] if len(self.dev) == 1 else [f"dev-{i}" for i in range(len(self.dev))]
        tests = [{**each.model_dump(mode="json"), "name": name} for name, each in zip(names, self.dev, strict=True)]
        style = validation.style if validation else "reasoning"
        dev = self.config.dev
        return EvaluationConfig.model_validate(
            {
                "tests": tests,
                "scoring": self.scoring,
                "style": style,
                "max_tokens": dev.max_tokens,
                "batch_size": batch_size,
            }
        )


def list_earlier(plan: SweepPlan) -> list[PhaseConfig]:
    """The phases before the searched ones, which all trials share."""
    names = [phase.name for phase in plan.run.phases]
    return list(plan.run.phases[: names.index(plan.searched[0])])


def describe_sweep(plan: SweepPlan) -> dict[str, Any]:
    """What the trials of a sweep depend on, as nested plain values: its fingerprint."""
    described = {
        "sweep": plan.config.model_dump(
            mode="json", exclude={"trials", "concurrency", "placement", "best", "mlflow", "storage", "config", "set"}
        ),
        "run": plan.run.model_dump(mode="json", exclude={"evaluation", "placement", "storage"}),
        "tests": [test.source for test in plan.run.evaluation.tests] if plan.run.evaluation else [],
        "retries": plan.config.placement.retries,
    }
    plain: dict[str, Any] = runs.as_json(described)
    for phase in plain["run"]["phases"]:  # when a stall is reported changes no result
        for key in ("stall_s", "stall_kill_s"):
            (phase["placement"] or {}).pop(key, None)
    return plain


def load_sweep_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep config at `path`; raises InputError that names every wrong key."""
    return load(path, overrides, SweepConfig)


if __name__ == "__main__":
    print(json.dumps(SweepConfig.model_json_schema(), indent=2, ensure_ascii=False))
