"""The curriculum as a fold over its phases, then every stage scored in one pass; Ray is touched only where work is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from medlora import events
from medlora.config.phase import PhaseConfig
from medlora.config.placement import ActorPlacement
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import find_obstacle, make_job, refuse
from medlora.data.card import check_data, describe_findings, describe_overlap, read_card
from medlora.data.quarantine import check_rows, describe_quarantine
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, find_report
from medlora.evaluation.plan import describe_evaluation, describe_other_task
from medlora.evaluation.questions import Asked, read_asked
from medlora.evaluation.stages import Stages
from medlora.events import OnEvent
from medlora.runs import mirror
from medlora.runs.environment import get_git_commit, get_versions
from medlora.runs.files import read_mapping, remove, set_aside, sweep_temporary, write_sealed, write_yaml
from medlora.runs.folders import RunFolder, find_finished
from medlora.runs.manifests import MANIFEST, find_differences


@dataclass(frozen=True)
class Outcome:
    """A finished run: each phase's manifest, the evaluation's report, and whether anything had to be done."""

    phases: dict[str, dict[str, Any]]
    report: dict[str, Any] | None
    worked: bool


def check_run(config: RunConfig, run: RunFolder, redo: str | None) -> None:
    """Raise InputError when what stands in the run's folder was made from something else."""
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
    """A run that nothing is wrong with: its phases that stand, those that are left, and the chain to train on from."""

    config: RunConfig
    run: RunFolder
    redo: str | None
    on_event: OnEvent
    done: dict[str, dict[str, Any]]
    left: list[PhaseConfig]
    chain: tuple[Link, ...]
    stages: dict[str, tuple[Link, ...]]
    report: dict[str, Any] | None
    """The report that stands where no phase is left."""

    @property
    def outcome(self) -> Outcome | None:
        """What the run has come to where nothing is left to do."""
        nothing_left = not self.left and (self.report is not None or self.config.evaluation is None)
        return Outcome(self.done, self.report, worked=False) if nothing_left else None


def run_curriculum(config: RunConfig, run: RunFolder, redo: str | None, on_event: OnEvent) -> Outcome:
    """Train what is not trained yet, score what is not scored yet; a phase that still stands is reused.

    The caller holds the run's lock. Raises InputError for what only the user can mend.
    """
    begun = begin(config, run, redo, on_event)
    if begun.outcome is not None:
        return begun.outcome
    with connect_for([begun]) as cluster:
        return go_on(begun, cluster)


def begin(config: RunConfig, run: RunFolder, redo: str | None, on_event: OnEvent) -> Begun:
    """Look at everything that can be wrong with a run before Ray is touched; raises InputError."""
    _mark_run(config, run)
    check_rows(config, run.quarantine)
    check_run(config, run, redo)
    known = read_card(run.data)

    def tell(text: str) -> None:
        on_event(events.note("data", text))

    card = check_data(config, known, tell)
    _describe_run(config, run)
    write_sealed(run.data, card)
    for text in describe_findings(card) if card != known else ():
        tell(text)
    if redo is not None:
        run_phase_folder = run.phase(redo).root
        if (moved := set_aside(run_phase_folder)) is not None:
            on_event(events.note(redo, f"the old phase is kept in {mirror.name_place(moved)}"))
    mirror.push(run.root)
    done: dict[str, dict[str, Any]] = {}
    chain = start_chain(config)
    stages: dict[str, tuple[Link, ...]] = {"base": (), **({"start": chain} if chain else {})}
    left = list(config.phases)
    while left and (manifest := _find_finished(config, run, left[0], chain, done, redo)):
        phase = left.pop(0)
        done[phase.name] = manifest
        chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
        on_event(events.reused(phase.name))
    report = None if left else _find_report(config, run, stages)
    return Begun(config, run, redo, on_event, done, left, chain, stages, report)


@contextmanager
def connect_for(begun: Sequence[Begun]) -> Iterator[Any]:
    """The cluster, when it can hold all that the runs have left; raises InputError for what it never can."""
    from medlora.on_ray.cluster import connect
    from medlora.on_ray.placement import check_placement, count_gpus

    started = time.monotonic()
    with connect() as cluster:
        seconds = time.monotonic() - started
        event = events.cluster_found(str(cluster), cluster.started_here, seconds)
        for each in begun:
            each.on_event(event)
        for each in begun:
            for phase in each.left:
                key = f"phases.{phase.name}.placement" if phase.placement else "placement"
                placement = phase.placement or each.config.placement
                check_placement(placement, cluster, key)
                lora = phase.lora or each.config.lora
                dora = lora.dora and phase.chain != "continue"  # which keeps its parent's shape
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
    """Where stages are scored, and the key that says so."""
    own = config.evaluation.placement if config.evaluation else None
    placement = own or ActorPlacement.model_validate(config.placement.model_dump())
    return placement, "evaluation.placement" if own else "placement"


def go_on(begun: Begun, cluster: Any) -> Outcome:
    """Train the phases that are left and score every stage."""
    from medlora.on_ray.train_phase import train_on_ray

    config, run, on_event = begun.config, begun.run, begun.on_event
    done, chain, stages = begun.done, begun.chain, begun.stages
    with _scoring_early(begun, cluster) as early:
        for stage, links in stages.items() if early else ():
            early.add(stage, links)
        for phase in begun.left:
            began = time.monotonic()
            if manifest := _find_finished(config, run, phase, chain, done, begun.redo):
                on_event(events.reused(phase.name))
            else:
                placement = phase.placement or config.placement
                manifest = train_on_ray(make_job(config, phase, chain), run, placement, cluster, on_event, early)
                seconds = manifest["seconds"]["all"]
                around_s = time.monotonic() - began - seconds
                on_event(events.finished(phase.name, seconds, around_s))
            done[phase.name] = manifest
            chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
            if early and phase != begun.left[-1]:
                early.add(phase.name, chain)
    report = _find_report(config, run, stages) or _evaluate(config, run, stages, done, cluster, on_event)
    remove(run.scoring)
    return Outcome(done, report, worked=True)


