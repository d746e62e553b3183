"""Manifests: the sha256 of every file of a finished folder, and what two fingerprints differ in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from medlora.runs.files import is_temporary, read_json, sweep_temporary, sync_files, sync_folder, write_with_checksum

MANIFEST = "manifest.json"


CARD, CARD_MARK = "README.md", b"medlora: {"
"""The card in an adapter's folder, and how one line of it begins; no hash includes it."""


LIVING = ("lock", "lock.json", "run.log", "quarantine.jsonl")
"""Files at the top of a folder that change after it is finished; no manifest lists them."""


class Manifest(TypedDict):
    """What a finished folder records of itself; optional keys are of a phase, an evaluation or a cache."""

    files: dict[str, str]
    finished: str
    fingerprint: NotRequired[dict[str, object]]
    phase: NotRequired[str]
    run: NotRequired[str]
    seed: NotRequired[int]
    base_weights: NotRequired[str | None]
    chain: NotRequired[list[str]]
    adapter_hash: NotRequired[str]
    question_sources: NotRequired[list[str]]
    rationale: NotRequired[list[str]]
    step: NotRequired[int]


class PhaseManifest(Manifest):
    """The manifest of a finished phase."""

    seconds: dict[str, float]
    """What its time was spent on; `all` and `base` are always there."""


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: object) -> str:
    """sha256 of plain values; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_files(folder: Path, exclude: Sequence[Path] = ()) -> dict[str, str]:
    """sha256 of every file below `folder` by relative path, except its manifest, cards, and the folders in `exclude`."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in _list_files(folder, exclude)}


def _list_files(folder: Path, exclude: Sequence[Path] = ()) -> list[Path]:
    ours = {folder / name for name in (MANIFEST, *LIVING)}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)
    files = [path for path in files if not is_temporary(path.name) and not is_card(path)]
    return [path for path in files if not any(path.is_relative_to(other) for other in exclude)]


def is_card(path: Path) -> bool:
    """Whether medlora wrote this card; a card of another tool is an ordinary file, and a pipe is never opened."""
    if path.name != CARD or not path.is_file():
        return False
    with path.open("rb") as file:
        return any(line.startswith(CARD_MARK) for line in file.read(2**20).splitlines()[:20])


def hash_adapter(folder: Path) -> str:
    """The hash that identifies an adapter."""
    return hash_json(hash_files(folder))


def commit(folder: Path, about: Mapping[str, object], exclude: Sequence[Path] = ()) -> Manifest:
    """Write the manifest of a finished folder: `about`, and the hashes of its files except those in `exclude`, files or folders.

    The files and their folders are durable before the manifest that names them, and the manifest when this returns.
    """
    sweep_temporary(folder)
    files = _list_files(folder, exclude)
    sync_files(*files)
    sync_folder(folder.parent)
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    manifest = {**about, "files": hashes, "finished": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    write_with_checksum(folder / MANIFEST, manifest)
    return cast(Manifest, manifest)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished folder, or None when the folder is unfinished or its manifest is damaged."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    whole = all(isinstance(digest, str) for digest in manifest["files"].values())
    return cast(Manifest, manifest) if whole and isinstance(manifest.get("fingerprint", {}), dict) else None


def check_files(folder: Path, manifest: Manifest, exclude: Sequence[Path] = ()) -> str | None:
    """What is wrong with a finished folder (a file missing or changed), or None when all hashes but those of `exclude` match."""
    for name, digest in manifest["files"].items():
        path = folder / name
        if path in exclude:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if hash_file(path) != digest:
            return f"{name} has changed"
    return None


def as_json(content: object) -> Any:
    """Plain values as they come back from a JSON file: tuples as lists, keys as text."""
    return json.loads(json.dumps(content))


def find_differences(was: object, now: object, at: str = "") -> list[str]:
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


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
