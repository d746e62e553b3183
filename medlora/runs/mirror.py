"""Runs in an object store: a local working copy, mirrored to `s3://` or `gs://` as it grows.

All code works on plain folders. A folder whose path names a URI is the working copy of that URI. `pull` downloads what the
store holds and `push` uploads what the folder holds; for any other folder both do nothing. Manifests are pushed last, so a
folder without a manifest is unfinished in the store, too.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from medlora.config.placement import find_cache_folder
from medlora.errors import InputError
from medlora.runs.files import read_json, write_bytes, write_with_checksum
from medlora.runs.folders import find_home
from medlora.runs.locks import LOCK, adopt_lock, check_lock, hold_store_lock
from medlora.runs.manifests import LIVING, MANIFEST
from medlora.runs.object_store import Objects, Sign, is_store

_COPIES = "working-copies"


_URI = re.compile(r"(s3|gs)://[A-Za-z0-9][\w.-]*(/[\w.=+@~-]+)*/?")


_NONCE = ".nonce"


_MARKS = ("run.json", "fingerprint.json")
_RANKS = (0, 1, 2, 3)


SEEN_WAIT_S = 30.0
"""How long a mount may take to show one node what another wrote: NFS caches for so long that a file does not exist."""


def find_copy(where: str, cache: str | None, purpose: str = "runs") -> Path:
    """The folder to work in: the working copy of a URI, below the cache, or the folder that `where` names.

    Each purpose has its own copy of a URI. Raises InputError for a URI that is no plain path.
    """
    if not is_store(where):
        return find_home(Path(where))
    if not _URI.fullmatch(where) or ".." in where.split("/"):
        raise InputError(
            f"{where}: write s3://bucket/folder or gs://bucket/folder, letters, digits and ._=+@~- alone; endpoint and "
            "credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)"
        )
    scheme, _, path = where.partition("://")
    parent, _, name = path.strip("/").rpartition("/")
    if not parent:
        raise InputError(f"{where}: a run needs a folder of its own in the bucket, e.g. {where.rstrip('/')}/runs/first")
    home = find_cache_folder(cache)
    return home / _COPIES / purpose / scheme / parent.replace("/", ",") / name


def find_uri(folder: Path) -> str | None:
    """The URI that a folder is (part of) a working copy of; None for any other folder."""
    if _COPIES not in folder.parts:
        return None
    root = _find_root(folder)
    *_, scheme, parent, name = root.parts
    return "/".join([f"{scheme}://{parent.replace(',', '/')}", name, *folder.relative_to(root).parts])


def _find_root(folder: Path) -> Path:
    return Path(*folder.parts[: folder.parts.index(_COPIES) + 5])


def name_place(folder: Path) -> str:
    """What a user knows a folder by: its URI, or its path."""
    return find_uri(folder) or str(folder)


def join(folder: str, name: str) -> str:
    """A name below a folder, which may be a URI."""
    return f"{folder.rstrip('/')}/{name}"


@contextmanager
def hold_run(folder: Path, mark: str = "run.json") -> Iterator[None]:
    """Lock a working copy's run in the store, pull it, and push it at the end; do nothing for any other folder.

    `mark` is the file that identifies a run of medlora. Raises InputError when another process holds the lock, or when the
    place holds files but no `mark`.
    """
    copy = _Copy.of(folder)
    if copy is None:
        yield
        return
    there = copy.objects.list()
    if strangers := [] if mark in there else sorted(set(there) - {LOCK, *LIVING}):
        shown = ", ".join(strangers[:3])
        raise InputError(
            f"{copy.objects.uri}: holds other files ({shown}) and is no medlora run; choose another folder"
        )
    with hold_store_lock(copy.objects):
        pull(folder, exclude=("checkpoints", "best"))
        yield
        push(folder)


def pull(folder: Path, exclude: Sequence[str] = ()) -> None:
    """Download what changed in the store into a working copy, or into one folder in it, except folders named in `exclude`.

    Files that the store no longer holds are deleted here. Raises InputError when the store cannot be read.
    """
    copy = _Copy.of(folder)
    if copy is None:
        return
    adopt_lock(copy.objects)
    below = "/".join(folder.relative_to(copy.root).parts)
    with copy.indexed() as index:
        listed = copy.objects.list(below)
        there = {name: sign for name, sign in listed.items() if _belongs(name) and not _is_excluded(name, exclude)}
        wanted = [name for name, sign in there.items() if index.get(name) != [*copy.sign(name), *sign]]
        _do_each(wanted, lambda name: copy.objects.fetch(name, copy.root / name))
        index.update({name: [*copy.sign(name), *there[name]] for name in wanted})
        for name in copy.list(folder) - set(there):
            if not _is_excluded(name, exclude):
                (copy.root / name).unlink()
                index.pop(name, None)


def push(folder: Path, exclude: Sequence[str] = ()) -> None:
    """Upload changed files of a working copy, or of one folder in it, to the store, except folders named in `exclude`.

    Fingerprints are uploaded first, manifests last. Files deleted here are then deleted in the store, manifests first. Raises
    InputError when the store cannot be written, or when another process has taken the run's lock. Folders that were complete
    in the store are still complete then.
    """
    copy = _Copy.of(folder)
    if copy is None:
        return
    check_lock(copy.objects)
    with copy.indexed() as index:
        here = {name for name in copy.list(folder) if not _is_excluded(name, exclude)}
        known = [name for name in index if not _is_excluded(name, exclude)]
        gone = sorted(name for name in known if name not in here and (copy.root / name).is_relative_to(folder))
        for rank in _RANKS:
            ranked = [name for name in sorted(here) if _rank(name) == rank]
            changed = [name for name in ranked if (index.get(name) or [])[:2] != copy.sign(name)]
            signs = {name: copy.sign(name) for name in changed}
            _do_each(changed, lambda name: copy.objects.send(name, copy.root / name))
            index.update({name: [*signs[name], *copy.objects.sign(name)] for name in changed})
        for rank in reversed(_RANKS):
            _do_each([name for name in gone if _rank(name) == rank], copy.objects.remove)
        for name in gone:
            del index[name]


class Pusher:
    """Pushes a folder every few seconds; what a driver loses since the last push is asked or reported again."""

    def __init__(self, folder: Path, exclude: Sequence[str] = (), every_s: float = 10.0) -> None:
        self.folder, self.exclude, self.every_s = folder, exclude, every_s
        self.pushed_at = time.monotonic()
        self.lock = threading.Lock()

    def push(self) -> None:
        """Push if the last push is long enough ago; raises InputError as `push` does."""
        with self.lock:
            if time.monotonic() - self.pushed_at > self.every_s:
                push(self.folder, self.exclude)
                self.pushed_at = time.monotonic()


def leave_nonce(folder: Path) -> str:
    """Write a nonce into a run's folder, for workers to find; returns it."""
    nonce = secrets.token_hex(16)
    if copy := _Copy.of(folder):
        copy.objects.write(_NONCE, nonce.encode())
    else:
        write_bytes(folder / _NONCE, nonce.encode())
    return nonce


