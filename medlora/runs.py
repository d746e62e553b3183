"""The run folder: where everything stands, manifests written last, fingerprints, locks, lineage.

    runs/<name>/
      config.yaml run.json data.json quarantine.jsonl run.log lock
      phases/<phase>/  adapter/ metrics.jsonl validation.jsonl validation.log phase.log checkpoints/ manifest.json
      scoring/<stage>/ what a stage answered while later phases trained; goes when the evaluation is there
      evaluation/      report.json predictions.parquet seconds.parquet manifest.json

A folder without a manifest is unfinished, always: the manifest is written last, by temp file and rename, and holds the
sha256 of every other file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from medlora.errors import InputError

MANIFEST = "manifest.json"
LIVING = ("lock", "lock.json", "run.log", "quarantine.jsonl")
"""Files at the top of a folder that go on changing; no manifest holds them."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SAFE_PATH = re.compile(r"[\w./~ +,@=:-]+")
_VERSIONED = ("medlora", "ray", "torch", "transformers", "peft", "bitsandbytes", "datasets", "pyarrow", "accelerate")


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
        """The adapter of the best validation so far, where the config keeps it; removed when the phase is finished."""
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
    def fingerprint(self) -> Path:
        """What the phase is made from, written when it begins."""
        return self.root / "fingerprint.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains; beside the folder, so that replacing the folder keeps it."""
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
        """Versions, git commit, seed; its presence says that the folder is a medlora run."""
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
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"{run.root}: is a file; a run needs a folder of its own")
    strangers = [p.name for p in run.root.iterdir() if p.name not in LIVING] if run.root.is_dir() else []
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
    if free < 64 * 2**20:
        raise InputError(
            f"{run.root}: the disk is full ({free / 2**20:.0f} MiB free, 64 needed to begin); make room or use --run-dir"
        )
    return run


@contextmanager
def hold(lock: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Hold a lock file; raises InputError naming the holder when another process still has it after `wait_s`.

    The operating system frees the lock when its holder dies, kill -9 included.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_name(f"{lock.name}.json")
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=wait_s)
    except Timeout:
        about = read_json(holder) or {}
        who = f"process {about.get('pid', '?')} on {about.get('host', '?')} since {about.get('since', '?')}"
        raise InputError(f"{what} is in use by {who}; wait for it, or give this run another name") from None
    try:
        write_json(
            holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        yield
    finally:
        file_lock.release()


@contextmanager
def log_to(*sinks: tuple[logging.Logger, Path]) -> Iterator[None]:
    """Append what each logger says to its file while inside."""
    opened = []
    for logger, path in sinks:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        opened.append((logger, handler))
    try:
        yield
    finally:
        for logger, handler in opened:
            logger.removeHandler(handler)
            handler.close()


def find_home(folder: Path) -> Path:
    """Where a run's folder really goes: a relative one of a submitted job goes into the user's home, since Ray deletes
    the folder that it unpacked the job's working dir in."""
    folder = folder.expanduser()
    if not folder.is_absolute() and "working_dir_files" in Path.cwd().parts:
        return Path.home() / "medlora" / folder
    return folder


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether an error comes from a full disk below `folder`; torch.save says `iostream error` or `unexpected pos`."""
    return getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(folder).free < 2**20


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temp file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def write_yaml(path: Path, content: Any) -> None:
    """Write YAML whole or not at all."""
    write_bytes(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def read_json(path: Path) -> Any:
    """The JSON at `path`, or None when it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; none when it is absent. A torn last line is left out."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def truncate_json_lines(path: Path, keep: Any) -> None:
    """Keep the rows for which `keep(row)` holds; what comes after a resumed step is written again."""
    if path.exists():
        rows = [row for row in read_json_lines(path) if keep(row)]
        write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any) -> str:
    """sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_files(folder: Path, passing: Sequence[Path] = ()) -> dict[str, str]:
    """sha256 of every file below `folder` by relative path, but of its manifest and what stands in folders `passing`."""
    ours = {folder / name for name in (MANIFEST, *LIVING)}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)
    kept = [path for path in files if not any(path.is_relative_to(other) for other in passing)]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in kept}


def commit(folder: Path, about: Mapping[str, Any], passing: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the manifest of a finished folder: `about` and the hashes of its files, but for folders `passing` away."""
    manifest = {**about, "files": hash_files(folder, passing), "finished": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None when the folder is unfinished."""
    manifest = read_json(folder / MANIFEST)
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def check_files(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a finished folder (a file missing or changed), or None when all hashes match."""
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if hash_file(path) != digest:
            return f"{name} has changed"
    return None


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


def as_json(content: Any) -> Any:
    """Plain values as they come back from a JSON file: tuples as lists, keys as text."""
    return json.loads(json.dumps(content))


def find_differences(was: Any, now: Any, at: str = "") -> list[str]:
    """Every dotted key in which two fingerprints differ, as `key: was X, now Y`."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*was, *now]))
        return [
            line for key in keys for line in find_differences(was.get(key), now.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(was, Sequence) and isinstance(now, Sequence) and not isinstance(was, str) and len(was) == len(now):
        return [
            line for i, (a, b) in enumerate(zip(was, now, strict=True)) for line in find_differences(a, b, f"{at}.{i}")
        ]
    return [] if was == now else [f"{at}: was {_shorten(was)}, now {_shorten(now)}"]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def remove(*folders: Path) -> None:
    """Delete folders of ours that are no longer needed, present or not."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def set_aside(folder: Path) -> Path | None:
    """Move a folder out of the way, to `.replaced/<name>-<n>` beside it, so that nothing is lost; None if absent."""
    if not folder.exists():
        return None
    target = folder.parent / ".replaced"
    target.mkdir(exist_ok=True)
    n = 1
    while (target / f"{folder.name}-{n}").exists():
        n += 1
    return folder.rename(target / f"{folder.name}-{n}")


def get_versions() -> dict[str, str]:
    """Versions of Python and of what medlora stands on, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def get_git_commit() -> str | None:
    """The commit of the working folder with `+changes` when dirty; None outside a checkout or without git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
