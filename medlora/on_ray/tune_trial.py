"""One trial of a sweep, as a function that Ray Tune runs in an actor: the phases of its config, scored as they train."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from medlora import events
from medlora.config.run import RunConfig
from medlora.curriculum.chains import extend_chain, start_chain
from medlora.curriculum.jobs import PhaseJob, find_obstacle, make_job
from medlora.data.card import DataCard
from medlora.errors import InputError
from medlora.events import Event, OnEvent
from medlora.on_ray.inbox import Inbox
from medlora.on_ray.workers.stalls import beating
from medlora.runs import mirror
from medlora.runs.disk_errors import explain, explaining
from medlora.runs.environment import get_versions
from medlora.runs.files import read_json_lines, set_aside, write_with_checksum, write_yaml
from medlora.runs.folders import PhaseFolder, RunFolder, find_finished
from medlora.startup import enter_folder, importing

if TYPE_CHECKING:
    from medlora.training.reuse import ReusedParts

_UNWIND_S = 60
"""How long a stopped trial may take to let go of its files and its model before its process is given up."""


class TrialSpec(TypedDict):
    """A trial as plain values for its process."""

    id: str
    config: dict[str, object]
    train: list[str]
    """The phases that it trains; the last one is scored."""
    links: dict[str, str]
    """Where the phases before it are."""
    offset: int
    """Steps of generations before."""
    known: int
    """The last step whose score is in the ledger."""


class Common(TypedDict):
    """What all trials of a sweep share."""

    folder: str
    scans: list[dict[str, object]]
    dropped: Mapping[str, tuple[str, ...]] | None
    card: DataCard
    nonce: str
    inbox: Inbox
    beat_s: float
    cwd: str
    gpu: bool


ReportToTune = Callable[[Mapping[str, object]], None]
"""Tune's own `report`."""


class RunPhase(Protocol):
    """`training.phase.run_phase`, bound to what asks its workers to leave."""

    def __call__(
        self, job: PhaseJob, folder: PhaseFolder, on_event: OnEvent, device: str, *, reuse: ReusedParts | None = None
    ) -> object:
        """Train a phase."""


def run_trial(trial: TrialSpec, common: Common) -> None:
    """Train the trial's phases into its own run folder, from the last whole checkpoint where there is one.

    Every dev score of the scored phase is reported to Tune, which may end the trial there. What the config itself is to
    blame for (a loss that is no number) is reported as the trial's end, so that it is not tried again.
    """
    from ray import tune

    clock = _Clock()
    enter_folder(common["cwd"])
    # Tune gives a function 2 s to end before the actor may serve the next trial; a Trainer's way out may take longer.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_UNWIND_S)
    with importing():
        from medlora.data.sources import remember
        from medlora.on_ray.workers.leaving import watch_inbox
        from medlora.training.callbacks import Leaving
        from medlora.training.phase import run_phase

    clock.turn_to("load")
    for packed in common["scans"]:
        remember(packed)
    folder = Path(common["folder"]) / "trials" / trial["id"]
    try:
        with explaining(folder):
            mirror.check_seen(Path(common["folder"]), common["nonce"])
        run = partial(run_phase, is_leaving=watch_inbox(common["inbox"]).is_set)
        with beating(common["inbox"], f"trial {trial['id']}", common["beat_s"]):
            _train(trial, folder, common, tune.report, run, clock)
    except Leaving:  # its driver ends: all that it has is in its checkpoint
        clock.turn_to("wait")
    except (InputError, FloatingPointError) as error:
        clock.turn_to("wait")
        tune.report({"ended": "refused" if _concerns_all(error, folder) else "failed", "why": str(error)})
    else:
        clock.turn_to("wait")
        tune.report({"ended": "finished", "why": ""})
    finally:  # a trial that is stopped leaves by SystemExit
        clock.turn_to("")
        common["inbox"].put(events.trial_seconds(trial["id"], clock.seconds))


def _concerns_all(error: Exception, folder: Path) -> bool:
    """Whether what went wrong is none of this trial's values, and would meet the others, too: a full disk, a store."""
    cause = error.__cause__
    unseen = not RunFolder(folder).config.is_file()
    return unseen or isinstance(cause, OSError) or (cause is not None and explain(cause, folder) is not None)


