"""One trial of a sweep, as a function that Ray Tune runs in an actor: the phases of its config, scored as they train."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medlora import runs
from medlora.config import RunConfig
from medlora.errors import InputError
from medlora.lineage import extend_chain, find_obstacle, make_job, start_chain

_TOLD = ("goes on from", "out of memory")
"""How notes begin that are about this trial; what is in the data every trial would say again."""
_UNWIND_S = 60
"""How long a stopped trial may take to let go of its files and its model before its process is given up."""


def run_trial(trial: dict[str, Any], common: dict[str, Any]) -> None:
    """Train the trial's phases into its own run folder, from the last whole checkpoint where there is one.

    `trial`: id, config, train (the phases it trains; the last one is judged), links (where the phases before it stand),
    offset (steps of generations before). `common` is what all trials share: folder, scans, dropped, card, inbox, cwd, gpu.
    Every dev score of the judged phase is reported to Tune, which may end the trial there. What the config itself is to
    blame for (a loss that is no number) is reported as the trial's end, so that it is not tried again.
    """
    from ray import tune

    if Path(common["cwd"]).is_dir():
        os.chdir(common["cwd"])
    # Tune gives a function 2 s to end before the actor may serve the next trial; a Trainer's way out may take longer.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_UNWIND_S)
    from medlora.sources import remember

    for packed in common["scans"]:
        remember(packed)
    folder = Path(common["folder"]) / "trials" / trial["id"]
    try:
        row = _train(trial, folder, common, tune.report)
    except (InputError, FloatingPointError) as error:
        cause = error.__cause__
        full = isinstance(cause, OSError | RuntimeError) and runs.is_disk_full(cause, folder)
        tune.report({"ended": "full" if full else "failed", "why": str(error)})
    else:
        tune.report({"ended": "finished", "why": "", **row})


def _train(
    trial: dict[str, Any], folder: Path, common: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    from medlora.phases import run_phase

    config, run = RunConfig.model_validate(trial["config"]), runs.RunFolder(folder)
    _prepare(config, run, trial["links"], common["card"])
    chain = start_chain(config)
    row: dict[str, Any] = {}
    for phase in config.phases:
        there = run.phase(phase.name)
        if phase.name in trial["train"]:
            job = make_job(config, phase, chain, common["dropped"])
            if find_obstacle(job, there):
                runs.set_aside(there.root)
            if runs.read_manifest(there.root) is None:
                judged = phase.name == trial["train"][-1]
                hear = _Hook(trial["id"], there, report if judged else None, common["inbox"], trial["offset"])
                run_phase(job, there, hear, "cuda" if common["gpu"] else "cpu")
            scored = runs.read_json_lines(there.validation)
            row = {"score": float(scored[-1]["accuracy"])} if scored and "accuracy" in scored[-1] else {}
        chain = extend_chain(chain, phase, there.adapter)
    return row


def _prepare(config: RunConfig, run: runs.RunFolder, links: dict[str, str], card: dict[str, Any]) -> None:
    """An ordinary run folder; phases that several trials share are links to where they stand."""
    (run.root / "phases").mkdir(parents=True, exist_ok=True)
    runs.write_yaml(run.config, config.model_dump(mode="json"))
    about = {"name": config.name, "seed": config.seed, "versions": runs.get_versions()}
    runs.write_json(run.about, about)
    runs.write_json(run.data, card)
    for name, target in links.items():
        link = run.phase(name).root
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


class _Hook:
    """Takes what a phase says: its steps go to the driver's display, its dev scores to Tune."""

    def __init__(
        self,
        id: str,
        folder: runs.PhaseFolder,
        report: Callable[[dict[str, Any]], None] | None,
        inbox: Any,
        offset: int,
    ) -> None:
        self.id, self.folder, self.report, self.inbox, self.offset = id, folder, report, inbox, offset
        self.steps = 0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.steps = event["steps"]
        if event["event"] == "step":
            self.inbox.put({**event, "event": "trial-step", "trial": self.id})
        elif event["event"] == "note" and event["text"].startswith(_TOLD):
            self.inbox.put({"event": "trial-note", "trial": self.id, "text": event["text"]})
        if event["event"] == "validation" and self.report:
            # A phase that begins with a worked example in its prompts has two segments, which count from 0 each.
            before = [row["step"] for row in runs.read_json_lines(self.folder.metrics) if row["segment"] == "full"]
            normal = event["segment"] == "normal"
            step = self.offset + event["step"] + (max(before, default=0) if normal else 0)
            last = normal and event["step"] == self.steps
            self.report({"step": step, "score": float(event["accuracy"]), "last": last})
