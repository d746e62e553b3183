"""A sweep before it starts: its config, what is searched on top of which run config, and all that can be wrong with it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from medlora import runs
from medlora.config import EvaluationConfig, PhaseConfig, Placement, RunConfig, Scoring, Storage, Validation
from medlora.config_file import explain, load, load_raw
from medlora.config_sources import Name, Section, SourceConfig
from medlora.data_card import find_dropped
from medlora.errors import InputError
from medlora.lineage import Link, check_inputs, extend_chain, find_obstacle, make_job, scan_source, start_chain
from medlora.records import McqRecord
from medlora.sources import stream
from medlora.sweep_space import Choice, Domain, Params, apply_params, make_config, parse_space, read_params

FINGERPRINT, LEDGER, REPORT, TABLE, PAGE, BEST = (
    "fingerprint.json",
    "trials.jsonl",
    "sweep.json",
    "trials.parquet",
    "sweep.html",
    "best.yaml",
)
"""Files of a sweep's folder."""
_COMBINATIONS = 512
"""So many combinations of values are all checked before a sweep starts; of more, each value and the corners."""


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

    kind: Literal["asha", "none"] = "asha"
    """`asha`: asynchronous successive halving (arXiv 1810.05934) on dev accuracy; its resource is optimiser steps."""
    grace_steps: int | None = Field(None, ge=1)
    """No trial is stopped before so many steps of the last searched phase; unset = at its first score."""
    reduction: int = Field(3, ge=2, le=16)
    """At each rung the best 1/reduction goes on; the next rung is at `reduction` times the steps."""


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
        return self.config.trials or (len(self.list_grid()) if self.config.search == "grid" else 16)

    def list_grid(self) -> list[dict[str, Any]]:
        """Every combination of a grid's values, the config as it stands first."""
        domains = [domain.values for domain in self.space.values() if isinstance(domain, Choice)]
        combined = [dict(zip(self.space, values, strict=True)) for values in itertools.product(*domains)]
        return [self.start_params, *(params for params in combined if params != self.start_params)]

    def make_run(self, params: Params) -> RunConfig:
        """The whole run config of a trial, as `best.yaml` holds it; raises InputError when it is not valid."""
        return (
            self.run if params == self.start_params else make_config(self.raw, params, self.searched, self.everything)
        )

    def make_trial(self, params: Params, name: str) -> RunConfig:
        """The config that a trial trains: no evaluation, the sweep's placement, scored on dev in the judged phase."""
        run = self.make_run(params)
        last = [phase.name for phase in run.phases].index(self.judged)
        dev = {
            "sources": [source.model_dump(mode="json") for source in self.dev],
            "sample": self.config.dev.sample,
            "every_steps": self.config.dev.every_steps,
            "scoring": self.scoring,
            "max_tokens": self.config.dev.max_tokens,
        }
        phases = [phase.model_dump(mode="json") for phase in run.phases[: last + 1]]
        for phase in phases:
            if phase["name"] in self.searched:
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


def check_sweep(config: SweepConfig) -> SweepPlan:
    """Find everything that a sweep needs; raises InputError for all that can be wrong before anything starts."""
    path = Path(config.config)
    raw = load_raw(path, config.set)
    try:
        run = RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, RunConfig))
        raise InputError(f"config: {path} is not valid:\n{lines}") from None
    searched = _find_searched(config, run)
    everything = len(searched) == len(run.phases)
    space = parse_space(config.space, searched, everything)
    _check_search(config, space)
    _check_keys(raw, space, searched, everything)
    start = read_params(raw, run, list(space), searched, everything)
    judged = run.phase(searched[-1])
    dev = config.dev.sources or (judged.validation.sources if judged.validation else ())
    if not dev:
        raise InputError(
            f"dev.sources: phase {judged.name} of {path} has no validation; name the dev questions trials are judged on"
        )
    scoring = config.dev.scoring or ("reason" if judged.full_prompt else "letter")
    plan = SweepPlan(config, raw, run, searched, space, tuple(dev), scoring, start, {})
    _check_values(plan)
    _check_mlflow(config)
    check_inputs(run)
    _check_dev(plan)
    plan = replace(plan, dropped=find_dropped(plan.check_against()))
    if config.start:
        find_start(plan, Path(config.start))
    return plan


def _find_searched(config: SweepConfig, run: RunConfig) -> tuple[str, ...]:
    names = [phase.name for phase in run.phases]
    if config.phases is None:
        return (names[-1],)
    if config.phases == "all":
        return tuple(names)
    for i, name in enumerate(config.phases):
        if name not in names:
            raise InputError(f"phases.{i}: {name!r} is no phase of {config.config}; phases: {', '.join(names)}")
    first = names.index(config.phases[0]) if config.phases else 0
    if not config.phases or tuple(names[first : first + len(config.phases)]) != config.phases:
        raise InputError(
            f"phases: name phases that follow each other in {', '.join(names)}, found {list(config.phases)}"
        )
    return config.phases