class _Clock:
    """What a trial's seconds go into, one thing after another."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("import", "load", "train", "score", "wait", "save"), 0.0)
        self.doing, self.since = "import", time.monotonic()

    def turn_to(self, what: str) -> None:
        """What is done from now on."""
        now = time.monotonic()
        self.seconds[self.doing] += now - self.since
        self.doing, self.since = what, now

    def move(self, seconds: float, was: str, to: str) -> None:
        """So much of what was done was something else."""
        self.seconds[was] -= seconds
        self.seconds[to] += seconds


def _train(
    trial: TrialSpec,
    folder: Path,
    common: Common,
    report_to_tune: ReportToTune,
    run_phase: RunPhase,
    clock: _Clock,
) -> None:
    config, run = RunConfig.model_validate(trial["config"]), RunFolder(folder)
    _prepare(config, run, trial["links"], common["card"])
    chain = start_chain(config)
    for phase in config.phases:
        there = run.phase(phase.name)
        if phase.name in trial["train"]:
            clock.turn_to("load")
            job = make_job(config, phase, chain, common["dropped"])
            if find_obstacle(job, there):
                set_aside(there.root)
            scored = phase.name == trial["train"][-1]
            hook = _Hook(trial, there, report_to_tune if scored else None, common["inbox"], clock)
            try:
                finished = find_finished(there)[0] is not None
            except InputError as error:  # torn, without a checkpoint to resume from: trained again, nothing is lost
                aside = set_aside(there.root)
                text = f"{error}; it was moved to {aside} and is trained again"
                common["inbox"].put(events.trial_note(trial["id"], text))
                finished = False
            hook.report_again(finished)
            if not finished:
                run_phase(job, there, hook, "cuda" if common["gpu"] else "cpu", reuse=_get_reused_parts())
            clock.turn_to("save")
        chain = extend_chain(chain, phase, there.adapter)


@cache
def _get_reused_parts() -> ReusedParts:
    """The parts that the trials of this process share."""
    from medlora.training.reuse import ReusedParts

    return ReusedParts()


def _prepare(config: RunConfig, run: RunFolder, links: dict[str, str], card: DataCard) -> None:
    """An ordinary run folder; phases that several trials share are links, in a store copies."""
    mirror.pull(run.root)
    (run.root / "phases").mkdir(parents=True, exist_ok=True)
    write_yaml(run.config, config.model_dump(mode="json"))
    about = {"name": config.name, "seed": config.seed, "versions": get_versions()}
    write_with_checksum(run.about, about)
    write_with_checksum(run.data, card)
    for name, target in links.items():
        link = run.phase(name).root
        mirror.pull(Path(target))
        if mirror.find_uri(link):
            shutil.copytree(target, link, dirs_exist_ok=True)
        elif not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    mirror.push(run.root)


class _Hook:
    """Receives the events of a phase: its steps go to the driver's display, its dev scores to Tune."""

    def __init__(
        self,
        trial: TrialSpec,
        folder: PhaseFolder,
        report_to_tune: ReportToTune | None,
        inbox: Inbox,
        clock: _Clock,
    ) -> None:
        self.id, self.offset, self.known = trial["id"], trial["offset"], trial["known"]
        self.folder, self.report_to_tune, self.inbox, self.clock = folder, report_to_tune, inbox, clock
        self.steps = 0

    def __call__(self, event: Event) -> None:
        if event["event"] == "training":
            self.clock.turn_to("train")
        elif event["event"] == "step":
            self.steps = event["steps"]
            self.inbox.put(events.trial_step(self.id, event))
        elif event["event"] == "note" and event["kind"] == "training":
            self.inbox.put(events.trial_note(self.id, event["text"]))
        elif event["event"] == "validation":
            self.clock.turn_to("wait")
            self.clock.move(event["seconds"], "train", "score")
            last = event["segment"] == "normal" and event["step"] == self.steps
            self._report(event["segment"], event["step"], event["accuracy"], last)
            self.clock.turn_to("save" if last else "train")

    def report_again(self, finished: bool) -> None:
        """Report the scores of an earlier process that were lost, since the driver died before."""
        rows = read_json_lines(self.folder.validation, keys=("segment", "step", "accuracy"))
        for i, row in enumerate(rows):
            self._report(row["segment"], row["step"], row["accuracy"], finished and i + 1 == len(rows))

    def _report(self, segment: str, step: int, accuracy: float, last: bool) -> None:
        # A phase that begins with a worked example in its prompts has two segments, which count from 0 each.
        before = [
            each["step"]
            for each in read_json_lines(self.folder.metrics, keys=("segment", "step"))
            if each["segment"] == "full"
        ]
        step += self.offset + (max(before, default=0) if segment == "normal" else 0)
        if self.report_to_tune and step > self.known:
            self.report_to_tune({"step": step, "score": float(accuracy), "last": last})
