"""A sweep from its plan to its report: the shared phases, the search, the best trials on all of dev, once on test if asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medlora import endings, events
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import find_obstacle, make_job, refuse
from medlora.data.card import check_data, describe_findings, describe_overlap, read_card
from medlora.data.quarantine import check_rows
from medlora.data.sources import pack_scan
from medlora.drivers.sweep_finals import score_best, score_once
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.on_ray.cluster import Cluster, connect
from medlora.on_ray.inbox import listen
from medlora.on_ray.placement import check_placement, count_gpus, find_concurrency
from medlora.on_ray.tokenise import prepare_on_ray
from medlora.on_ray.train_phase import train_on_ray
from medlora.on_ray.tune_search import Halving, Search, search_on_ray
from medlora.on_ray.tune_trial import run_trial
from medlora.on_ray.workers.stalls import StallWatch, find_beat_s
from medlora.runs import mirror
from medlora.runs.files import sweep_temporary, write_sealed, write_yaml
from medlora.runs.folders import RunFolder, find_finished
from medlora.sweep.checks import find_start
from medlora.sweep.ledger import FINGERPRINT, START, Ledger, Trial
from medlora.sweep.plan import SweepPlan, describe_sweep, list_earlier
from medlora.sweep.population import Population, Proposal, find_lineage, name_generation
from medlora.sweep.results import find_winner, read_record, write_results
from medlora.sweep.suggest import Suggester
from medlora.sweep.trackers import TrialLogs

_PUSH_EVERY_S = 10.0
"""How often the ledger goes to the sweep's store: what a driver lost since then its trials report again."""


