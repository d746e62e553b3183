"""The run folder: the path of every file in it, and how a run is opened or resumed.

    runs/<name>/
      config.yaml run.json data.json quarantine.jsonl run.log lock
      phases/<phase>/  adapter/ metrics.jsonl validation.jsonl validation.log phase.log checkpoints/ manifest.json
      scoring/<stage>/ what a stage answered while later phases trained; deleted after the evaluation
      evaluation/      report.json predictions.parquet seconds.parquet manifest.json

A folder without a manifest is always unfinished. The manifest is written last, by temporary file and rename, and holds the
sha256 of every other file but the logs.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from medlora.errors import InputError
from medlora.runs.disk_errors import check_open_files, explaining
from medlora.runs.files import is_temporary
from medlora.runs.manifests import LIVING, MANIFEST, PhaseManifest, check_files, read_manifest

log = logging.getLogger("medlora.run")


_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


_SAFE_PATH = re.compile(r"[\w./~ +,@=:-]+")


@dataclass(frozen=True)
class PhaseFolder:
    """Paths of one phase inside a run."""

    root: Path

    @property
    def adapter(self) -> Path:
        """The finished adapter: an ordinary PEFT folder, with the tokenizer where it was extended."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the unfinished phase; removed when it is finished."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """The adapter of the best validation so far, if the config asks for it; removed when the phase is finished."""
        return self.root / "best"

    @property
    def metrics(self) -> Path:
        """Loss, learning rate, gradient norm, tokens/s: one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """Dev scores: one JSON object a line."""
        return self.root / "validation.jsonl"

    @property
    def log(self) -> Path:
        """The phase's log, as text."""
        return self.root / "phase.log"

    @property
    def validation_log(self) -> Path:
        """The validation's log, as text."""
        return self.root / "validation.log"

    @property
    def logs(self) -> tuple[Path, Path]:
        """What is written for people and never read back: no part of the result, so no manifest vouches for it."""
        return self.log, self.validation_log

    @property
    def fingerprint(self) -> Path:
        """What the phase is made from, written when it begins."""
        return self.root / "fingerprint.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains; next to the folder, so that replacing the folder does not remove it."""
        return self.root.parent / f".{self.root.name}.lock"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

    @property
    def data(self) -> Path:
        """The data card: sources, hashes, counts, what was found in them."""
        return self.root / "data.json"

    @property
    def quarantine(self) -> Path:
        """Rows of the data that make no record, with the reasons: one JSON object a line."""
        return self.root / "quarantine.jsonl"

    @property
    def about(self) -> Path:
        """Versions, git commit, seed; a folder that has it is a medlora run."""
        return self.root / "run.json"

    @property
    def log(self) -> Path:
        """The driver's log, as text."""
        return self.root / "run.log"

    @property
    def lock(self) -> Path:
        """Held by the driver."""
        return self.root / "lock"

    @property
    def ray(self) -> Path:
        """Ray's own files while a phase runs."""
        return self.root / ".ray"

    @property
    def evaluation(self) -> Path:
        """Scores of every stage."""
        return self.root / "evaluation"

    @property
    def scoring(self) -> Path:
        """Answers of stages that were scored while later phases trained, a folder each, until all are scored."""
        return self.root / "scoring"

    def phase(self, name: str) -> PhaseFolder:
        """The folder of that phase."""
        return PhaseFolder(self.root / "phases" / check_name(name, "phase"))


def check_name(name: str, what: str) -> str:
    """The name itself; raises InputError when it could leave its folder or mean something to a shell."""
    if not _SAFE_NAME.fullmatch(name):
        raise InputError(
            f"{what} name {name!r}: use letters, digits, `_` and `-` (at most 64, the first a letter or digit)"
        )
    return name


def open_run(folder: Path, mark: str = "run.json") -> RunFolder:
    """The run at `folder`, made when absent; raises InputError for an unsafe path, or a folder that holds other things.

    `mark` is the file by which a folder is known as ours.
    """
    if not _SAFE_PATH.fullmatch(str(folder)) or ".." in folder.parts:
        raise InputError(
            f"run folder {str(folder)!r}: no `..` and no shell characters; give a plain path with --run-dir"
        )
    run = RunFolder(Path(os.path.abspath(folder.expanduser())))
    with explaining(run.root):
        check_open_files()
        _check_folder(run, mark)
    return run


