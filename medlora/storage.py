"""Runs in an object store: a working copy here, mirrored to `s3://` or `gs://` as it grows.

Everything works on plain folders. Where one is the working copy of a URI - its path says of which - `pull` makes it what
the store holds and `push` the store what it is; for any other folder both do nothing. Manifests are pushed last, so that a
folder without one is unfinished in the store as it is here. What a store cannot do in one step, the lock says of itself.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from filelock import FileLock

from medlora import runs
from medlora.errors import InputError

log = logging.getLogger("medlora.run")
Result = TypeVar("Result")

STORES = ("s3://", "gs://")
_COPIES = "working-copies"
_URI = re.compile(r"(s3|gs)://[A-Za-z0-9][\w.-]*(/[\w.=+@~-]+)*/?")
_TRANSIENT = re.compile(
    r"SLOW_?DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_ERROR|THROTTL|REQUEST_TIMEOUT|TIMED? ?OUT|curlCode"
    r"|NETWORK_CONNECTION|HTTP (response code|status) 5\d\d|UNAVAILABLE|reset by peer|broken pipe",
    re.I,
)
_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Between five tries, each of which the store's client has tried three times itself."""
_LOCK, _NONCE = "lock.json", ".nonce"
BEAT_S, EXPIRY_S, SETTLE_S = 10.0, 45.0, 1.0
"""A lock is renewed every BEAT_S; it falls to who asks once EXPIRY_S old; whoever takes it waits SETTLE_S and looks again."""
_TOKENS: dict[Path, str] = {}
"""What this process saw in the lock of each copy when it pulled; a push under another lock is refused."""


def is_store(where: str | Path) -> bool:
    """Whether a place is in an object store."""
    return str(where).startswith(STORES)


