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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from medlora.checksums import open_line, seal, seal_line, unseal
from medlora.disk_errors import check_open_files, explaining
from medlora.errors import InputError

MANIFEST = "manifest.json"
CARD, CARD_MARK = "README.md", b"medlora: {"
"""The card in an adapter's folder, and what a line of it begins with; it counts in no hash."""
LIVING = ("lock", "lock.json", "run.log", "quarantine.jsonl")
"""Files at the top of a folder that go on changing; no manifest holds them."""
_TEMP = re.compile(r"\..+\.\d+\.tmp")
"""Names of the files that `write_bytes` writes before it renames them: one that is left over is of a killed process."""
_HOLDER_WAIT_S = 5.0
"""How long a refused process looks for the holder's name, which is written a moment after the lock is taken."""
log = logging.getLogger("medlora.run")
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


@contextmanager
def hold(lock: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Hold a lock file; raises InputError naming the holder when another process still has it after `wait_s`.

    The operating system frees the lock when its holder dies, kill -9 included. Errors of the disk inside come out as
    InputError: whoever works in a folder holds its lock.
    """
    with explaining(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        holder = lock.with_name(f"{lock.name}.json")
        file_lock = FileLock(lock)
        try:
            file_lock.acquire(timeout=wait_s)
        except Timeout:
            _wait_for_holder(file_lock, holder, what)
        try:
            for temp in lock.parent.glob(f".{holder.name}.*.tmp"):
                temp.unlink(missing_ok=True)  # of a process that was killed as it took the lock
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            file_lock.release()


def _wait_for_holder(file_lock: FileLock, holder: Path, what: str) -> None:
    """Raise InputError that names who has the lock, or return with the lock where it has become free.

    The name of a holder that took the lock just now is not written yet, and the one before may still stand there.
    """
    end = time.monotonic() + _HOLDER_WAIT_S
    while True:
        about = read_json(holder)
        about = about if isinstance(about, dict) else {}
        if _may_run(about) or time.monotonic() > end:
            who = f"process {about.get('pid', '?')} on {about.get('host', '?')} since {about.get('since', '?')}"
            raise InputError(f"{what} is in use by {who}; wait for it, or give this run another name")
        try:
            file_lock.acquire(timeout=0.05)
            return
        except Timeout:
            continue


def _may_run(about: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names may run still; of another host we cannot see it."""
    pid = about.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    if about.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


class _LogFile(logging.FileHandler):
    """Raises what it cannot write; logging's own handler prints a traceback and goes on with a gap in the log."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        error.filename = error.filename or self.baseFilename
        raise error


@contextmanager
def log_to(*sinks: tuple[logging.Logger, Path]) -> Iterator[None]:
    """Append what each logger says to its file while inside."""
    with ExitStack() as opened:
        for logger, path in sinks:
            handler = _LogFile(path, encoding="utf-8")
            opened.callback(handler.close)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
            opened.callback(logger.removeHandler, handler)
        yield


def find_home(folder: Path) -> Path:
    """Where a run's folder really goes: a relative one of a submitted job goes into the user's home, since Ray deletes
    the folder that it unpacked the job's working dir in."""
    folder = folder.expanduser()
    if not folder.is_absolute() and "working_dir_files" in Path.cwd().parts:
        return Path.home() / "medlora" / folder
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also when the power fails: temp file, fsync, rename, fsync of the folder."""
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
    sync_folder(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `write_bytes` had not renamed yet."""
    return bool(_TEMP.fullmatch(name))


def sweep_temporary(folder: Path, deep: bool = True) -> None:
    """Remove the temp files of killed processes in a folder, and below it if `deep`; the caller holds the folder's lock."""
    for path in folder.rglob(".*.tmp") if deep else folder.glob(".*.tmp"):
        if is_temporary(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a file system that cannot sync folders is left to its own ways."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sync_files(*paths: Path) -> None:
    """Make files that we wrote durable: each path a file, or a folder with all files below it; absent ones are skipped."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    for file in files:
        # Some systems sync only through a descriptor that may write.
        with file.open("r+b" if os.access(file, os.W_OK) else "rb") as opened:
            os.fsync(opened.fileno())
    for parent in sorted({file.parent for file in files}):
        sync_folder(parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON with a checksum, the key `crc`, which `read_json` checks and takes out again."""
    write_json(path, seal(content))


def write_yaml(path: Path, content: Any) -> None:
    """Write YAML whole or not at all."""
    write_bytes(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def read_json(path: Path) -> Any:
    """The JSON at `path`, or None when it is absent, torn, or not what was written (its checksum says so)."""
    try:
        return unseal(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """As `read_json`, of a file that holds a mapping; raises InputError for valid JSON that is something else."""
    found = read_json(path)
    if found is None or isinstance(found, dict):
        return found
    raise InputError(
        f"{path}: must hold a mapping, found {type(found).__name__}; bring the file back as it was, or remove it"
    )


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON with its checksum."""
    with path.open("a", encoding="utf-8") as file:
        file.write(seal_line(row) + "\n")


def read_json_lines(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; none when it is absent. A torn last line is left out.

    A damaged line is named in the log and left out, and so is one that lacks any of `keys`.
    """
    return [row for _, row in _read_lines(path, keys)]


def _read_lines(path: Path, keys: Sequence[str] = ()) -> list[tuple[bytes, dict[str, Any]]]:
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        row = open_line(line)
        if row is None or not set(keys) <= set(row):
            log.warning("%s:%d: this line is damaged and left out; what it held is done again", path, number)
        else:
            lines.append((line, row))
    return lines


def truncate_json_lines(path: Path, keep: Any, keys: Sequence[str] = ()) -> None:
    """Keep the rows for which `keep(row)` holds; what comes after a resumed step is written again."""
    if path.exists():
        lines = [line for line, row in _read_lines(path, keys) if keep(row)]
        write_bytes(path, b"".join(line + b"\n" for line in lines))


def cut_json_lines(path: Path, take: Callable[[dict[str, Any]], bool]) -> str:
    """Hand every row of a JSON-lines file to `take`, and cut the file before the first that is damaged or not taken.

    For a file whose lines build on each other. The file as it was is set aside; returns what was found, or an empty text.
    """
    if not path.exists():
        return ""
    content = path.read_bytes()
    whole, wrong = 0, ""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        row = open_line(line)
        if row is None or not take(row):
            wrong = f"{path}:{number}: this line is damaged; what it and the lines after it held is done again"
            break
        whole += len(line) + 1
    if wrong:
        aside = _name_aside(path)
        write_bytes(aside, content)
        wrong += f" (the file as it was: {aside})"
        log.warning("%s", wrong)
    if whole < len(content):
        write_bytes(path, content[:whole])
    return wrong


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any) -> str:
    """sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_files(folder: Path, passing: Sequence[Path] = ()) -> dict[str, str]:
    """sha256 of every file below `folder` by relative path, but of its manifest, cards, and what is in folders `passing`."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in _list_files(folder, passing)}


def _list_files(folder: Path, passing: Sequence[Path] = ()) -> list[Path]:
    ours = {folder / name for name in (MANIFEST, *LIVING)}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)
    files = [path for path in files if not is_temporary(path.name) and not _is_card(path)]
    return [path for path in files if not any(path.is_relative_to(other) for other in passing)]


def _is_card(path: Path) -> bool:
    """Whether a file is a card of ours; one of another tool is a file like any other."""
    if path.name != CARD:
        return False
    with path.open("rb") as file:
        return any(line.startswith(CARD_MARK) for line in file.read(2**20).splitlines()[:20])


def hash_adapter(folder: Path) -> str:
    """What an adapter is known by."""
    return hash_json(hash_files(folder))


def commit(folder: Path, about: Mapping[str, Any], passing: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the manifest of a finished folder: `about` and the hashes of its files, but for folders `passing` away.

    The files and their folders are durable before the manifest that names them, and the manifest when this returns.
    """
    sweep_temporary(folder)
    files = _list_files(folder, passing)
    sync_files(*files)
    sync_folder(folder.parent)
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    manifest = {**about, "files": hashes, "finished": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    write_sealed(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None when the folder is unfinished or its manifest is damaged."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    whole = all(isinstance(digest, str) for digest in manifest["files"].values())
    return manifest if whole and isinstance(manifest.get("fingerprint", {}), dict) else None


def check_files(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a finished folder (a file missing or changed), or None when all hashes match."""
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if hash_file(path) != digest:
            return f"{name} has changed"
    return None


def find_finished(folder: PhaseFolder) -> tuple[dict[str, Any] | None, str]:
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
        wrong = check_files(folder.root, manifest)
    if wrong is None:
        return manifest, ""
    for sealed in sorted(folder.checkpoints.glob(f"*/checkpoint-*/{MANIFEST}")):
        found = read_manifest(sealed.parent)
        if found and check_files(sealed.parent, found) is None:
            log.warning("%s: %s since it was finished; it resumes from its checkpoints", folder.root, wrong)
            return None, wrong
    name = folder.root.name
    raise InputError(
        f"{folder.root}: {wrong} since phase {name} was finished; bring it back, or say --redo {name}, which sets it aside"
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
    return folder.rename(_name_aside(folder)) if folder.exists() else None


def _name_aside(path: Path) -> Path:
    """A free name in `.replaced` beside a file or folder."""
    target = path.parent / ".replaced"
    target.mkdir(exist_ok=True)
    n = 1
    while (target / f"{path.name}-{n}").exists():
        n += 1
    return target / f"{path.name}-{n}"


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
