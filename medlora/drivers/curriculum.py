"""The curriculum as a fold over its phases, then every stage scored in one pass; Ray is touched only where work is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medlora import events
from medlora.config.phase import PhaseConfig
from medlora.config.placement import ActorPlacement
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import find_obstacle, make_job, refuse
from medlora.data.card import describe_overlap, read_card
from medlora.data.quarantine import describe_quarantine
from medlora.drivers.steps import connect_and_report, look_through_data, train_and_report
from medlora.errors import InputError
from medlora.evaluation.ledger import find_report
from medlora.evaluation.plan import EvaluationTask, describe_other_task
from medlora.evaluation.questions import read_asked
from medlora.evaluation.reports import Report
from medlora.evaluation.stages import Stages
from medlora.events import OnEvent
from medlora.planning.figures import RunPlan
from medlora.planning.forecast import describe_left
from medlora.planning.memory import guess_device
from medlora.planning.plan import make_plan
from medlora.planning.table import describe_plan
from medlora.reporting.hub.card import write_phase_cards
from medlora.reporting.results.story import describe_data, describe_phases
from medlora.runs import mirror
from medlora.runs.environment import get_git_commit, get_versions
from medlora.runs.files import read_mapping, remove, set_aside, sweep_temporary, write_with_checksum, write_yaml
from medlora.runs.folders import RunFolder, find_finished
from medlora.runs.manifests import PhaseManifest

if TYPE_CHECKING:
    from medlora.drivers.early_scoring import EarlyScoring
    from medlora.on_ray.cluster import Cluster


@dataclass(frozen=True)
class Outcome:
    """A finished run: each phase's manifest, the evaluation's report, and whether anything had to be done."""

    phases: dict[str, PhaseManifest]
    report: Report | None
    worked: bool


def check_run(config: RunConfig, run: RunFolder, redo: str | None) -> None:
    """Raise InputError when the run's folder holds something that was made from another config."""
    if redo is not None and redo not in [phase.name for phase in config.phases]:
        raise InputError(f"--redo {redo}: no such phase; phases: {', '.join(phase.name for phase in config.phases)}")
    redone = False
    for phase in config.phases:
        redone = redone or phase.name == redo
        job = make_job(config, phase, ())
        differences = find_obstacle(job, run.phase(phase.name), with_parent=False)
        if differences and not redone:
            raise refuse(run, job, differences)


@dataclass
class Begun:
    """A run that passed all checks: its finished phases, those that are left, and the chain to continue from."""

    config: RunConfig
    run: RunFolder
    redo: str | None
    on_event: OnEvent
    done: dict[str, PhaseManifest]
    left: list[PhaseConfig]
    chain: tuple[Link, ...]
    stages: dict[str, tuple[Link, ...]]
    report: Report | None
    """The report that is still valid where no phase is left."""

    @property
    def outcome(self) -> Outcome | None:
        """What the run has come to where nothing is left to do."""
        nothing_left = not self.left and (self.report is not None or self.config.evaluation is None)
        return Outcome(self.done, self.report, worked=False) if nothing_left else None


def run_curriculum(config: RunConfig, run: RunFolder, redo: str | None, on_event: OnEvent) -> Outcome:
    """Train what is not trained yet, score what is not scored yet; a phase that is still valid is reused.

    The caller holds the run's lock. Raises InputError for what only the user can fix.
    """
    begun = begin(config, run, redo, on_event)
    if begun.outcome is not None:
        return begun.outcome
    with connect_for([begun]) as cluster:
        return finish(begun, cluster)


