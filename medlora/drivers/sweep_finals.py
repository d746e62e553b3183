"""The best trials of a sweep on all of dev, and the winner on the tests, once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medlora import events
from medlora.config.evaluation import EvaluationConfig
from medlora.config.loading.files import load
from medlora.config.placement import ActorPlacement
from medlora.curriculum.chains import Link, find_chain
from medlora.drivers.evaluation import score_stages
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, find_report
from medlora.evaluation.plan import describe_evaluation
from medlora.evaluation.questions import read_asked
from medlora.evaluation.stages import Stages
from medlora.events import OnEvent
from medlora.on_ray.answer_questions import make_builder
from medlora.on_ray.cluster import Cluster
from medlora.runs import mirror
from medlora.runs.files import read_mapping, set_aside
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import MANIFEST, find_differences
from medlora.sweep.ledger import START, Ledger, Trial
from medlora.sweep.plan import SweepPlan
from medlora.sweep.results import compare_with_start, read_record


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


def score_best(
    plan: SweepPlan,
    folder: RunFolder,
    ledger: Ledger,
    concurrency: int,
    cluster: Cluster,
    notes: Sequence[str],
    on_event: OnEvent,
) -> dict[str, Any]:
    """The config as it stands and the best trials on all of dev, each compared with the first question by question."""
    first = ledger.trials[START]
    if first.state != "finished":
        raise InputError(
            f"the config as it stands (trial {START}) {first.state}: {first.why or 'it has no adapter'}; there is nothing to "
            f"compare with. What the trials did stands in {ledger.path}"
        )
    best = [trial for trial in ledger.rank() if trial is not first][: plan.config.best]
    stages = _make_stages(folder, [first, *best])
    report = _score(
        plan,
        folder,
        folder.root / "dev",
        stages,
        plan.describe_dev(),
        concurrency,
        cluster,
        on_event,
        notes,
    )
    return compare_with_start(report)


def score_once(
    plan: SweepPlan,
    folder: RunFolder,
    ledger: Ledger,
    winner: str,
    concurrency: int,
    cluster: Cluster,
    on_event: OnEvent,
) -> dict[str, Any]:
    """The winner on the tests of the run config, once: a second look would make them a dev split."""
    assert plan.run.evaluation is not None
    if (record := read_record(folder.root)) is not None:
        if record["trial"] != winner:
            raise InputError(
                f"--final-test: trial {record['trial']} was scored on the tests ({record['created']}); trial {winner} has won "
                "since, and choosing by a second look at the tests would make them a dev split"
            )
        return record
    if plan.judged != plan.run.phases[-1].name:
        on_event(
            events.note("evaluation", f"the tests are asked of the stage {plan.judged}, the last that was trained")
        )
    stages = _make_stages(folder, [ledger.trials[winner]])
    _score(plan, folder, folder.root / "test", stages, plan.run.evaluation, concurrency, cluster, on_event, [])
    return read_record(folder.root) or {}


def _score(
    plan: SweepPlan,
    folder: RunFolder,
    into: Path,
    stages: Stages,
    config: EvaluationConfig,
    concurrency: int,
    cluster: Cluster,
    on_event: OnEvent,
    notes: Sequence[str],
) -> dict[str, Any]:
    asked = read_asked(config, plan.run.seed, plan.run.data.max_bad_fraction)
    fingerprint = describe_evaluation(plan.run.base, plan.run.seed, config, stages, asked)
    if report := find_report(into, fingerprint):
        return report
    if find_differences(read_mapping(into / FINGERPRINT), fingerprint) or (into / MANIFEST).exists():
        set_aside(into)
    questions = sum(map(len, asked.tests.values()))
    many = f"{len(stages)} trial{'s' * (len(stages) != 1)}"
    on_event(events.phase_started("evaluation", f"{many} x {questions} questions of {into.name}"))
    fields = plan.config.placement.model_dump(exclude={"workers"})
    batches = -(-questions // config.batch_size)
    placement = ActorPlacement.model_validate({**fields, "workers": max(1, min(concurrency, batches))})
    cache = str(Path(plan.run.storage.cache or "~/.cache/medlora").expanduser())
    build = make_builder(plan.run.base, cache, plan.run.seed, stages, config, asked, placement, cluster)
    about = {
        "name": f"{plan.config.name}: {into.name}",
        "notes": list(notes),
        "trial": next(iter(stages)),
    }
    began = time.monotonic()
    report = score_stages(
        into,
        fingerprint,
        stages,
        asked.tests,
        config,
        build,
        placement,
        cluster,
        on_event,
        folder.log,
        about,
        plan.run.seed,
    )
    on_event(events.finished("evaluation", time.monotonic() - began))
    return report