def _check_folder(run: RunFolder, mark: str) -> None:
    """Make the run's folder where it is absent; raises InputError where it cannot be ours."""
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"{run.root}: is a file; a run needs a folder of its own")
    there = [path.name for path in run.root.iterdir()] if run.root.is_dir() else []
    strangers = [name for name in there if name not in LIVING and not is_temporary(name)]
    if strangers and not (run.root / mark).exists():
        raise InputError(
            f"{run.root}: holds other files ({', '.join(sorted(strangers)[:3])}) and is no medlora run; choose another folder"
        )
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run.root).free
    except OSError as error:
        raise InputError(
            f"{run.root}: cannot be made: {error.strerror}; choose another folder with --run-dir"
        ) from None
    if not os.access(run.root, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(
            f"{run.root}: cannot be written (a read-only mount, or a folder of another user); choose another folder "
            "with --run-dir or --out. What is there is left as it is"
        )
    if free < 64 * 2**20:
        raise InputError(
            f"{run.root}: the disk is full ({free / 2**20:.0f} MiB free, 64 needed to begin); make room or use --run-dir"
        )


def find_home(folder: Path) -> Path:
    """Where a run's folder really goes. A relative one of a submitted job goes into the user's home, since Ray deletes
    the folder that it unpacked the job's working dir in."""
    folder = folder.expanduser()
    if not folder.is_absolute() and "working_dir_files" in Path.cwd().parts:
        return Path.home() / "medlora" / folder
    return folder


def find_finished(folder: PhaseFolder) -> tuple[PhaseManifest | None, str]:
    """The manifest of a finished phase, and what is wrong with it where it can be trained on from a whole checkpoint.

    (None, "") is an unfinished phase. (None, reason) is one that was finished and is torn, with a checkpoint to resume
    from. Raises InputError for a torn phase without any, since only the user can bring it back.
    """
    if not (folder.root / MANIFEST).is_file():
        return None, ""
    manifest = read_manifest(folder.root)
    seconds = manifest.get("seconds") if manifest else None
    if manifest is None or not isinstance(seconds, dict) or not {"all", "base"} <= set(seconds):
        wrong: str | None = f"{MANIFEST} is damaged"
    else:
        wrong = check_files(folder.root, manifest, exclude=folder.logs)  # older manifests name them
    if wrong is None:
        return cast(PhaseManifest, manifest), ""
    for sealed in sorted(folder.checkpoints.glob(f"*/checkpoint-*/{MANIFEST}")):
        found = read_manifest(sealed.parent)
        if found and check_files(sealed.parent, found) is None:
            log.warning("%s: %s since it was finished; it resumes from its checkpoints", folder.root, wrong)
            return None, wrong
    name = folder.root.name
    raise InputError(
        f"{folder.root}: {wrong} since phase {name} was finished; bring it back, or give --redo {name}, which sets it aside"
    )


def describe_progress(run: RunFolder, phases: Sequence[str]) -> str:
    """What of a run's phases is saved, for whoever ended it: those that are finished, and the step of the newest checkpoint."""
    finished = [name for name in phases if read_manifest(run.phase(name).root)]
    text = f"finished: {', '.join(finished)}" if finished else "no phase is finished"
    if len(finished) == len(phases):
        return f"{text}; the same command scores what is not scored yet"
    current = next(name for name in phases if name not in finished)
    saved = [path.parent for path in run.phase(current).checkpoints.glob(f"*/checkpoint-*/{MANIFEST}")]
    if not saved:
        return f"{text}; the same command resumes phase {current}"
    # Of a phase with two segments, `full` ends before `normal` begins.
    newest = max(saved, key=lambda path: (path.parent.name == "normal", int(path.name.rpartition("-")[2])))
    return f"{text}; the same command resumes phase {current} from step {newest.name.rpartition('-')[2]}"