def open_store(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI and the path in it; raises what pyarrow raises.

    Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """
    from pyarrow import fs

    store, path = fs.FileSystem.from_uri(uri)
    return store, path


def _open(uri: str) -> tuple[Any, str]:
    from pyarrow import fs

    store, path = open_store(uri)
    if isinstance(store, fs.S3FileSystem):
        # Arrow's own strategy goes on for most of a minute without a word; _try says what it waits for.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        retry = fs.AwsStandardS3RetryStrategy(max_attempts=3)
        store = fs.S3FileSystem(region=store.region, endpoint_override=endpoint, retry_strategy=retry)
    return store, path


def find_copy(where: str, cache: str | None, purpose: str = "runs") -> Path:
    """The folder to work in: the working copy of a URI, below the cache, or the folder that `where` names itself.

    Copies of one URI for different purposes are apart. Raises InputError for a URI that is no plain path.
    """
    if not is_store(where):
        return runs.find_home(Path(where))
    if not _URI.fullmatch(where) or ".." in where.split("/"):
        raise InputError(
            f"{where}: write s3://bucket/folder or gs://bucket/folder, letters, digits and ._=+@~- alone; endpoint and "
            "credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)"
        )
    scheme, _, path = where.partition("://")
    if "/" not in path.strip("/"):
        raise InputError(f"{where}: a run needs a folder of its own in the bucket, e.g. {where.rstrip('/')}/runs/first")
    home = Path(cache or "~/.cache/medlora").expanduser().absolute()
    parent, _, name = path.strip("/").rpartition("/")
    return home / _COPIES / purpose / scheme / parent.replace("/", ",") / name


def check_seen(folder: Path, nonce: str) -> None:
    """Raise InputError unless the nonce that `leave_nonce` left in a run's folder is seen from here."""
    copy = _Copy.of(folder)
    if copy is not None:
        found = copy.read_bytes(_NONCE)
    else:
        found = (folder / _NONCE).read_bytes() if (folder / _NONCE).is_file() else None
    if found != nonce.encode():
        raise InputError(
            f"{name_place(folder)}: the worker on {socket.gethostname()} does not see there what the driver wrote: it has "
            "another folder of that name, or none; storage.folder must be a mount that every node sees, or s3:// or gs://"
        )


def leave_nonce(folder: Path) -> str:
    """Write a nonce into a run's folder, for workers to find; returns it."""
    nonce = secrets.token_hex(16)
    copy = _Copy.of(folder)
    if copy is not None:
        copy.write(_NONCE, lambda: io.BytesIO(nonce.encode()))
    else:
        runs.write_bytes(folder / _NONCE, nonce.encode())
    return nonce


def join(folder: str, name: str) -> str:
    """A name below a folder, which may be a URI."""
    return f"{folder.rstrip('/')}/{name}"


def find_uri(folder: Path) -> str | None:
    """The URI that a folder is (part of) a working copy of; None for any other folder."""
    return _find_uri(*_split(folder)) if _COPIES in folder.parts else None


def _split(folder: Path) -> tuple[Path, Path]:
    """The root of the working copy that a folder is part of, and the folder relative to it."""
    depth = folder.parts.index(_COPIES) + 5
    return Path(*folder.parts[:depth]), Path(*folder.parts[depth:])


def _find_uri(root: Path, below: Path) -> str:
    *_, scheme, parent, name = root.parts
    return "/".join([f"{scheme}://{parent.replace(',', '/')}", name, *below.parts])


def name_place(folder: Path) -> str:
    """What a user knows a folder by: its URI, or its path."""
    return find_uri(folder) or str(folder)


def pull(folder: Path, passing: Sequence[str] = ()) -> None:
    """Make a working copy, or a part of it, what the store holds, but for folders named `passing` below it.

    A file is fetched when the store's has changed since it was fetched or pushed from here, and removed when the store
    has it no more. Raises InputError when the store cannot be read.
    """
    copy = _Copy.of(folder)
    if copy is None:
        return
    with copy.indexed() as index:
        there = {name: sign for name, sign in copy.list_remote(folder).items() if not _passes(name, passing)}
        wanted = [name for name, sign in there.items() if index.get(name) != [*copy.sign(name), *sign]]
        copy.each(wanted, copy.fetch)
        index.update({name: [*copy.sign(name), *there[name]] for name in wanted})
        for name in copy.list_local(folder) - set(there):
            if not _passes(name, passing):
                (copy.root / name).unlink()
                index.pop(name, None)
    if lock := copy.read_lock():
        _TOKENS[copy.root] = str(lock["token"])


def push(folder: Path) -> None:
    """Make the store hold what a working copy, or a part of it, holds: what changed since, manifests last.

    A file that was there and is here no more is then removed there, its folder's manifest first. Raises InputError when the
    store cannot be written, or the run's lock was taken by somebody else; what the store held whole it still holds.
    """
    copy = _Copy.of(folder)
    if copy is None:
        return
    copy.check_lock()
    with copy.indexed() as index:
        here = copy.list_local(folder)
        gone = {name for name in index if name not in here and copy.holds(folder, name) and not copy.is_passing(name)}
        for last in (False, True):
            changed = [n for n in sorted(here) if _is_manifest(n) == last and (index.get(n) or [])[:2] != copy.sign(n)]
            signs = {name: copy.sign(name) for name in changed}
            copy.each(changed, copy.send)
            index.update({name: [*signs[name], *copy.sign_remote(name)] for name in changed})
        for last in (True, False):
            copy.each([name for name in sorted(gone) if _is_manifest(name) == last], copy.remove)
        for name in gone:
            del index[name]


def _is_manifest(name: str) -> bool:
    return name.rpartition("/")[2] == runs.MANIFEST


def _passes(name: str, passing: Sequence[str]) -> bool:
    return bool(set(name.split("/")[:-1]) & set(passing))


@dataclass(frozen=True)
class _Copy:
    """A run's working copy: names are relative to its `root`, of which `uri` is the place in the store."""

    root: Path
    uri: str
    store: Any
    base: str

    @classmethod
    def of(cls, folder: Path) -> _Copy | None:
        """The copy that a folder is part of."""
        if _COPIES not in folder.parts:
            return None
        root, _ = _split(folder)
        uri = _find_uri(root, Path())
        return cls(root, uri, *_try(uri, lambda: _open(uri)))

    @contextmanager
    def indexed(self) -> Iterator[dict[str, list[int]]]:
        """Size and time, here and in the store, of every file that is the same in both; one process at a time."""
        path = _index_of(self.root)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            index = runs.read_json(path) or {}
            try:
                yield index
            finally:
                runs.write_json(path, index)

    def list_local(self, folder: Path) -> set[str]:
        """The files below a folder that belong to the run: no locks, temporary files or Ray's own."""
        found = {path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in found if not self.is_passing(name)}

    def is_passing(self, name: str) -> bool:
        """Whether a file is of this machine and this moment alone."""
        *folders, last = name.split("/")
        return ".ray" in folders or ".lock" in last or last.endswith(".tmp") or last in ("lock", _LOCK, _NONCE)

    def holds(self, folder: Path, name: str) -> bool:
        return (self.root / name).is_relative_to(folder)

    def sign(self, name: str) -> list[int]:
        """Size and time of a file here; zeros when it is absent."""
        path = self.root / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [0, 0]

    def sign_remote(self, name: str) -> list[int]:
        """Size and time of a file in the store."""
        info = _try(self.uri, lambda: self.store.get_file_info(f"{self.base}/{name}"))
        return [info.size, info.mtime_ns] if info.is_file else [0, 0]

    def list_remote(self, folder: Path) -> dict[str, list[int]]:
        """Size and time of every file of the run below a folder in the store."""
        from pyarrow import fs

        below = "/".join([self.base, *folder.relative_to(self.root).parts])
        selector = fs.FileSelector(below, recursive=True, allow_not_found=True)
        found = [info for info in _try(self.uri, lambda: self.store.get_file_info(selector)) if info.is_file]
        names = {info.path.removeprefix(f"{self.base}/"): [info.size, info.mtime_ns] for info in found}
        return {name: sign for name, sign in names.items() if not self.is_passing(name) and ".." not in name.split("/")}

    def each(self, names: Sequence[str], act: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(act, names))

    def fetch(self, name: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def read() -> None:
            with self.store.open_input_stream(f"{self.base}/{name}") as source, temp.open("wb") as file:
                shutil.copyfileobj(source, file, 2**22)

        try:
            _try(f"{self.uri}/{name}", read)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)

    def send(self, name: str) -> None:
        self.write(name, lambda: (self.root / name).open("rb"))

    def write(self, name: str, open_source: Callable[[], Any]) -> None:
        """An object whole or not at all: it appears when its upload is completed."""

        def upload() -> None:
            with open_source() as source:
                sink = self.store.open_output_stream(f"{self.base}/{name}")
                try:
                    shutil.copyfileobj(source, sink, 2**22)
                finally:
                    sink.close()

        _try(f"{self.uri}/{name}", upload)

    def remove(self, name: str) -> None:
        def delete() -> None:
            try:
                self.store.delete_file(f"{self.base}/{name}")
            except FileNotFoundError:
                return

        _try(f"{self.uri}/{name}", delete)

    def read_bytes(self, name: str) -> bytes | None:
        """An object's content; None when there is no such one."""

        def read() -> bytes | None:
            try:
                with self.store.open_input_stream(f"{self.base}/{name}") as source:
                    return bytes(source.read())
            except FileNotFoundError:
                return None

        return _try(f"{self.uri}/{name}", read)

    def read_lock(self) -> dict[str, Any] | None:
        content = self.read_bytes(_LOCK)
        try:
            found = json.loads(content or b"null")
        except ValueError:
            return None
        return found if isinstance(found, dict) and "token" in found else None

    def check_lock(self) -> None:
        """Raise InputError when the run is no longer ours."""
        ours, held = _TOKENS.get(self.root), self.read_lock()
        if ours is not None and held is not None and held["token"] != ours:
            raise InputError(
                f"{self.uri}: {_describe(held)} has taken this run over; nothing more is written from here"
            )


def _index_of(root: Path) -> Path:
    return root.with_name(f".{root.name}.index.json")


def _describe(lock: dict[str, Any]) -> str:
    return f"process {lock.get('pid', '?')} on {lock.get('host', '?')} since {lock.get('since', '?')}"


def _try(what: str, act: Callable[[], Result]) -> Result:
    """What `act` returns; what the store may do better a moment later is tried again, anything else said at once."""
    for wait_s in (*_WAITS_S, None):
        try:
            return act()
        except OSError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            transient = bool(_TRANSIENT.search(str(error)))
            if not transient or wait_s is None:
                tries = f" after {len(_WAITS_S) + 1} tries" if transient else ""
                raise InputError(
                    f"{what}: the store does not answer as it should{tries}: {reason}\nWhat was finished there before is "
                    "whole. Mend it (endpoint and credentials are those of the environment) and give the same command again"
                ) from error
            log.warning("%s: %s; tried again in %g s", what, reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


@contextmanager
def hold(folder: Path, mark: str = "run.json") -> Iterator[None]:
    """Hold a working copy's run in the store: lock it, pull it, push it at the end; nothing to do for any other folder.

    A store has no way to create an object only where there is none that pyarrow could use. So the lock is written, looked
    at again SETTLE_S later, and renewed every BEAT_S. Two who start within the time that one of them needs from looking
    to writing may both hold it for up to BEAT_S; then, and at every push, the one whose token is gone stops, and
    checkpoints are sealed by hashes whoever wrote them. Ages are taken from the store's clock. Raises InputError when
    another process has it, naming that, or when what is there has no `mark`, the file by which a folder is known as ours.
    """
    copy = _Copy.of(folder)
    if copy is None:
        yield
        return
    there = copy.list_remote(folder)
    if there and mark not in there and not {name.split("/")[0] for name in there} <= {"quarantine.jsonl", "run.log"}:
        raise InputError(
            f"{copy.uri}: holds other files ({', '.join(sorted(there)[:3])}) and is no medlora run; choose another folder"
        )
    token = _take_lock(copy)
    _TOKENS[copy.root] = token
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                copy.check_lock()
                copy.write(_LOCK, lambda: io.BytesIO(_describe_me(token)))
            except InputError as error:
                log.warning("%s", error)

    thread = threading.Thread(target=beat, name="medlora-lock", daemon=True)
    thread.start()
    try:
        pull(folder, passing=("checkpoints", "best"))
        yield
        push(folder)
    finally:
        ended.set()
        thread.join()
        if (holder := copy.read_lock()) and holder["token"] == token:
            copy.remove(_LOCK)
        del _TOKENS[copy.root]


def _take_lock(copy: _Copy) -> str:
    """Write our lock where there is none that counts; its token. Raises InputError naming who has it."""
    if (holder := copy.read_lock()) and (left_s := _count_left(copy, holder)) > 0:
        raise InputError(
            f"{copy.uri} is in use by {_describe(holder)}; wait for it, or give this run another name (if that process is "
            f"dead, its lock falls in {left_s:.0f} s)"
        )
    token = secrets.token_hex(16)
    copy.write(_LOCK, lambda: io.BytesIO(_describe_me(token)))
    time.sleep(SETTLE_S)
    if (holder := copy.read_lock()) is None or holder["token"] != token:
        raise InputError(f"{copy.uri} is in use by {_describe(holder or {})}, which began at the same time")
    return token


def _describe_me(token: str) -> bytes:
    me = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _name_machine()}
    born = psutil.Process().create_time()
    return json.dumps({**me, "born": born, "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(born))}).encode()


def _name_machine() -> str:
    """What is the same for two processes exactly when one sees the other's process id."""
    namespace = Path("/proc/self/ns/pid")
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not (namespace.is_symlink() and boot.is_file()):
        return socket.gethostname()
    return f"{boot.read_text().strip()} {os.readlink(namespace)}"


def _count_left(copy: _Copy, holder: dict[str, Any]) -> float:
    """Seconds for which a lock still counts; 0 when its process, of this machine, is gone."""
    if holder.get("machine") == _name_machine():
        try:
            if psutil.Process(holder["pid"]).create_time() != holder["born"]:
                return 0.0
        except psutil.NoSuchProcess:
            return 0.0
    probe = f"{_LOCK}.{secrets.token_hex(8)}"
    copy.write(probe, lambda: io.BytesIO(b"now"))
    now_ns = copy.sign_remote(probe)[1]
    copy.remove(probe)
    return EXPIRY_S - (now_ns - copy.sign_remote(_LOCK)[1]) / 1e9