def _check_search(config: SweepConfig, space: dict[str, Domain]) -> None:
    if config.placement.workers != 1:
        raise InputError("placement.workers: a trial trains in one process; concurrency says how many run at a time")
    for key, domain in space.items():
        if config.search == "grid" and not isinstance(domain, Choice):
            raise InputError(f"space.{key}: search: grid needs values, not a range; write `choice [...]`")


def _check_keys(raw: dict[str, Any], space: dict[str, Domain], searched: Sequence[str], everything: bool) -> None:
    """Raise InputError for a key that the run config does not have, with the nearest that it has."""
    for key, domain in space.items():
        value = next(iter(domain.list_probes().values()))
        try:
            RunConfig.model_validate(apply_params(raw, {key: value}, searched, everything))
        except ValidationError as error:
            if any(problem["type"] == "extra_forbidden" for problem in error.errors()):
                raise InputError(f"space.{key}: {'; '.join(explain(error, RunConfig))}") from None
        except InputError as error:
            raise InputError(f"space.{key}: {error}") from None


def _check_values(plan: SweepPlan) -> None:
    """Raise InputError for values that make no valid config: each alone, then together."""
    for key, domain in plan.space.items():
        for said, value in domain.list_probes().items():
            try:
                plan.make_trial({**plan.start_params, key: value}, "trial")
            except InputError as error:
                raise InputError(f"space.{key}: {said} makes an invalid config: {error}") from None
    probes = [list(domain.list_probes().values()) for domain in plan.space.values()]
    if math.prod(map(len, probes)) > _COMBINATIONS:
        probes = [[values[0], values[-1]] for values in probes]
    for values in itertools.islice(itertools.product(*probes), _COMBINATIONS):
        params = dict(zip(plan.space, values, strict=True))
        try:
            plan.make_trial(params, "trial")
        except InputError as error:
            said = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in params.items())
            raise InputError(f"space: {said} together make an invalid config: {error}") from None


def _check_mlflow(config: SweepConfig) -> None:
    from importlib.util import find_spec

    if config.mlflow and find_spec("mlflow") is None:
        raise InputError("mlflow: is not installed here; pip install mlflow, or remove the key")


def _check_dev(plan: SweepPlan) -> None:
    """Raise InputError when dev holds no questions, or questions of a test: what is tuned on a test measures nothing."""
    from medlora.overlap import TestIndex

    tests = plan.run.evaluation.tests if plan.run.evaluation else ()
    named = {test.source: f"evaluation.tests.{i}" for i, test in enumerate(tests)}
    for i, source in enumerate(plan.dev):
        if source.source in named:
            raise InputError(
                f"dev.sources.{i}.source: {source.source!r} is the test {named[source.source]} of {plan.config.config}; "
                "a sweep never looks at a test"
            )
        if scan_source(f"dev.sources.{i}", source).kind != "mcq":
            raise InputError(
                f"dev.sources.{i}.source: {source.source} holds no questions; trials are judged on questions"
            )
    if not tests or plan.run.data.overlap == "allow":
        return
    questions = {test.name: [record for record in stream(test) if isinstance(record, McqRecord)] for test in tests}
    index = TestIndex(questions)
    for i, source in enumerate(plan.dev):
        hits = [hit for record in stream(source) for hit in index.find(record, source.source)]
        if hits:
            shown = ", ".join(f"{hit.record} is {hit.question} of {hit.test} ({hit.kind})" for hit in hits[:3])
            raise InputError(
                f"dev.sources.{i}.source: {source.source} holds {len(hits)} questions of the tests: {shown}; "
                "a sweep never looks at a test: take another dev split"
            )


def find_start(plan: SweepPlan, folder: Path) -> tuple[Link, ...]:
    """The chain that every trial starts from, in a run whose earlier phases are finished; raises InputError otherwise."""
    run = runs.RunFolder(folder.expanduser().absolute())
    chain = start_chain(plan.run)
    for phase in list_earlier(plan):
        there = run.phase(phase.name)
        if runs.read_manifest(there.root) is None:
            raise InputError(f"start: {folder} has no finished phase {phase.name}; train it first, or remove the key")
        if differences := find_obstacle(make_job(plan.run, phase, chain), there):
            shown = "\n  ".join(differences[:5])
            raise InputError(f"start: phase {phase.name} of {folder} was made from something else:\n  {shown}")
        chain = extend_chain(chain, phase, there.adapter)
    return chain


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
    return plain


def refuse_other(folder: Path, plan: SweepPlan) -> None:
    """Raise InputError when the folder holds another sweep, finished or not."""
    was = runs.read_json(folder / FINGERPRINT)
    if was is not None and (differences := runs.find_differences(was, describe_sweep(plan))):
        shown = "\n  ".join(differences[:5])
        raise InputError(
            f"{folder}: holds another sweep:\n  {shown}\ngive this one another name (--set name=...), or --out"
        )


def load_sweep_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep config at `path`; raises InputError that names every wrong key."""
    return load(path, overrides, SweepConfig)


if __name__ == "__main__":
    print(json.dumps(SweepConfig.model_json_schema(), indent=2, ensure_ascii=False))
