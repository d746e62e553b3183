"""The best trials of a sweep on all of dev, and the winner on the tests, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from medlora import events
from medlora.config.evaluation import EvaluationConfig
from medlora.config.loading.files import load
from medlora.config.placement import ActorPlacement
from medlora.curriculum.chains import Link, find_chain
from medlora.drivers.evaluation import score_afresh
from medlora.errors import InputError
from medlora.evaluation.ledger import find_report
from medlora.evaluation.plan import EvaluationTask, choose_batch_size
from medlora.evaluation.questions import read_asked
from medlora.evaluation.reports import Report
from medlora.evaluation.stages import Stages
from medlora.events import OnEvent
from medlora.on_ray.answer_questions import Actors
from medlora.on_ray.cluster import Cluster
from medlora.on_ray.placement import count_gpus
from medlora.runs import mirror
from medlora.runs.folders import RunFolder
from medlora.sweep.ledger import START, Ledger, Trial
from medlora.sweep.plan import SweepPlan
from medlora.sweep.results import compare_with_start, read_record
from medlora.sweep.summary import Comparison, Record


def _make_stages(folder: RunFolder, trials: Sequence[Trial]) -> Stages:
    """Trial -> the chain of its last phase; adapters of trials are named after them, since one base holds them all."""
    stages = {}
    home = (folder.root / "trials").resolve()
    for trial in trials:
        run = RunFolder(home / trial.id)
        mirror.pull(run.root)
        if not run.config.is_file():
            raise InputError(
                f"trial {trial.id} is finished, and {run.root} is not here: its process writes elsewhere; "
                "storage.folder must be a mount that every node sees, or s3:// or gs://"
            )
        links = []
        for link in find_chain(run, load(run.config).phases[-1].name):
            place = Path(link.folder).resolve()
            owner = f"-{place.relative_to(home).parts[0]}" if place.is_relative_to(home) else ""
            links.append(Link(name=f"{link.name}{owner}", folder=link.folder))
        stages[trial.id] = tuple(links)
    return stages


@dataclass(frozen=True)
class Finals:
    """A sweep whose trials have ended: what its best trials are scored with."""

    plan: SweepPlan
    folder: RunFolder
    ledger: Ledger
    concurrency: int
    cluster: Cluster
    on_event: OnEvent


def score_best(finals: Finals, notes: Sequence[str]) -> Comparison:
    """The config as it is and the best trials on all of dev, each compared with the first question by question."""
    ledger, plan = finals.ledger, finals.plan
    first = ledger.trials[START]
    if first.state != "finished":
        raise InputError(
            f"the unchanged config (trial {START}) {first.state}: {first.why or 'it has no adapter'}; there is nothing to "
            f"compare with. What the trials did is in {ledger.path}"
        )
    best = [trial for trial in ledger.rank() if trial is not first][: plan.config.best]
    stages = _make_stages(finals.folder, [first, *best])
    report = _score(finals, "dev", stages, plan.describe_dev(), notes)
    return compare_with_start(report)


def score_once(finals: Finals, winner: str) -> Record:
    """The winner on the tests of the run config, once: a second look would make them a dev split."""
    plan, root = finals.plan, finals.folder.root
    assert plan.run.evaluation is not None
    if (record := read_record(root)) is not None:
        if record["trial"] != winner:
            raise InputError(
                f"--final-test: trial {record['trial']} was scored on the tests ({record['created']}); trial {winner} has won "
                "since, and choosing by a second look at the tests would make them a dev split"
            )
        return record
    if plan.scored_phase != plan.run.phases[-1].name:
        text = f"the tests are asked of the stage {plan.scored_phase}, the last that was trained"
        finals.on_event(events.note("evaluation", text))
    stages = _make_stages(finals.folder, [finals.ledger.trials[winner]])
    _score(finals, "test", stages, plan.run.evaluation, [])
    return cast(Record, read_record(root) or {})


def _score(finals: Finals, name: str, stages: Stages, config: EvaluationConfig, notes: Sequence[str]) -> Report:
    """The report of trials on dev or on the tests, in the sweep's folder `name`; reused where it is still valid."""
    plan, into = finals.plan, finals.folder.root / name
    asked = read_asked(config, plan.run.seed, plan.run.data.max_bad_fraction)
    cache = str(plan.run.storage.cache_folder)
    task = EvaluationTask(plan.run.base, plan.run.seed, cache, stages, config, asked)
    if report := find_report(into, task.fingerprint):
        return report
    many = f"{len(stages)} trial{'s' * (len(stages) != 1)}"
    fields = plan.config.placement.model_dump(exclude={"workers"})
    batches = -(-asked.count // choose_batch_size(config, count_gpus(plan.config.placement, finals.cluster)))
    placement = ActorPlacement.model_validate({**fields, "workers": max(1, min(finals.concurrency, batches))})
    actors = Actors(placement, finals.cluster, finals.on_event, finals.folder.log)
    about = {"name": f"{plan.config.name}: {name}", "notes": list(notes), "trial": next(iter(stages))}
    return score_afresh(task, into, actors, about, f"{many} x {asked.count} questions of {name}")
