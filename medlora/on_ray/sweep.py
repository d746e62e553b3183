"""A sweep from its plan to its report: the shared phases, the search, the best trials on all of dev, once on test if asked."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medlora import runs
from medlora.config import ActorPlacement, EvaluationConfig
from medlora.data_card import check_data, describe_findings, describe_overlap
from medlora.errors import InputError
from medlora.evaluation import Stages, describe_evaluation, find_report, read_asked
from medlora.lineage import Link, extend_chain, find_obstacle, make_job, refuse, start_chain
from medlora.on_ray.cluster import Cluster, OnEvent, check_placement, connect, count_gpus, listen
from medlora.on_ray.evaluate import make_builder
from medlora.on_ray.prepare import prepare_on_ray
from medlora.on_ray.scoring import score_stages
from medlora.on_ray.search import Halving, Search, find_concurrency, search_on_ray
from medlora.on_ray.train import train_on_ray
from medlora.on_ray.trial import run_trial
from medlora.quarantine import check_rows
from medlora.sources import pack_scan
from medlora.sweep import FINGERPRINT, SweepPlan, describe_sweep, find_start, list_earlier
from medlora.sweep_ledger import START, Ledger, Trial
from medlora.sweep_logs import TrialLogs
from medlora.sweep_report import compare_with_start, find_winner, read_record, write_results
from medlora.sweep_search import Suggester

log = logging.getLogger("medlora.run")


def run_sweep(
    plan: SweepPlan,
    folder: runs.RunFolder,
    ledger: Ledger,
    final_test: bool,
    on_event: OnEvent,
    reuse_actors: bool = True,
) -> dict[str, Any]:
    """Do what is left of the sweep in `folder` and return its summary, what `sweep.json` holds.

    The caller holds the folder's lock. Raises InputError for what only the user can mend.
    """
    if final_test and plan.run.evaluation is None:
        raise InputError(f"--final-test: {plan.config.config} has no evaluation; name the tests there")
    checked = plan.check_against()
    check_rows(checked, folder.quarantine)
    known = runs.read_json(folder.data)
    card = check_data(checked, known, lambda text: _note(on_event, "data", text))
    for text in describe_findings(card) if card != known else ():
        _note(on_event, "data", text)
    runs.write_json(folder.root / FINGERPRINT, describe_sweep(plan))
    runs.write_json(folder.data, card)
    began = time.monotonic()
    with connect() as cluster:
        seconds = time.monotonic() - began
        on_event({"event": "cluster", "text": str(cluster), "started_here": cluster.started_here, "seconds": seconds})
        concurrency = find_concurrency(plan.config.concurrency, plan.config.placement, cluster)
        start = _find_or_train_start(plan, folder, cluster, on_event)
        with TrialLogs(folder.root, plan.config) as logs:
            _search(plan, folder, ledger, start, concurrency, cluster, logs, on_event, reuse_actors)
        comparison = _score_best(plan, folder, ledger, start, concurrency, cluster, card, on_event)
        winner = find_winner(comparison)
        test = _score_once(plan, folder, ledger, start, winner, concurrency, cluster, on_event) if final_test else None
    return write_results(folder.root, plan, ledger, comparison, test or read_record(folder.root), concurrency)


def _note(on_event: OnEvent, phase: str, text: str) -> None:
    on_event({"event": "note", "phase": phase, "text": text})


def _find_or_train_start(
    plan: SweepPlan, folder: runs.RunFolder, cluster: Cluster, on_event: OnEvent
) -> tuple[Link, ...]:
    """The chain that every trial starts from; its phases are trained once, in the sweep's own folder, unless `start` has them."""
    if plan.config.start:
        return find_start(plan, Path(plan.config.start))
    run, chain = runs.RunFolder(folder.root / "start"), start_chain(plan.run)
    earlier = list_earlier(plan)
    if earlier:
        run.root.mkdir(exist_ok=True)
        runs.write_yaml(run.config, plan.run.model_dump(mode="json"))
    for phase in earlier:
        job, there = make_job(plan.run, phase, chain), run.phase(phase.name)
        if differences := find_obstacle(job, there):
            raise refuse(run, job, differences)
        if runs.read_manifest(there.root) is None:
            placement = phase.placement or plan.run.placement
            check_placement(placement, cluster, f"phases.{phase.name}.placement of {plan.config.config}")
            began = time.monotonic()
            seconds = train_on_ray(job, run, placement, cluster, on_event)["seconds"]["all"]
            around_s = time.monotonic() - began - seconds
            on_event({"event": "finished", "phase": phase.name, "seconds": seconds, "around_s": around_s})
        else:
            on_event({"event": "reused", "phase": phase.name})
        chain = extend_chain(chain, phase, there.adapter)
    return chain


