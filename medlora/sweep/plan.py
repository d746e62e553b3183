"""A sweep before it starts: its config, and what is searched on top of which run config."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medlora.config.base import Scoring
from medlora.config.evaluation import EvaluationConfig
from medlora.config.phase import PhaseConfig, Validation, name_as_before
from medlora.config.run import RunConfig
from medlora.config.sources import SourceConfig
from medlora.config.sweep import SweepConfig
from medlora.runs.manifests import as_json
from medlora.sweep.population import make_schedule, name_generation
from medlora.sweep.space import Choice, Domain, Params, apply_params, validate


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose every part was found: what `jobs/sweep.py` hands on."""

    config: SweepConfig
    raw: dict[str, Any]
    """The run config as its file holds it."""
    run: RunConfig
    searched: tuple[str, ...]
    space: dict[str, Domain]
    dev: tuple[SourceConfig, ...]
    scoring: Scoring
    start_params: dict[str, Any]
    """The values of the unchanged config: the first trial."""
    dropped: dict[str, tuple[str, ...]]

    @property
    def everything(self) -> bool:
        """Whether every phase is searched."""
        return len(self.searched) == len(self.run.phases)

    @property
    def scored_phase(self) -> str:
        """The phase in which trials are scored."""
        return self.searched[-1]

    @property
    def trials(self) -> int:
        """How many trials there are in all."""
        if self.config.scheduler.kind == "pbt":
            return 1 + self.config.scheduler.population * self.config.scheduler.generations
        return self.config.trials or (len(self.list_grid()) if self.config.search == "grid" else 16)

    def list_grid(self) -> list[dict[str, Any]]:
        """Every combination of a grid's values, the unchanged config first."""
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
        return made[0] if whole else make_schedule(self.raw, made, self.scored_phase, self.config.scheduler.generations)

    def make_trial(self, lineage: Sequence[Params], name: str, whole: bool = True) -> RunConfig:
        """The config that a trial trains: no evaluation, the sweep's placement, scored on dev in its last phase.

        Raises InputError when it is not valid.
        """
        run = validate(self.make_raw(lineage, whole))
        scored = self.scored_phase if whole else name_generation(self.scored_phase, len(lineage))
        last = [phase.name for phase in run.phases].index(scored)
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
        made = run.model_dump(mode="json") | {"name": name, "phases": phases, "evaluation": None, "report_to": []}
        return RunConfig.model_validate(made)

    def check_against(self) -> RunConfig:
        """The run config with dev as the sweep names it and the tests: what training data may hold nothing of."""
        phases = []
        for phase in self.run.phases:
            if phase.name == self.scored_phase:
                validation = (phase.validation or Validation(sources=self.dev)).model_copy(update={"sources": self.dev})
                phase = phase.model_copy(update={"validation": validation})
            phases.append(phase)
        return self.run.model_copy(update={"phases": tuple(phases)})

    def describe_dev(self, batch_size: int = 32) -> EvaluationConfig:
        """The evaluation of whole dev splits, scored as the trials were."""
        validation = self.run.phase(self.scored_phase).validation
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
        "run": plan.run.model_dump(mode="json", exclude={"evaluation", "placement", "storage", "report_to"}),
        "tests": [test.source for test in plan.run.evaluation.tests] if plan.run.evaluation else [],
        "retries": plan.config.placement.retries,
    }
    plain: dict[str, Any] = as_json(described)
    for phase in plain["run"]["phases"]:
        name_as_before(phase)
        # What a phase is for, and when a stall is reported, change no result.
        phase.pop("description", None)
        for key in ("stall_s", "stall_kill_s"):
            (phase["placement"] or {}).pop(key, None)
    return plain
