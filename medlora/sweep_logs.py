"""The trials of a sweep for other tools to show: TensorBoard files always, MLflow where it is wanted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medlora.sweep import SweepConfig
from medlora.sweep_ledger import Ledger, Trial
from medlora.sweep_space import format_value

_SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_s")


class TrialLogs:
    """Hears what happens to trials; writes `tensorboard/<trial>/` below the sweep's folder, losses and dev scores by step.

    Once a trial has ended its values stand beside its last score, for TensorBoard's HParams page.
    """

    def __init__(self, folder: Path, config: SweepConfig) -> None:
        self.folder, self.config = folder / "tensorboard", config
        self.writers: dict[str, Any] = {}
        self.seen: dict[str, int] = {}
        self.lock = threading.Lock()
        self.client: Any = None
        self.mlflow_runs: dict[str, str] = {}
        if config.mlflow:
            from mlflow.tracking import MlflowClient

            self.client = MlflowClient()
            found = self.client.get_experiment_by_name(config.mlflow.experiment)
            self.experiment = found.experiment_id if found else self.client.create_experiment(config.mlflow.experiment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()

    def show(self, event: Mapping[str, Any], ledger: Ledger) -> None:
        """Take one event of a sweep; those of the inbox and those of the search come from two threads."""
        with self.lock:
            if event["event"] == "trial-step":
                scalars = {f"{event['phase']}/{name}": event[name] for name in _SHOWN}
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
        writer = self._open(trial)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
            if self.client:
                self.client.log_metric(self.mlflow_runs[trial.id], name, value, step=step)

    def _open(self, trial: Trial) -> Any:
        if trial.id not in self.writers:
            from tensorboardX import SummaryWriter

            self.writers[trial.id] = SummaryWriter(str(self.folder / trial.id), flush_secs=10)
            if self.client:
                tags = {"mlflow.runName": f"{self.config.name}-{trial.id}"}
                made = self.client.create_run(self.experiment, tags=tags)
                self.mlflow_runs[trial.id] = made.info.run_id
                for key, value in trial.params.items():
                    self.client.log_param(made.info.run_id, key, format_value(value))
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
        if self.client:
            self.client.set_tag(self.mlflow_runs[trial.id], "state", trial.state)
            done = "FINISHED" if trial.state in ("finished", "stopped") else "FAILED"
            self.client.set_terminated(self.mlflow_runs[trial.id], status=done)
