"""Objects of a folder in `s3://` or `gs://`: read, written whole, listed, removed; patient where the store stumbles."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from medlora.errors import InputError

log = logging.getLogger("medlora.run")


Result = TypeVar("Result")


STORES = ("s3://", "gs://")


_TRANSIENT = re.compile(
    r"SLOW_?DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|INTERNAL_ERROR|THROTTL|REQUEST_TIMEOUT|TIMED? ?OUT|curlCode"
    r"|NETWORK_CONNECTION|HTTP (response code|status) 5\d\d|UNAVAILABLE|reset by peer|broken pipe",
    re.I,
)


WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Between five tries, each of which S3's client has tried three times itself, Google's for GCS_RETRY_S."""


GCS_RETRY_S = 5.0


Sign = list[int]
"""Size and time of a file or object in nanoseconds; zeros when it is absent."""


def is_store(where: str | Path) -> bool:
    """Whether a place is in an object store."""
    return str(where).startswith(STORES)


def open_store(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI (or absolute path) and the path in it; raises what pyarrow raises.

    Endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...;
    GOOGLE_APPLICATION_CREDENTIALS or the machine's own account, STORAGE_EMULATOR_HOST).
    """
    from pyarrow import fs

    if uri.startswith("gs://"):
        return _open_gcs(fs), uri.removeprefix("gs://")
    store, path = fs.FileSystem.from_uri(uri)
    return store, path


def _open_gcs(fs: Any) -> object:
    # Left alone, Google's client retries silently for 15 minutes; `_try` logs what it waits for.
    patience = timedelta(seconds=GCS_RETRY_S)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        scheme, _, host = emulator.rpartition("://")
        return fs.GcsFileSystem(
            anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=patience
        )
    return fs.GcsFileSystem(retry_time_limit=patience)


@dataclass(frozen=True)
class Objects:
    """What is below a URI, by names relative to it. Everything raises InputError when the store fails for good."""

    uri: str
    store: Any
    base: str

    @classmethod
    def open(cls, uri: str) -> Objects:
        """Find the store; nothing is read or written yet."""
        return cls(uri, *_try(uri, lambda: _open_patient(uri)))

    def list(self, below: str = "") -> dict[str, Sign]:
        """Size and time of every object below a folder."""
        from pyarrow import fs

        folder = f"{self.base}/{below}".rstrip("/")
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = [info for info in _try(self.uri, lambda: self.store.get_file_info(selector)) if info.is_file]
        names = {info.path.removeprefix(f"{self.base}/"): [info.size, info.mtime_ns] for info in found}
        return {name: sign for name, sign in names.items() if ".." not in name.split("/")}

    def sign(self, name: str) -> Sign:
        """Size and time of an object."""
        info = _try(f"{self.uri}/{name}", lambda: self.store.get_file_info(f"{self.base}/{name}"))
        return [info.size, info.mtime_ns] if info.is_file else [0, 0]

    def read(self, name: str) -> bytes | None:
        """An object's content; None when there is no such one."""

        def act() -> bytes | None:
            try:
                with self.store.open_input_stream(f"{self.base}/{name}") as source:
                    return bytes(source.read())
            except FileNotFoundError:
                return None

        return _try(f"{self.uri}/{name}", act)

    def fetch(self, name: str, path: Path) -> None:
        """Write an object to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def act() -> None:
            with self.store.open_input_stream(f"{self.base}/{name}") as source, temp.open("wb") as file:
                shutil.copyfileobj(source, file, 2**22)

        try:
            _try(f"{self.uri}/{name}", act)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)

    def send(self, name: str, path: Path) -> None:
        """Write a file to an object."""
        self._upload(name, lambda: path.open("rb"))

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        self._upload(name, lambda: io.BytesIO(content))

    def _upload(self, name: str, open_source: Callable[[], Any]) -> None:
        """Whole or not at all: an object appears when its upload is completed."""

        def act() -> None:
            with open_source() as source, self.store.open_output_stream(f"{self.base}/{name}") as sink:
                shutil.copyfileobj(source, sink, 2**22)

        _try(f"{self.uri}/{name}", act)

    def remove(self, name: str) -> None:
        """Delete an object, present or not."""

        def act() -> None:
            try:
                self.store.delete_file(f"{self.base}/{name}")
            except FileNotFoundError:
                return

        _try(f"{self.uri}/{name}", act)


def _open_patient(uri: str) -> tuple[object, str]:
    from pyarrow import fs

    store, path = open_store(uri)
    if isinstance(store, fs.S3FileSystem):
        # Arrow's own strategy retries silently for most of a minute; `_try` logs what it waits for.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        retry = fs.AwsStandardS3RetryStrategy(max_attempts=3)
        store = fs.S3FileSystem(region=store.region, endpoint_override=endpoint, retry_strategy=retry)
    return store, path


def _try(what: str, act: Callable[[], Result]) -> Result:
    """What `act` returns; errors that may pass are retried, others are raised at once."""
    for wait_s in (*WAITS_S, None):
        try:
            return act()
        except OSError as error:
            reason = str(error).splitlines()[0].partition(" error_info=")[0] if str(error) else type(error).__name__
            transient = bool(_TRANSIENT.search(str(error)))
            if not transient or wait_s is None:
                tries = f" after {len(WAITS_S) + 1} tries" if transient else ""
                raise InputError(
                    f"{what}: the store does not answer as it should{tries}: {reason}\nWhat was finished there before is "
                    "whole. Fix it (endpoint and credentials are those of the environment) and give the same "
                    "command again"
                ) from error
            log.warning("%s: %s; tried again in %g s", what, reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")
