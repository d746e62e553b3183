"""A sweep from its plan to its report: shared phases, search, the best trials on all of dev, and on test once if asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from medlora import endings, events
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import find_obstacle, make_job, refuse
from medlora.data.card import DataCard, describe_overlap
from medlora.data.sources import pack_scan
from medlora.drivers.steps import connect_and_report, look_through_data, train_and_report
from medlora.drivers.sweep_finals import Finals, score_best, score_once
from medlora.errors import InputError
from medlora.events import Event, OnEvent
from medlora.on_ray.cluster import Cluster
from medlora.on_ray.inbox import listen
from medlora.on_ray.placement import check_placement, count_gpus, find_concurrency
from medlora.on_ray.tokenise import prepare_on_ray
from medlora.on_ray.tune_search import Halving, Search, search_on_ray
from medlora.on_ray.tune_trial import Common, TrialSpec, run_trial
from medlora.on_ray.workers.stalls import StallWatch, find_beat_s
from medlora.reporting.sweep_page import write_sweep_page
from medlora.runs import mirror
from medlora.runs.files import sweep_temporary, write_with_checksum, write_yaml
from medlora.runs.folders import RunFolder, find_finished
from medlora.sweep.checks import find_start
from medlora.sweep.ledger import FINGERPRINT, PAGE, START, Ledger, Trial
from medlora.sweep.plan import SweepPlan, describe_sweep, list_earlier
from medlora.sweep.population import Population, Proposal, find_lineage, name_generation
from medlora.sweep.results import find_winner, read_record, write_results
from medlora.sweep.suggest import Suggester
from medlora.sweep.summary import Summary
from medlora.sweep.trackers import TrialLogs


def run_sweep(
    plan: SweepPlan,
    folder: RunFolder,
    ledger: Ledger,
    final_test: bool,
    on_event: OnEvent,
    reuse_actors: bool = True,
) -> Summary:
    """Do what is left of the sweep in `folder` and return its summary, what `sweep.json` holds.

    The caller holds the folder's lock. Raises InputError for what only the user can fix.
    """
    if final_test and plan.run.evaluation is None:
        raise InputError(f"--final-test: {plan.config.config} has no evaluation; name the tests there")
    sweep_temporary(folder.root, deep=False)
    if ledger.damage:
        on_event(events.note("search", ledger.damage))
    card = look_through_data(plan.check_against(), folder, on_event)
    write_with_checksum(folder.root / FINGERPRINT, describe_sweep(plan))
    write_with_checksum(folder.data, card)
    mirror.push(folder.root, exclude=("trials",))
    with TrialLogs(folder.root, plan.config) as logs, connect_and_report([on_event]) as cluster:
        concurrency = find_concurrency(plan.config.concurrency, plan.config.placement, cluster)
        start, chain = _find_or_train_start(plan, folder, cluster, on_event)
        maker = TrialMaker(plan, ledger, folder.root, start)
        _search(maker, chain, card, concurrency, cluster, _Receiver(maker, logs, on_event), reuse_actors)
        notes = describe_overlap(card)
        finals = Finals(plan, folder, ledger, concurrency, cluster, on_event)
        comparison = score_best(finals, notes)
        winner = find_winner(comparison)
        test = score_once(finals, winner) if final_test else None
    test = test or read_record(folder.root)
    summary = write_results(folder.root, plan, ledger, comparison, test, concurrency, notes)
    write_sweep_page(folder.root / PAGE, summary)
    return summary


def _find_or_train_start(
    plan: SweepPlan, folder: RunFolder, cluster: Cluster, on_event: OnEvent
) -> tuple[RunFolder, tuple[Link, ...]]:
    """The run that every trial starts from, and its chain; trained once in the sweep's own folder, unless `start` names one."""
    if plan.config.start:
        return find_start(plan)
    run, chain = RunFolder(folder.root / "start"), start_chain(plan.run)
    earlier = list_earlier(plan)
    if earlier:
        run.root.mkdir(exist_ok=True)
        write_yaml(run.config, plan.run.model_dump(mode="json"))
        names = ", ".join(phase.name for phase in earlier)
        text = f"all trials share phase {names}: trained once before the first trial, or reused"
        on_event(events.note("start", text))
    for phase in earlier:
        job, there = make_job(plan.run, phase, chain), run.phase(phase.name)
        if differences := find_obstacle(job, there):
            raise refuse(run, job, differences)
        if find_finished(there)[0] is None:
            placement = phase.placement or plan.run.placement
            check_placement(placement, cluster, f"phases.{phase.name}.placement of {plan.config.config}")
            train_and_report(job, run, placement, cluster, on_event)
        else:
            on_event(events.reused(phase.name))
        chain = extend_chain(chain, phase, there.adapter)
    return run, chain


