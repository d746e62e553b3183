"""Trials on Ray Tune: the sampler proposes what to try next, successive halving decides which trials continue.

The ledger alone records what has happened; Tune's own state is never read again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Protocol, TypedDict

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from medlora import endings, events
from medlora.config.placement import Placement
from medlora.errors import InputError
from medlora.events import OnEvent
from medlora.on_ray.cluster import Cluster
from medlora.on_ray.placement import count_gpus
from medlora.on_ray.tune_trial import TrialSpec
from medlora.on_ray.workers.failures import describe_exception, is_death
from medlora.runs.files import remove
from medlora.runs.folders import RunFolder
from medlora.sweep.ledger import START, Ledger, Trial
from medlora.sweep.population import WAIT, Proposal
from medlora.sweep.suggest import Suggester

log = logging.getLogger("medlora.run")


_CONTINUE: str = FIFOScheduler.CONTINUE
_STOP: str = FIFOScheduler.STOP

_ENDLESS = 10**9
"""More steps than a trial has: there are rungs as far as it goes."""


class TuneTrial(Protocol):
    """What is read of a trial of Tune's."""

    config: TrialSpec
    error_file: str | None


class _Result(TypedDict, total=False):
    """What a trial reports: a score, or its end."""

    step: int
    score: float
    last: bool
    ended: Literal["finished", "failed", "refused"]
    why: str
    traceback: str


class Halving:
    """Tune's asynchronous successive halving, by our names of trials, given again the scores that an earlier driver
    received.

    The first trial, the unchanged config, is counted and never stopped.
    """

    def __init__(self, grace_steps: int, reduction: int, known: Sequence[Trial] = ()) -> None:
        self.asha = AsyncHyperBandScheduler(
            time_attr="step",
            metric="score",
            mode="max",
            grace_period=grace_steps,
            reduction_factor=reduction,
            max_t=_ENDLESS,
            stop_last_trials=False,
        )
        self.added: set[str] = set()
        for trial in known:
            for row in trial.reports:
                self.should_stop(trial.id, int(row["step"]), row["score"])

    def should_stop(self, id: str, step: int, score: float) -> bool:
        """Whether the trial ends here."""
        trial = SimpleNamespace(trial_id=id)
        if id not in self.added:
            self.added.add(id)
            self.asha.on_trial_add(None, trial)
        action = self.asha.on_trial_result(None, trial, {"step": step, "score": score})
        return bool(action == _STOP) and id != START


@dataclass
class Search:
    """All that a search on Ray needs; `propose` gives the next trial, None when there are no more.

    `trainable` takes a trial as a dict and reports `step`, `score` and `last`, at its end `ended` and `why`. `describe`
    makes that dict, or raises InputError where the values together make no valid config.
    """

    ledger: Ledger
    suggester: Suggester
    halving: Halving | None
    trials: int
    propose: Callable[[], Proposal | Literal["wait"] | None]
    describe: Callable[[Trial], TrialSpec]
    trainable: Callable[[TrialSpec], None]
    placement: Placement
    concurrency: int
    on_event: OnEvent
    reuse_actors: bool = True
    refusals: list[str] = field(default_factory=list)


def search_on_ray(search: Search, folder: Path, cluster: Cluster) -> None:
    """Run what is left of the search; what happens goes into the ledger and to `on_event`.

    A trial that ran when an earlier driver died resumes from its last checkpoint. Raises InputError for what only the
    user can fix.
    """
    ledger = search.ledger
    for _ in range(search.placement.retries + 1):
        unfinished = ledger.select("running")
        left = len(unfinished) + max(0, search.trials - len(ledger.trials))
        if left:
            _run(search, unfinished, left, folder, cluster)
            endings.check()
        # Tune silently drops a trial whose process does not release the one before: it is begun once more.
        if not ledger.select("running"):
            return
    for trial in ledger.select("running"):
        ledger.end(trial.id, "failed", "no process took it up; see Ray's logs")
        search.suggester.end(trial)


_SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def keep_secrets_out_of_logs() -> None:
    """Stop Tune from copying AWS keys into the runtime environment of trials, which Ray writes into its logs as it is.

    Nodes have their credentials in their own environment, as for phases and evaluations (Ray 2.60: class_cache.py).
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)


def _run(search: Search, unfinished: Sequence[Trial], left: int, folder: Path, cluster: Cluster) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    keep_secrets_out_of_logs()
    gpus = count_gpus(search.placement, cluster)
    bundle = {"CPU": float(search.placement.cpus_per_worker), **({"GPU": gpus} if gpus else {})}
    if search.placement.accelerator_type:
        bundle[f"accelerator_type:{search.placement.accelerator_type}"] = 0.001
    labels = search.placement.label_selector
    resources = tune.PlacementGroupFactory([bundle], **({"bundle_label_selector": [labels]} if labels else {}))
    with _own_files(folder) as temporary:
        tuner = tune.Tuner(
            tune.with_resources(partial(_run_once, search.trainable), resources),
            tune_config=tune.TuneConfig(
                search_alg=_Searcher(search, unfinished),
                scheduler=_StopRule(search),
                num_samples=left,
                max_concurrent_trials=search.concurrency,
                reuse_actors=search.reuse_actors,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(temporary),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=search.placement.retries),
                callbacks=[_Watch(search)],
                stop=_Stopper(search),
                log_to_file=False,
            ),
        )
        tuner.fit()
    if search.refusals:
        raise InputError(search.refusals[0])


def _run_once(trainable: Callable[[TrialSpec], None], trial: TrialSpec) -> None:
    """Run a trial; its own exception, which would come again, is its end and no death that Tune retries."""
    try:
        trainable(trial)
    except Exception as error:
        if is_death(error):
            raise
        found = describe_exception(error)
        text = f"{found['text']} ({found['at']})"
        tune.report({"ended": "failed", "why": text, "traceback": found["traceback"]})


@contextmanager
def _own_files(folder: Path) -> Iterator[Path]:
    """Where Tune writes what nobody reads again."""
    place = RunFolder(folder).ray
    remove(place)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)  # a worker may still be writing


class _Silent:
    """Tune pickles its parts from time to time; of ours nothing is to be saved."""

    def __getstate__(self) -> dict[str, object]:
        return {}


class _Searcher(_Silent, Searcher):  # type: ignore[misc]
    def __init__(self, search: Search, unfinished: Sequence[Trial]) -> None:
        super().__init__()
        self.search, self.suggestions = search, self._suggest_all(unfinished)

    def _suggest_all(self, unfinished: Sequence[Trial]) -> Iterator[tuple[Trial, object, TrialSpec] | None]:
        search = self.search
        for trial in unfinished:
            yield trial, None, search.describe(trial)
        while len(search.ledger.trials) < search.trials and (proposed := search.propose()):
            if proposed == WAIT:
                yield None
                continue
            trial = search.ledger.begin(proposed.params, proposed.about)
            try:
                yield trial, proposed.asked, search.describe(trial)
            except InputError as error:
                search.suggester.begin(trial.id, trial.params, proposed.asked)
                search.ledger.end(trial.id, "invalid", str(error))
                search.suggester.end(trial)
                search.on_event(events.trial_changed(trial.id))

    def suggest(self, trial_id: str) -> TrialSpec | str | None:
        """The next trial as Tune's config."""
        finished: str = Searcher.FINISHED
        found = finished if endings.is_ending() else next(self.suggestions, finished)
        if found is None or isinstance(found, str):
            return found
        trial, asked, described = found
        self.search.suggester.begin(trial.id, trial.params, asked)
        return described

    def on_trial_complete(self, trial_id: str, result: object = None, error: bool = False) -> None:
        """The stop rule knows already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds it."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger holds it."""


class _StopRule(_Silent, FIFOScheduler):  # type: ignore[misc]
    """Writes every score into the ledger, reports it to the sampler, and ends a trial that falls behind."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def on_trial_result(self, tune_controller: object, trial: TuneTrial, result: _Result) -> str:
        """Whether the trial continues."""
        search, id = self.search, trial.config["id"]
        known = search.ledger.trials[id]
        if endings.is_ending():  # its trials leave, with or without a score; they report again when they resume
            return _CONTINUE
        if known.ended:  # Tune repeats the last report of a function that has returned
            return _CONTINUE
        if ended := result.get("ended"):
            if ended == "refused":
                search.refusals.append(result["why"])
                return _CONTINUE
            search.ledger.end(id, ended, result["why"])
            if "traceback" in result:
                log.error("trial %s ends by an exception:\n%s", id, result["traceback"])
        else:
            step, score = int(result["step"]), float(result["score"])
            stop = bool(search.halving and search.halving.should_stop(id, step, score)) and not result["last"]
            if search.ledger.add_score(id, step, score, stop):
                search.suggester.add_score(id, step, score)
        if known.ended:
            search.suggester.end(known)
        search.on_event(events.trial_changed(id))
        return _STOP if known.state == "stopped" else _CONTINUE


class _Watch(tune.Callback):  # type: ignore[misc]
    """Writes into the ledger when a trial's process begins and when it dies."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def __getstate__(self) -> dict[str, object]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """The trial has a process."""
        self.search.ledger.run(trial.config["id"])
        self.search.on_event(events.trial_changed(trial.config["id"]))

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Its process died, and it is tried again."""
        self._note(trial, f"{_explain(trial)}; it resumes from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Its process died for the last time."""
        id = trial.config["id"]
        self._note(trial, f"{_explain(trial)}; it is given up")
        self.search.ledger.end(id, "failed", _explain(trial))
        self.search.suggester.end(self.search.ledger.trials[id])
        self.search.on_event(events.trial_changed(id))

    def _note(self, trial: TuneTrial, text: str) -> None:
        id = trial.config["id"]
        self.search.ledger.die(id)
        log.warning("trial %s: %s", id, text)
        self.search.on_event(events.trial_note(id, text))


class _Stopper(tune.Stopper):  # type: ignore[misc]
    def __init__(self, search: Search) -> None:
        self.search = search

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False

    def stop_all(self) -> bool:
        """What one trial could not do for lack of room on the disk, or of its store, no other can."""
        return bool(self.search.refusals)


def _explain(trial: TuneTrial) -> str:
    """Why a trial's process ended, from the text that Tune saved: its pickle is not opened."""
    # `trial.get_error` reads a copy that is made later; failures are listed one below the other.
    path = Path(trial.error_file) if trial.error_file else None
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    lines = [line.strip() for line in text.rpartition("Failure # ")[2].splitlines() if line.strip()]
    if not lines or any("ActorDiedError" in line or "actor died" in line for line in lines):
        return "its process died"
    return lines[-1][:300]