@contextmanager
def _scoring_early(begun: Begun, cluster: Any) -> Iterator[Any]:
    """What scores stages while phases train, where the config and the cluster are for it; None elsewhere."""
    from medlora.on_ray.placement import count_gpus

    config, run, evaluation = begun.config, begun.run, begun.config.evaluation
    placement, _ = find_evaluation_placement(config)
    wanted = evaluation is not None and evaluation.beside_training
    if evaluation is None or not wanted or not begun.left or (wanted == "auto" and not count_gpus(placement, cluster)):
        yield None
        return
    from medlora.drivers.early_scoring import EarlyScoring
    from medlora.on_ray.answer_questions import make_builder

    asked = read_asked(evaluation, config.seed, config.data.max_bad_fraction)
    job = make_job(config, config.phases[-1], ())

    def describe(stage: str, chain: Sequence[Link]) -> dict[str, Any]:
        return describe_evaluation(config.base, config.seed, evaluation, {stage: chain}, asked)

    def build(stage: str, chain: Sequence[Link], there: ActorPlacement) -> Any:
        return make_builder(config.base, job.cache, job.seed, {stage: chain}, evaluation, asked, there, cluster)

    early = EarlyScoring(run.scoring, evaluation, asked, describe, build, placement, cluster, begun.on_event, run.log)
    with early.going_on():
        yield early


def _find_finished(
    config: RunConfig,
    run: RunFolder,
    phase: PhaseConfig,
    chain: Sequence[Link],
    done: Mapping[str, Any],
    redo: str | None,
) -> dict[str, Any] | None:
    """The manifest of a phase that still stands; None when it has to be trained (on).

    A phase whose parent was redone and came out otherwise is set aside; any other difference is refused.
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
    """The mark comes before every other file: a folder whose driver was killed at once is known as ours."""
    if read_mapping(run.about) is None:
        write_sealed(run.about, {"name": config.name, "created": time.strftime("%Y-%m-%d %H:%M:%S%z")})
    sweep_temporary(run.root, deep=False)


def _describe_run(config: RunConfig, run: RunFolder) -> None:
    write_yaml(run.config, config.model_dump(mode="json"))
    about = read_mapping(run.about) or {}
    write_sealed(run.about, {**about, "seed": config.seed, "versions": get_versions(), "git_commit": get_git_commit()})


def _describe_evaluation(config: RunConfig, stages: Stages) -> tuple[dict[str, Any], Asked] | tuple[None, None]:
    if config.evaluation is None:
        return None, None
    asked = read_asked(config.evaluation, config.seed, config.data.max_bad_fraction)
    return describe_evaluation(config.base, config.seed, config.evaluation, stages, asked), asked


def _find_report(config: RunConfig, run: RunFolder, stages: Stages) -> dict[str, Any] | None:
    """The report that still stands; an outdated one is set aside by the next evaluation."""
    fingerprint, _ = _describe_evaluation(config, stages)
    return find_report(run.evaluation, fingerprint) if fingerprint else None


def _evaluate(
    config: RunConfig,
    run: RunFolder,
    stages: Stages,
    done: Mapping[str, dict[str, Any]],
    cluster: Any,
    on_event: OnEvent,
) -> dict[str, Any] | None:
    from medlora.drivers.early_scoring import take_over
    from medlora.drivers.evaluation import score_stages
    from medlora.on_ray.answer_questions import make_builder

    fingerprint, asked = _describe_evaluation(config, stages)
    if config.evaluation is None or fingerprint is None or asked is None:
        return None
    placement, _ = find_evaluation_placement(config)
    if (
        find_differences(read_mapping(run.evaluation / FINGERPRINT), fingerprint)
        or (run.evaluation / MANIFEST).exists()
    ):
        set_aside(run.evaluation)
    questions = sum(map(len, asked.tests.values()))
    alone = {
        name: describe_evaluation(config.base, config.seed, config.evaluation, {name: chain}, asked)
        for name, chain in stages.items()
    }
    known = take_over(run.scoring, alone)
    device = f"{len(stages)} stages x {questions} questions" + (f", {len(known)} answers are there" if known else "")
    on_event(events.phase_started("evaluation", device))
    job = make_job(config, config.phases[-1], ())
    build = make_builder(config.base, job.cache, job.seed, stages, config.evaluation, asked, placement, cluster)
    about = {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "notes": [
            *describe_other_task(stages, config.evaluation),
            *describe_overlap(read_card(run.data) or {}),
            *describe_quarantine(config.evaluation),
        ],
        "phase_seconds": {name: m["seconds"]["all"] - m["seconds"]["base"] for name, m in done.items()},
    }
    began = time.monotonic()
    report = score_stages(
        run.evaluation,
        fingerprint,
        stages,
        asked.tests,
        config.evaluation,
        build,
        placement,
        cluster,
        on_event,
        run.log,
        about,
        config.seed,
        known,
    )
    on_event(events.finished("evaluation", time.monotonic() - began))
    return report
