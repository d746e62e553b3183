"""Where a phase's losses are shown besides its own files: TensorBoard, MLflow, Weights & Biases, by transformers' integrations.

Servers and secrets come from the environment (MLFLOW_TRACKING_URI, WANDB_API_KEY), never from a config.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from medlora.errors import InputError

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
"""By tracker: the packages of which one must be installed."""


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise InputError for a tracker whose package is not installed here."""
    for tracker in report_to:
        if not any(_is_installed(package) for package in PACKAGES[tracker]):
            package = PACKAGES[tracker][0]
            raise InputError(
                f"report_to: {tracker} is not installed here; pip install {package}, or remove it from report_to"
            )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # what is in sys.modules without a spec
        return False


@dataclass(frozen=True)
class Tracking:
    """The trackers of a phase."""

    to: tuple[str, ...] = ()
    run: str = ""
    folder: Path = Path()
    """The run's folder for what trackers write here; apart from the phases, whose files are sealed."""

    def name_run(self, phase: str, segment: str) -> str:
        """How a segment of a phase is named in a tracker."""
        return f"{self.run}-{phase}" + ("" if segment == "normal" else f"-{segment}")

    @contextmanager
    def open(self, name: str) -> Iterator[None]:
        """Tell the trackers by their environment where to write while a segment trains; a variable that is set stays."""
        if not self.to:
            yield
            return
        wanted = {
            "TENSORBOARD_LOGGING_DIR": str(self.folder / "tensorboard" / name),
            "MLFLOW_EXPERIMENT_NAME": "medlora",
            # By default a server that is not there is asked for minutes.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "WANDB_PROJECT": "medlora",
            "WANDB_DIR": str(self.folder),
            "WANDB_SILENT": "true",
        }
        if "wandb" in self.to:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _knows_wandb_key():
                wanted["WANDB_MODE"] = "offline"
        ours = {key: value for key, value in wanted.items() if key not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            if "wandb" in self.to and (wandb := sys.modules.get("wandb")) is not None:
                wandb.finish()  # or the next segment would write into the same run
            for key in ours:
                os.environ.pop(key, None)


def _knows_wandb_key() -> bool:
    """Whether Weights & Biases could log in; without a key it would ask on a terminal that a worker does not have."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in (Path.home() / ".netrc").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
