"""Atomic writes, JSON, YAML and JSON lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medlora.errors import InputError
from medlora.runs.checksums import add_checksum, make_line, open_line, remove_checksum

log = logging.getLogger("medlora.run")


_TEMP = re.compile(r"\..+\.\d+\.tmp")
"""Names of the files that `write_bytes` writes before it renames them: one that is left over is of a killed process."""


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
        # Some systems sync only through a descriptor that may write, and ckpt-chaos counts no other as synced.
        with file.open("r+b" if os.access(file, os.W_OK) else "rb") as opened:
            os.fsync(opened.fileno())
    for parent in sorted({file.parent for file in files}):
        sync_folder(parent)


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def write_with_checksum(path: Path, content: Mapping[str, object]) -> None:
    """Write a mapping as JSON with a checksum, the key `crc`, which `read_json` checks and takes out again."""
    write_json(path, add_checksum(content))


def write_yaml(path: Path, content: object) -> None:
    """Write YAML whole or not at all."""
    write_bytes(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def read_json(path: Path) -> Any:
    """The JSON at `path`, or None when it is absent, torn, or does not match its checksum."""
    try:
        return remove_checksum(json.loads(path.read_text(encoding="utf-8")))
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


def append_json(path: Path, row: Mapping[str, object]) -> None:
    """Add one line of JSON with its checksum."""
    with path.open("a", encoding="utf-8") as file:
        file.write(make_line(row) + "\n")


def read_json_lines(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; none when it is absent. A torn last line is left out.

    A damaged line is named in the log and left out, and so is one that lacks any of `keys`.
    """
    return [row for _, row in _read_lines(path, keys)]


def _read_lines(path: Path, keys: Sequence[str] = ()) -> list[tuple[bytes, dict[str, object]]]:
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


def cut_json_lines(path: Path, take: Callable[[dict[str, object]], bool]) -> str:
    """Hand every row of a JSON-lines file to `take`, and cut the file before the first that is damaged or not taken.

    For a file whose lines build on each other. The old file is moved to a new name; returns what was found, or an empty
    text.
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


def remove(*folders: Path) -> None:
    """Delete folders of ours that are no longer needed, present or not."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def set_aside(folder: Path) -> Path | None:
    """Move a folder to `.replaced/<name>-<n>` next to it, so that nothing is lost; None if there is no folder."""
    return folder.rename(_name_aside(folder)) if folder.exists() else None


def _name_aside(path: Path) -> Path:
    """A free name in `.replaced`, next to a file or folder."""
    target = path.parent / ".replaced"
    target.mkdir(exist_ok=True)
    n = 1
    while (target / f"{path.name}-{n}").exists():
        n += 1
    return target / f"{path.name}-{n}"