class TrialMaker:
    """Chooses the next trial, and describes each trial by the config and folders that its process needs."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, folder: Path, start: RunFolder) -> None:
        self.plan, self.ledger, self.folder = plan, ledger, folder
        config, known = plan.config, list(ledger.trials.values())
        self.suggester = Suggester(plan.space, config.search, config.seed, plan.trials, known)
        self.grid = iter(plan.list_grid() if config.search == "grid" else [])
        self.population: Population | None = None
        if config.scheduler.kind == "pbt":
            scheduler = config.scheduler
            self.population = Population(plan.space, scheduler.population, scheduler.generations, config.seed)
        self.shared = {phase.name: str(start.phase(phase.name).root) for phase in list_earlier(plan)}

    def propose(self) -> Proposal | Literal["wait"] | None:
        """The next trial's values; "wait" while a generation is not over, None when there are no more."""
        if START not in self.ledger.trials:
            return Proposal(None, self.plan.start_params, {})
        if self.population:
            return self.population.propose(self.ledger, self.suggester.suggest)
        if self.plan.config.search == "grid":
            tried = [trial.params for trial in self.ledger.trials.values()]
            return next((Proposal(None, params, {}) for params in self.grid if params not in tried), None)
        return Proposal(*found, {}) if (found := self.suggester.suggest()) else None

    def describe(self, trial: Trial) -> TrialSpec:
        """A trial as plain values for its process; raises InputError where its values together make no valid config."""
        plan = self.plan
        *before, _ = lineage = find_lineage(self.ledger, trial)
        made = plan.make_trial([each.params for each in lineage], f"trial-{trial.id}", whole=not trial.about)
        names = {each.id: name_generation(plan.scored_phase, i + 1) for i, each in enumerate(lineage)}
        trials = self.folder / "trials"
        own = {names[each.id]: str(trials / each.id / "phases" / names[each.id]) for each in before}
        return {
            "id": trial.id,
            "config": made.model_dump(mode="json"),
            "train": [names[trial.id]] if trial.about else list(plan.searched),
            "links": self.shared | own,
            "offset": sum(made.phase(name).max_steps or 0 for name in own),
            "known": trial.step,
        }


class _Receiver:
    """Takes the events of the trials: into the ledger and the logs, to `on_event`, and with them the folder to its store."""

    def __init__(self, maker: TrialMaker, logs: TrialLogs, on_event: OnEvent) -> None:
        self.ledger, self.logs, self.on_event = maker.ledger, logs, on_event
        self.stalls = StallWatch(maker.plan.config.placement, "trials", on_event)
        self.pusher = mirror.Pusher(maker.folder, exclude=("trials",))
        self.refusals: list[str] = []
        self.saved = threading.Event()
        """Whether every step is in a checkpoint, so that a signal may end the driver at once."""

    def receive(self, event: Event) -> None:
        """Take one event of a worker."""
        if event["event"] == "beat":
            self.stalls.receive(event)
            return
        if event["event"] == "trial-step":
            self.saved.clear()
        self.logs.show(event, self.ledger)
        self.on_event(event)
        try:
            self.pusher.push()
        except InputError as error:
            self.refusals.append(str(error))


def _search(
    maker: TrialMaker,
    chain: Sequence[Link],
    card: DataCard,
    concurrency: int,
    cluster: Cluster,
    receiver: _Receiver,
    reuse_actors: bool,
) -> None:
    """Run the trials that are left; `receiver` takes what happens."""
    plan, placement = maker.plan, maker.plan.config.placement
    receiver.on_event(events.search(concurrency))
    with (
        listen(receiver.receive) as inbox,
        receiver.stalls.watching(),
        endings.saving(inbox.ask_to_leave, placement.grace_s) as receiver.saved,
    ):
        common: Common = {
            "folder": str(maker.folder),
            "scans": _pack_scans(plan),
            "dropped": plan.dropped,
            "card": card,
            "nonce": mirror.leave_nonce(maker.folder),
            "inbox": inbox,
            "beat_s": find_beat_s(placement),
            "cwd": os.getcwd(),
            "gpu": count_gpus(placement, cluster) > 0,
        }
        _prepare_tokens(plan, chain, cluster, receiver.on_event)
        search = Search(
            ledger=maker.ledger,
            suggester=maker.suggester,
            halving=_make_halving(maker),
            trials=plan.trials,
            propose=maker.propose,
            describe=maker.describe,
            trainable=partial(run_trial, common=common),
            placement=placement,
            concurrency=concurrency,
            on_event=receiver.receive,
            reuse_actors=reuse_actors,
            refusals=receiver.refusals,
        )
        try:
            search_on_ray(search, maker.folder, cluster)
        finally:
            receiver.on_event(events.searched())


def _make_halving(maker: TrialMaker) -> Halving | None:
    """Successive halving, with the scores of an earlier driver, if the config asks for it."""
    config, scheduler = maker.plan.config, maker.plan.config.scheduler
    if scheduler.kind != "asha":
        return None
    known = list(maker.ledger.trials.values())
    return Halving(scheduler.grace_steps or config.dev.every_steps, scheduler.reduction, known)


def _pack_scans(plan: SweepPlan) -> list[dict[str, object]]:
    """The scan of every source that a trial reads, so that no trial scans it again."""
    sources = {source.model_dump_json(): source for phase in plan.run.phases for source in phase.sources}
    return [pack_scan(source) for source in [*sources.values(), *plan.dev]]


def _prepare_tokens(plan: SweepPlan, start: Sequence[Link], cluster: Cluster, on_event: OnEvent) -> None:
    """Make the tokens of large sources once, before the trials; only the first searched phase's tokenizer exists yet."""
    prepare_on_ray(make_job(plan.run, plan.run.phase(plan.searched[0]), start, plan.dropped), cluster, on_event)
