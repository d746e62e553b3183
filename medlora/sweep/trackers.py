"""The trials of a sweep for other tools to show: TensorBoard files always, MLflow where it is wanted."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from medlora.config.sweep import SweepConfig
from medlora.errors import InputError
from medlora.events import Event
from medlora.runs import mirror
from medlora.sweep.ledger import Ledger, Trial
from medlora.sweep.space import format_value

log = logging.getLogger("medlora.run")


_SHOWN: tuple[Literal["loss", "learning_rate", "grad_norm", "tokens_per_s"], ...] = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
)


class TrialLogs:
    """Receives what happens to trials; writes `tensorboard/<trial>/` below the sweep's folder, losses and dev scores by
    step.

    Once a trial has ended its values are shown beside its last score, for TensorBoard's HParams page. Raises InputError
    where MLflow is wanted and its server does not answer.
    """

    def __init__(self, folder: Path, config: SweepConfig) -> None:
        self.folder = folder / "tensorboard"
        self.writers: dict[str, Any] = {}
        self.seen: dict[str, int] = {}
        self.lock = threading.Lock()
        self.failures: list[OSError] = []
        self.mlflow = _Mlflow(config.mlflow.experiment, config.name, folder) if config.mlflow else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()

    def show(self, event: Event, ledger: Ledger) -> None:
        """Take one event of a sweep; those of the inbox and those of the search come from two threads."""
        with self.lock:
            if event["event"] == "trial-step":
                scalars = {f"{event['phase']}/{name}": event[name] for name in _SHOWN if event[name] is not None}
                self._add(ledger.trials[event["trial"]], scalars, event["step"])
            elif event["event"] == "trial":
                trial = ledger.trials[event["trial"]]
                new = trial.reports[self.seen.get(trial.id, 0) :]
                self.seen[trial.id] = len(trial.reports)
                for row in new:
                    self._add(trial, {"dev/score": row["score"]}, int(row["step"]))
                if trial.ended:
                    self._end(trial)

    def _add(self, trial: Trial, scalars: Mapping[str, float], step: int) -> None:
        if self.failures:
            raise self.failures[0]
        writer = self._open(trial)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if self.mlflow:
            self.mlflow.add(trial, scalars, step)

    def _open(self, trial: Trial) -> Any:
        if trial.id not in self.writers:
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(self.folder / trial.id), flush_secs=10)
            worker = writer.file_writer.event_writer._worker
            worker._record_writer = _EventFile(worker._record_writer, self.failures)
            self.writers[trial.id] = writer
        return self.writers[trial.id]

    def _end(self, trial: Trial) -> None:
        writer = self._open(trial)
        if trial.score is not None:
            from tensorboardX.summary import hparams

            plain = {
                key: value if isinstance(value, bool | int | float | str) else format_value(value)
                for key, value in trial.params.items()
            }
            for summary in hparams(plain, {"dev/score": trial.score}):
                writer.file_writer.add_summary(summary)
        writer.close()
        if self.mlflow:
            self.mlflow.end(trial)


class _EventFile:
    """TensorBoard's file, written in a thread of its own. That thread would die of a full disk with a traceback, and
    the sweep would then wait for ever for room in its queue."""

    def __init__(self, events: Any, failures: list[OSError]) -> None:
        self.events, self.failures = events, failures

    def write_event(self, event: object) -> None:
        """Write one event, unless an earlier one could not be written."""
        self._try(lambda: self.events.write_event(event))

    def flush(self) -> None:
        """Write what is pending."""
        self._try(self.events.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if not self.failures:
            try:
                act()
            except OSError as error:  # raised in the sweep's own thread, by TrialLogs
                self.failures.append(error)


class _Mlflow:
    """Trials as runs of an MLflow experiment: a resumed sweep finds its earlier runs.

    The server is named by MLFLOW_TRACKING_URI. Where it stops answering, that is logged and the sweep continues without
    it.
    """

    def __init__(self, experiment: str, sweep: str, folder: Path) -> None:
        # By default a server that is not there is asked for minutes, and each trial's end prints two lines of URLs.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.failure, self.sweep, self.place = MlflowException, sweep, mirror.name_place(folder)
        self.runs: dict[str, str] = {}
        self.lost = False
        try:
            self.client = MlflowClient()
            found = self.client.get_experiment_by_name(experiment)
            self.experiment = found.experiment_id if found else self.client.create_experiment(experiment)
        except MlflowException as error:
            raise InputError(
                f"mlflow: the server does not answer as it should: {_shorten(error)}\nMLFLOW_TRACKING_URI in the environment names "
                "it; fix it, or remove the key"
            ) from error

    def add(self, trial: Trial, scalars: Mapping[str, float], step: int) -> None:
        """Log values of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
        self._try(trial, lambda run: self.client.log_batch(run, metrics=metrics))

    def end(self, trial: Trial) -> None:
        """Record how the trial ended."""
        status = "FINISHED" if trial.state in ("finished", "stopped") else "FAILED"

        def act(run: str) -> None:
            self.client.set_tag(run, "medlora.state", trial.state)
            self.client.set_terminated(run, status=status)

        self._try(trial, act)

    def _try(self, trial: Trial, act: Callable[[str], object]) -> None:
        if self.lost:
            return
        try:
            act(self._find(trial))
        except self.failure as error:
            self.lost = True
            log.warning("MLflow does not answer any more, trials are logged to TensorBoard alone: %s", _shorten(error))

    def _find(self, trial: Trial) -> str:
        """The id of the trial's run, made where there is none."""
        if trial.id not in self.runs:
            tags = {"medlora.sweep": self.place, "medlora.trial": trial.id}
            wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
            there = self.client.search_runs([self.experiment], wanted, max_results=1)
            if not there:
                tags["mlflow.runName"] = f"{self.sweep}-{trial.id}"
                there = [self.client.create_run(self.experiment, tags=tags)]
                for key, value in trial.params.items():
                    self.client.log_param(there[0].info.run_id, re.sub(r"[^\w./ -]", "_", key), format_value(value))
            self.runs[trial.id] = there[0].info.run_id
        return self.runs[trial.id]


def _shorten(error: Exception) -> str:
    """The first line of what went wrong, without the password that a server's address may hold."""
    return re.sub(r"//[^@/\s]*@", "//", str(error).partition("\n")[0])[:300]