def begin(config: RunConfig, run: RunFolder, redo: str | None, on_event: OnEvent) -> Begun:
    """Look at everything that can be wrong with a run before Ray is touched; raises InputError."""
    _mark_run(config, run)
    check_run(config, run, redo)
    card = look_through_data(config, run, on_event)
    _describe_run(config, run)
    write_with_checksum(run.data, card)
    if redo is not None and (moved := set_aside(run.phase(redo).root)) is not None:
        on_event(events.note(redo, f"the old phase is saved in {mirror.name_place(moved)}"))
    mirror.push(run.root)
    done: dict[str, PhaseManifest] = {}
    chain = start_chain(config)
    stages: dict[str, tuple[Link, ...]] = {"base": (), **({"start": chain} if chain else {})}
    left = list(config.phases)
    while left and (manifest := _find_finished(config, run, left[0], chain, done, redo)):
        phase = left.pop(0)
        done[phase.name] = manifest
        chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
        on_event(events.reused(phase.name))
    report = None if left else _find_report(config, run, stages)
    if left:
        on_event(describe_left(_log_plan(config, run)))
    return Begun(config, run, redo, on_event, done, left, chain, stages, report)


def _log_plan(config: RunConfig, run: RunFolder) -> RunPlan:
    """Open the run's log with what it is going to do; returns that."""
    log = logging.getLogger("medlora.run").getChild(run.name)
    plan = make_plan(config, run, guess_device(config.placement))
    for line in describe_plan(plan):
        log.info(line)
    return plan


@contextmanager
def connect_for(begun: Sequence[Begun]) -> Iterator[Cluster]:
    """The cluster, when it can hold all that the runs have left; raises InputError for what it never can."""
    from medlora.on_ray.placement import check_placement, count_gpus

    with connect_and_report([each.on_event for each in begun]) as cluster:
        for each in begun:
            for phase in each.left:
                key = f"phases.{phase.name}.placement" if phase.placement else "placement"
                placement = phase.placement or each.config.placement
                check_placement(placement, cluster, key)
                lora = phase.lora or each.config.lora
                dora = lora.dora and phase.chain != "continue"  # which has its parent's shape
                if dora and each.config.base.quantization == "int8" and not count_gpus(placement, cluster):
                    raise InputError(
                        f"phases.{phase.name}: lora.dora on an int8 base needs a GPU, and {key} has none; set "
                        "base.quantization to nf4 or none, or lora.dora to false"
                    )
            if each.config.evaluation is not None:
                placement, key = find_evaluation_placement(each.config)
                check_placement(placement, cluster, key)
        yield cluster


def find_evaluation_placement(config: RunConfig) -> tuple[ActorPlacement, str]:
    """Where stages are scored, and the key that sets it."""
    own = config.evaluation.placement if config.evaluation else None
    placement = own or ActorPlacement.model_validate(config.placement.model_dump())
    return placement, "evaluation.placement" if own else "placement"


def finish(begun: Begun, cluster: Cluster) -> Outcome:
    """Train the phases that are left and score every stage."""
    config, run, on_event = begun.config, begun.run, begun.on_event
    done, chain, stages = begun.done, begun.chain, begun.stages
    with _scoring_early(begun, cluster) as early:
        if early:
            for stage, links in stages.items():
                early.add(stage, links)
        for phase in begun.left:
            manifest = _find_finished(config, run, phase, chain, done, begun.redo)
            is_reused = manifest is not None
            if manifest:
                on_event(events.reused(phase.name))
            else:
                placement = phase.placement or config.placement
                manifest = train_and_report(make_job(config, phase, chain), run, placement, cluster, on_event, early)
            done[phase.name] = manifest
            chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
            if not is_reused:
                write_phase_cards(run, config, {phase.name: chain})
            if early and phase != begun.left[-1]:
                early.add(phase.name, chain)
    report = _find_report(config, run, stages) or _evaluate(begun, cluster)
    remove(run.scoring)
    write_phase_cards(run, config, stages, only_known=True)  # phases of an earlier version stay as they were
    mirror.push(run.root)
    return Outcome(done, report, worked=True)


