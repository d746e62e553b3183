"""One driver at a time: a file lock on a folder, a lock object in a store."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from medlora.errors import InputError
from medlora.runs.disk_errors import explaining
from medlora.runs.files import read_json, write_json
from medlora.runs.object_store import Objects

_HOLDER_WAIT_S = 5.0
"""How long a refused process looks for the holder's name, which is written a moment after the lock is taken."""


@contextmanager
def hold_file_lock(lock: Path, what: str, wait_s: float = 0) -> Iterator[None]:
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

    A holder that took the lock just now has not written its name yet; the file may still name the one before.
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


def _may_run(about: Mapping[str, object]) -> bool:
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


log = logging.getLogger("medlora.run")


LOCK = "lock.json"


BEAT_S, EXPIRY_S, SETTLE_S = 10.0, 45.0, 1.0
"""A lock is renewed every BEAT_S. Once EXPIRY_S old, it may be taken over: the new holder waits SETTLE_S and checks."""


_TOKENS: dict[str, str] = {}
"""The token under which this process works on each URI: its own, or that of the driver that it works for."""


@contextmanager
def hold_store_lock(objects: Objects) -> Iterator[None]:
    """Hold the lock of what is below a URI; raises InputError naming the holder when another process has it.

    pyarrow has no conditional write, so this lock is not atomic. We write it, wait SETTLE_S and check that it is still
    ours; the holder renews it every BEAT_S. If two drivers start at the same moment, both may believe they hold it for
    up to BEAT_S. The loser then stops, because every push checks the lock first. Checkpoints are sealed by hashes in
    either case. Ages are taken from the store's clock.
    """
    token = take_lock(objects)
    _TOKENS[objects.uri] = token
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                check_lock(objects)
                objects.write(LOCK, describe_me(token))
            except InputError as error:
                log.warning("%s", error)

    thread = threading.Thread(target=beat, name="medlora-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        del _TOKENS[objects.uri]
        if (holder := _read_lock(objects)) and holder["token"] == token:
            objects.remove(LOCK)


def take_lock(objects: Objects) -> str:
    """Write our lock where there is none that counts; its token. Raises InputError naming who has it."""
    if (holder := _read_lock(objects)) and (left_s := _count_left(objects, holder)) > 0:
        raise InputError(
            f"{objects.uri} is in use by {_describe(holder)}; wait for it, or give this run another name (if that process "
            f"is dead, its lock falls in {left_s:.0f} s)"
        )
    token = secrets.token_hex(16)
    objects.write(LOCK, describe_me(token))
    time.sleep(SETTLE_S)
    if (holder := _read_lock(objects)) is None or holder["token"] != token:
        raise InputError(f"{objects.uri} is in use by {_describe(holder or {})}, which began at the same time")
    return token


def adopt_lock(objects: Objects) -> None:
    """Work for the driver that holds the lock now, unless this process holds it or works for one already."""
    if objects.uri not in _TOKENS and (holder := _read_lock(objects)):
        _TOKENS[objects.uri] = str(holder["token"])


def check_lock(objects: Objects) -> None:
    """Raise InputError when somebody else has taken over what this process works on."""
    ours, holder = _TOKENS.get(objects.uri), _read_lock(objects)
    if ours is not None and holder is not None and holder["token"] != ours:
        raise InputError(
            f"{objects.uri}: {_describe(holder)} has taken this run over; nothing more is written from here"
        )


def _read_lock(objects: Objects) -> dict[str, object] | None:
    try:
        found = json.loads(objects.read(LOCK) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) and "token" in found else None


def describe_me(token: str) -> bytes:
    """The content of a lock that this process holds."""
    born = psutil.Process().create_time()
    about = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "machine": _name_machine(), "born": born}
    return json.dumps({**about, "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(born))}).encode()


def _describe(lock: dict[str, object]) -> str:
    return f"process {lock.get('pid', '?')} on {lock.get('host', '?')} since {lock.get('since', '?')}"


def _name_machine() -> str:
    """What is the same for two processes exactly when one sees the other's process id."""
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    if not (namespace.is_symlink() and boot.is_file()):
        return socket.gethostname()
    return f"{boot.read_text().strip()} {os.readlink(namespace)}"


def _count_left(objects: Objects, holder: dict[str, object]) -> float:
    """Seconds for which a lock still counts; 0 when its process, of this machine, is gone."""
    if holder.get("machine") == _name_machine():
        try:
            if psutil.Process(holder["pid"]).create_time() != holder["born"]:
                return 0.0
        except psutil.NoSuchProcess:
            return 0.0
    probe = f"{LOCK}.{secrets.token_hex(8)}"
    objects.write(probe, b"now")
    now_ns = objects.sign(probe)[1]
    objects.remove(probe)
    return EXPIRY_S - (now_ns - objects.sign(LOCK)[1]) / 1e9