def run_sweep(
    plan: SweepPlan,
    folder: RunFolder,
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
    sweep_temporary(folder.root, deep=False)
    if ledger.damage:
        _note(on_event, "search", ledger.damage)
    checked = plan.check_against()
    check_rows(checked, folder.quarantine)
    known = read_card(folder.data)
    card = check_data(checked, known, lambda text: _note(on_event, "data", text))
    for text in describe_findings(card) if card != known else ():
        _note(on_event, "data", text)
    write_sealed(folder.root / FINGERPRINT, describe_sweep(plan))
    write_sealed(folder.data, card)
    mirror.push(folder.root, passing=("trials",))
    began = time.monotonic()
    with TrialLogs(folder.root, plan.config) as logs, connect() as cluster:
        seconds = time.monotonic() - began
        on_event(events.cluster_found(str(cluster), cluster.started_here, seconds))
        concurrency = find_concurrency(plan.config.concurrency, plan.config.placement, cluster)
        start, chain = _find_or_train_start(plan, folder, cluster, on_event)
        _search(plan, folder, ledger, start, chain, card, concurrency, cluster, logs, on_event, reuse_actors)
        notes = describe_overlap(card)
        comparison = score_best(plan, folder, ledger, concurrency, cluster, notes, on_event)
        winner = find_winner(comparison)
        test = score_once(plan, folder, ledger, winner, concurrency, cluster, on_event) if final_test else None
    return write_results(folder.root, plan, ledger, comparison, test or read_record(folder.root), concurrency, notes)


def _note(on_event: OnEvent, phase: str, text: str) -> None:
    on_event(events.note(phase, text))


def _find_or_train_start(
    plan: SweepPlan, folder: RunFolder, cluster: Cluster, on_event: OnEvent
) -> tuple[RunFolder, tuple[Link, ...]]:
    """The run that every trial starts from, and its chain; trained once, in the sweep's own folder, unless `start` has it."""
    if plan.config.start:
        return find_start(plan)
    run, chain = RunFolder(folder.root / "start"), start_chain(plan.run)
    earlier = list_earlier(plan)
    if earlier:
        run.root.mkdir(exist_ok=True)
        write_yaml(run.config, plan.run.model_dump(mode="json"))
    for phase in earlier:
        job, there = make_job(plan.run, phase, chain), run.phase(phase.name)
        if differences := find_obstacle(job, there):
            raise refuse(run, job, differences)
        if find_finished(there)[0] is None:
            placement = phase.placement or plan.run.placement
            check_placement(placement, cluster, f"phases.{phase.name}.placement of {plan.config.config}")
            began = time.monotonic()
            seconds = train_on_ray(job, run, placement, cluster, on_event)["seconds"]["all"]
            around_s = time.monotonic() - began - seconds
            on_event(events.finished(phase.name, seconds, around_s))
        else:
            on_event(events.reused(phase.name))
        chain = extend_chain(chain, phase, there.adapter)
    return run, chain


def _search(
    plan: SweepPlan,
    folder: RunFolder,
    ledger: Ledger,
    start: RunFolder,
    chain: Sequence[Link],
    card: dict[str, Any],
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
    population = None
    if config.scheduler.kind == "pbt":
        population = Population(plan.space, config.scheduler.population, config.scheduler.generations, config.seed)

    def propose() -> Proposal | Literal["wait"] | None:
        if START not in ledger.trials:
            return Proposal(None, plan.start_params, {})
        if population:
            return population.propose(ledger, suggester.suggest)
        if config.search == "grid":
            tried = [trial.params for trial in ledger.trials.values()]
            return next((Proposal(None, params, {}) for params in grid if params not in tried), None)
        return Proposal(*found, {}) if (found := suggester.suggest()) else None

    shared = {phase.name: str(start.phase(phase.name).root) for phase in list_earlier(plan)}

    def describe(trial: Trial) -> dict[str, Any]:
        *before, _ = lineage = find_lineage(ledger, trial)
        made = plan.make_trial([each.params for each in lineage], f"trial-{trial.id}", whole=not trial.about)
        names = {each.id: name_generation(plan.judged, i + 1) for i, each in enumerate(lineage)}
        own = {names[each.id]: str(folder.root / "trials" / each.id / "phases" / names[each.id]) for each in before}
        return {
            "id": trial.id,
            "config": made.model_dump(mode="json"),
            "train": [names[trial.id]] if trial.about else list(plan.searched),
            "links": shared | own,
            "offset": sum(made.phase(name).max_steps or 0 for name in own),
            "known": trial.step,
        }

    pusher, refusals = _Mirror(folder.root), list[str]()

    watch = StallWatch(config.placement, "trials", on_event)

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "beat":
            watch.hear(event)
            return
        if event["event"] == "trial-step":
            saved.clear()
        logs.show(event, ledger)
        on_event(event)
        try:
            pusher.push()
        except InputError as error:
            refusals.append(str(error))

    on_event(events.search(concurrency))
    with (
        listen(hear) as inbox,
        watch.watching(),
        endings.saving(inbox.ask_to_leave, config.placement.grace_s) as saved,
    ):
        common = {
            "folder": str(folder.root),
            "scans": _pack_scans(plan),
            "dropped": plan.dropped,
            "card": card,
            "nonce": mirror.leave_nonce(folder.root),
            "inbox": inbox,
            "beat_s": find_beat_s(config.placement),
            "cwd": os.getcwd(),
            "gpu": count_gpus(config.placement, cluster) > 0,
        }
        _prepare_tokens(plan, chain, cluster, on_event)
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
            refusals=refusals,
        )
        try:
            search_on_ray(search, folder.root, cluster)
        finally:
            on_event(events.searched())


class _Mirror:
    """Takes what the driver writes to the sweep's store, if it is in one, now and then; its workers push their trials."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pushed = folder, time.monotonic()
        self.lock = threading.Lock()

    def push(self) -> None:
        """Push where the last time is long enough ago; raises InputError."""
        with self.lock:
            if time.monotonic() - self.pushed > _PUSH_EVERY_S:
                mirror.push(self.folder, passing=("trials",))
                self.pushed = time.monotonic()


def _pack_scans(plan: SweepPlan) -> list[dict[str, Any]]:
    """What is known of every source that a trial reads, so that none looks through them again."""
    sources = {source.model_dump_json(): source for phase in plan.run.phases for source in phase.sources}
    return [pack_scan(source) for source in [*sources.values(), *plan.dev]]


def _prepare_tokens(plan: SweepPlan, start: Sequence[Link], cluster: Cluster, on_event: OnEvent) -> None:
    """Make the tokens of large sources once, before the trials; only the first searched phase's tokenizer is there yet."""
    prepare_on_ray(make_job(plan.run, plan.run.phase(plan.searched[0]), start, plan.dropped), cluster, on_event)