def check_seen(folder: Path, nonce: str) -> None:
    """Raise InputError unless this machine sees the nonce that `leave_nonce` wrote into a run's folder."""
    copy = _Copy.of(folder)
    end = time.monotonic() + (0 if copy else SEEN_WAIT_S)
    while True:
        path = folder / _NONCE
        found = copy.objects.read(_NONCE) if copy else path.read_bytes() if path.is_file() else None
        if found == nonce.encode():
            return
        if time.monotonic() >= end:
            break
        time.sleep(1)
    raise InputError(
        f"{name_place(folder)}: the worker on {socket.gethostname()} does not see there what the driver wrote: it has another "
        "folder of that name, or none; storage.folder must be a mount that every node sees, or s3:// or gs://"
    )


@dataclass(frozen=True)
class _Copy:
    """A run's working copy, and its objects in the store by the same names, relative to `root`."""

    root: Path
    objects: Objects

    @classmethod
    def of(cls, folder: Path) -> _Copy | None:
        """The copy that a folder is part of; None for any other folder."""
        if _COPIES not in folder.parts:
            return None
        root = _find_root(folder)
        return cls(root, Objects.open(str(find_uri(root))))

    @contextmanager
    def indexed(self) -> Iterator[dict[str, Sign]]:
        """The signs here and in the store of every file that is the same in both; one process at a time."""
        path = self.root.with_name(f".{self.root.name}.index.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = read_json(path)
            index = found if isinstance(found, dict) else {}
            try:
                yield index
            finally:
                write_with_checksum(path, index)

    def list(self, folder: Path) -> set[str]:
        """The names of the files below a folder that belong to the run."""
        found = {path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in found if _belongs(name)}

    def sign(self, name: str) -> Sign:
        """Size and time of a file here."""
        path = self.root / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [0, 0]


def _belongs(name: str) -> bool:
    """Whether a file is the run's, rather than of this machine and this moment: a lock, a temporary file, Ray's own."""
    *folders, last = name.split("/")
    temporary = ".lock" in last or last.endswith(".tmp") or last in ("lock", _NONCE) or last.startswith(LOCK)
    return not temporary and ".ray" not in folders


def _rank(name: str) -> int:
    """When a file is pushed; it is removed in the opposite order.

    What identifies the run comes first, then what identifies a phase in it, so that an interrupted push leaves folders
    that medlora recognises; manifests come last.
    """
    folder, _, last = name.rpartition("/")
    if last in _MARKS:
        return 1 if folder else 0
    return 3 if last == MANIFEST else 2


def _is_excluded(name: str, exclude: Sequence[str]) -> bool:
    return bool(set(name.split("/")[:-1]) & set(exclude))


def _do_each(names: Sequence[str], act: Callable[[str], None]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, names))