@contextmanager
def _scoring_early(begun: Begun, cluster: Cluster) -> Iterator[EarlyScoring | None]:
    """What scores stages while phases train, where the config and the cluster are for it; None elsewhere."""
    from medlora.on_ray.placement import count_gpus

    config, evaluation = begun.config, begun.config.evaluation
    placement, _ = find_evaluation_placement(config)
    wanted = evaluation is not None and evaluation.beside_training
    task = _make_task(config, {}) if wanted and begun.left else None
    if task is None or (wanted == "auto" and not count_gpus(placement, cluster)):
        yield None
        return
    from medlora.drivers.early_scoring import EarlyScoring
    from medlora.on_ray.answer_questions import Actors

    early = EarlyScoring(begun.run.scoring, task, Actors(placement, cluster, begun.on_event, begun.run.log))
    with early.running():
        yield early


def _make_task(config: RunConfig, stages: Stages) -> EvaluationTask | None:
    """What is scored of these stages; None where the config has no evaluation."""
    if config.evaluation is None:
        return None
    asked = read_asked(config.evaluation, config.seed, config.data.max_bad_fraction)
    return EvaluationTask(config.base, config.seed, str(config.storage.cache_folder), stages, config.evaluation, asked)


def _find_finished(
    config: RunConfig,
    run: RunFolder,
    phase: PhaseConfig,
    chain: Sequence[Link],
    done: Mapping[str, PhaseManifest],
    redo: str | None,
) -> PhaseManifest | None:
    """The manifest of a phase that is still valid; None when it has to be trained or resumed.

    A phase whose parent was redone with another result is moved aside; any other difference is refused.
    """
    folder = run.phase(phase.name)
    job = make_job(config, phase, chain)
    differences = find_obstacle(job, folder)
    if differences and redo is not None and _comes_after(config, phase, redo):
        set_aside(folder.root)
        return None
    if differences:
        raise refuse(run, job, differences)
    manifest, _ = find_finished(folder)
    return manifest


def _comes_after(config: RunConfig, phase: PhaseConfig, name: str) -> bool:
    names = [phase.name for phase in config.phases]
    return names.index(phase.name) >= names.index(name)


def _mark_run(config: RunConfig, run: RunFolder) -> None:
    """Write the mark before every other file: a folder whose driver was killed at once is known as ours."""
    if read_mapping(run.about) is None:
        write_with_checksum(run.about, {"name": config.name, "created": time.strftime("%Y-%m-%d %H:%M:%S%z")})
    sweep_temporary(run.root, deep=False)


def _describe_run(config: RunConfig, run: RunFolder) -> None:
    write_yaml(run.config, config.model_dump(mode="json"))
    about = read_mapping(run.about) or {}
    write_with_checksum(
        run.about, {**about, "seed": config.seed, "versions": get_versions(), "git_commit": get_git_commit()}
    )


def _find_report(config: RunConfig, run: RunFolder, stages: Stages) -> Report | None:
    """The report that is still valid; the next evaluation moves an outdated one aside."""
    task = _make_task(config, stages)
    return find_report(run.evaluation, task.fingerprint) if task else None


def _evaluate(begun: Begun, cluster: Cluster) -> Report | None:
    """Score all stages in one pass, but for what was answered early; None where the config has no evaluation."""
    from medlora.drivers.early_scoring import take_over
    from medlora.drivers.evaluation import score_afresh
    from medlora.on_ray.answer_questions import Actors

    config, run, stages = begun.config, begun.run, begun.stages
    task = _make_task(config, stages)
    if task is None:
        return None
    alone = {name: task.select(name, chain).fingerprint for name, chain in stages.items()}
    known = take_over(run.scoring, alone)
    label = f"{len(stages)} stages x {task.asked.count} questions" + (
        f", {len(known)} answers are there" if known else ""
    )
    about = {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "notes": [
            *describe_other_task(stages, task.config),
            *describe_overlap(read_card(run.data)),
            *describe_quarantine(task.config),
        ],
        "phases": describe_phases(run, config.phases, begun.done),
        "data": describe_data(read_card(run.data) or {}),
        "phase_seconds": {name: m["seconds"]["all"] - m["seconds"]["base"] for name, m in begun.done.items()},
    }
    placement, _ = find_evaluation_placement(config)
    actors = Actors(placement, cluster, begun.on_event, run.log)
    return score_afresh(task, run.evaluation, actors, about, label, known)