def _search(
    plan: SweepPlan,
    folder: runs.RunFolder,
    ledger: Ledger,
    start: Sequence[Link],
    concurrency: int,
    cluster: Cluster,
    logs: TrialLogs,
    on_event: OnEvent,
    reuse_actors: bool,
) -> None:
    config, known = plan.config, list(ledger.trials.values())
    suggester = Suggester(plan.space, config.search, config.seed, plan.trials, known)
    halving = None
    if config.scheduler.kind == "asha":
        halving = Halving(config.scheduler.grace_steps or config.dev.every_steps, config.scheduler.reduction, known)
    grid = (params for params in (plan.list_grid() if config.search == "grid" else []))

    def propose() -> tuple[Any, dict[str, Any]] | None:
        if START not in ledger.trials:
            return None, plan.start_params
        if config.search == "grid":
            tried = [trial.params for trial in ledger.trials.values()]
            return next(((None, params) for params in grid if params not in tried), None)
        return suggester.suggest()

    def describe(id: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"id": id, "config": plan.make_trial(params, f"trial-{id}").model_dump(mode="json")}

    def hear(event: dict[str, Any]) -> None:
        logs.show(event, ledger)
        on_event(event)

    root = Path(config.start).expanduser().absolute() if config.start else folder.root / "start"
    on_event({"event": "search", "concurrency": concurrency})
    with listen(hear) as inbox:
        common = {
            "folder": str(folder.root),
            "searched": list(plan.searched),
            "start": {phase.name: str(root / "phases" / phase.name) for phase in list_earlier(plan)},
            "scans": _pack_scans(plan),
            "dropped": plan.dropped,
            "inbox": inbox,
            "cwd": os.getcwd(),
            "gpu": count_gpus(config.placement, cluster) > 0,
        }
        _prepare_tokens(plan, start, cluster, on_event)
        search = Search(
            ledger=ledger,
            suggester=suggester,
            halving=halving,
            trials=plan.trials,
            propose=propose,
            describe=describe,
            trainable=partial(run_trial, common=common),
            placement=config.placement,
            concurrency=concurrency,
            on_event=hear,
            reuse_actors=reuse_actors,
        )
        try:
            search_on_ray(search, folder.root, cluster)
        finally:
            on_event({"event": "searched"})


def _pack_scans(plan: SweepPlan) -> list[dict[str, Any]]:
    """What is known of every source that a trial reads, so that none looks through them again."""
    sources = {source.model_dump_json(): source for phase in plan.run.phases for source in phase.sources}
    return [pack_scan(source) for source in [*sources.values(), *plan.dev]]


def _prepare_tokens(plan: SweepPlan, start: Sequence[Link], cluster: Cluster, on_event: OnEvent) -> None:
    """Make the tokens of large sources once, before the trials; only the first searched phase's tokenizer is there yet."""
    prepare_on_ray(make_job(plan.run, plan.run.phase(plan.searched[0]), start, plan.dropped), cluster, on_event)


def _make_stages(plan: SweepPlan, folder: runs.RunFolder, trials: Sequence[Trial], start: Sequence[Link]) -> Stages:
    """Trial -> its chain up to the judged phase; adapters of trials get names of their own, since one base holds them all."""
    stages = {}
    for trial in trials:
        run, chain = runs.RunFolder(folder.root / "trials" / trial.id), tuple(start)
        for phase in plan.run.phases:
            if phase.name in plan.searched:
                chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
        mine = {phase: f"{phase}-{trial.id}" for phase in plan.searched}
        stages[trial.id] = tuple(Link(name=mine.get(link.name, link.name), folder=link.folder) for link in chain)
    return stages


def _score_best(
    plan: SweepPlan,
    folder: runs.RunFolder,
    ledger: Ledger,
    start: Sequence[Link],
    concurrency: int,
    cluster: Cluster,
    card: Mapping[str, Any],
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
    stages = _make_stages(plan, folder, [first, *best], start)
    report = _score(
        plan,
        folder,
        folder.root / "dev",
        stages,
        plan.describe_dev(),
        concurrency,
        cluster,
        on_event,
        describe_overlap(card),
    )
    return compare_with_start(report)


def _score_once(
    plan: SweepPlan,
    folder: runs.RunFolder,
    ledger: Ledger,
    start: Sequence[Link],
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
        _note(on_event, "evaluation", f"the tests are asked of the stage {plan.judged}, the last that was trained")
    stages = _make_stages(plan, folder, [ledger.trials[winner]], start)
    _score(plan, folder, folder.root / "test", stages, plan.run.evaluation, concurrency, cluster, on_event, [])
    return read_record(folder.root) or {}


def _score(
    plan: SweepPlan,
    folder: runs.RunFolder,
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
    if runs.find_differences(runs.read_json(into / FINGERPRINT), fingerprint) or runs.read_manifest(into):
        runs.set_aside(into)
    questions = sum(map(len, asked.tests.values()))
    many = f"{len(stages)} trial{'s' * (len(stages) != 1)}"
    on_event({"event": "phase", "phase": "evaluation", "device": f"{many} x {questions} questions of {into.name}"})
    fields = plan.config.placement.model_dump(exclude={"workers"})
    batches = -(-questions // config.batch_size)
    placement = ActorPlacement.model_validate({**fields, "workers": max(1, min(concurrency, batches))})
    cache = str(Path(plan.run.storage.cache or "~/.cache/medlora").expanduser())
    build = make_builder(plan.run.base, cache, plan.run.seed, stages, config, asked, placement, cluster)
    about = {
        "name": f"{plan.config.name}: {into.name}",
        "notes": list(notes),
        "trial": list(itertools.islice(stages, 1))[0],
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
    on_event({"event": "finished", "phase": "evaluation", "seconds": time.monotonic() - began, "around_s": 0.0})
    return report
