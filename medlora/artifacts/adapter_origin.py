"""Where one of our adapters comes from: the base whose weights it was trained on, and the adapters below it.

The manifest of its phase records it. Where it was trained on others, a card (README.md) in the adapter's own folder
records it, too. The card is for users of other tools and for a copy of that folder; no hash covers it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.artifacts.headers import CONFIG, read_mapping
from medlora.errors import InputError
from medlora.runs import mirror
from medlora.runs.files import write_bytes
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import CARD, hash_adapter, read_manifest

_CARD_BYTES = 2**20


_MARK = "medlora: "


@dataclass(frozen=True)
class Origin:
    """What trained an adapter."""

    stage: str
    """The stage that it completes, as an evaluation names it: `runs/x:02`."""
    base: dict[str, object]
    """What identifies the base, see `identify_weights`."""
    below: tuple[str, ...]
    """Hashes of the adapters that were active under it, oldest first."""
    names: tuple[str, ...]
    """Their phases."""


def read_origin(adapter: Path) -> Origin | None:
    """Where an adapter comes from, by the manifest beside it or else by its card; None for adapters of other tools."""
    manifest = read_manifest(adapter.parent)
    trained_here = describe_origin(manifest) if manifest and adapter.name == "adapter" else None
    about = trained_here or _read_card(adapter / CARD)
    try:
        if about is None:
            return None
        run = adapter.parents[2]
        known = trained_here is not None and RunFolder(run).config.is_file()
        return Origin(
            stage=f"{shorten_place(run) if known else about['run']}:{about['phase']}",
            base=dict(about["base"]),
            below=tuple(map(str, about["below"])),
            names=tuple(map(str, about["chain"][:-1])),
        )
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def shorten_place(folder: Path) -> str:
    """A folder as a user in this place would write it."""
    if mirror.find_uri(folder):
        return mirror.name_place(folder)
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


def describe_origin(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the line of a card says of an adapter, by the manifest of its phase; None where that does not tell."""
    fingerprint = manifest.get("fingerprint") or {}
    if "base" not in fingerprint or "chain" not in manifest:
        return None
    base = {"model": fingerprint["base"].get("model"), "files": fingerprint.get("base_files")}
    if base["model"] == "miniature":
        base["seed"] = manifest.get("seed", fingerprint.get("seed"))
    if weights := manifest.get("base_weights"):
        base["weights"] = weights
    below = list(fingerprint.get("parent") or [])[: len(manifest["chain"]) - 1]
    return {
        "run": manifest.get("run", "the run"),
        "phase": manifest["phase"],
        "chain": manifest["chain"],
        "base": base,
        "below": below,
    }


def write_card(adapter: Path, manifest: dict[str, object]) -> None:
    """Write the card of an adapter that was trained on others, from what its phase's manifest is going to hold."""
    about = describe_origin(manifest)
    if about is None or not about["below"]:
        return
    *below, own = about["chain"]
    text = f"---\nlibrary_name: peft\n{_MARK}{json.dumps(about, ensure_ascii=False, sort_keys=True)}\n---\n\n"
    shown = ", ".join(f"`{name}`" for name in below)
    text += (
        f"# LoRA adapter `{own}` of the run `{about['run']}`\n\nTrained on `{about['base']['model']}`.\n\n"
        f"**Not for use alone.** It was trained on top of {shown}, which must be active beside it, in this order and under "
        f"it. medlora scores them as the stage `{about['run']}:{own}`. `medlora.model.export.export_chain` joins them "
        "into one adapter for other tools.\n"
    )
    write_bytes(adapter / CARD, text.encode())


def _read_card(card: Path) -> dict[str, Any] | None:
    if not card.is_file() or card.stat().st_size > _CARD_BYTES:
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:20]
    found = next((line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)), None)
    try:
        about = json.loads(found) if found else None
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def identify_adapter(adapter: Path) -> str:
    """What identifies an adapter to others that were trained on it."""
    manifest = read_manifest(adapter.parent)
    known = manifest.get("adapter_hash") if manifest and adapter.name == "adapter" else None
    return str(known or hash_adapter(adapter))


def find_missing_parents(adapters: Sequence[Path]) -> list[str]:
    """What is missing below the adapters of one stage, oldest first: those that one of them was trained on top of."""
    doubts = []
    for i, adapter in enumerate(adapters):
        origin = read_origin(adapter)
        if origin is None or not origin.below:
            continue
        if [identify_adapter(below) for below in adapters[:i]] == list(origin.below):
            continue
        shown = ", ".join(map(mirror.name_place, adapters[:i])) or "the base alone"
        doubts.append(
            f"{mirror.name_place(adapter)} was trained on top of {', '.join(origin.names)}, and is here on top of "
            f"{shown}; name the whole stage {origin.stage}{_list_chain(adapter, origin)}"
        )
    return doubts


def _list_chain(adapter: Path, origin: Origin) -> str:
    """The folders of a stage's adapters, where the run is there, for a place that takes folders alone."""
    folders = [adapter.parents[1] / name / "adapter" for name in origin.names]
    if not all((folder / CONFIG).is_file() for folder in folders):
        return ""
    return f" (or its adapters, oldest first: {', '.join(shorten_place(folder) for folder in [*folders, adapter])})"


def find_foreign_bases(adapters: Sequence[Path]) -> list[str]:
    """Where adapters of one chain were trained on different bases."""
    known = [(adapter, origin.base) for adapter in adapters if (origin := read_origin(adapter)) is not None]
    doubts = []
    for adapter, base in known[1:]:
        if differ(known[0][1], base):
            first = f"{mirror.name_place(known[0][0])} of base {name_base(known[0][1])}"
            doubts.append(f"{mirror.name_place(adapter)} is of base {name_base(base)}, {first}")
    return doubts


def differ(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two bases have other weights, as far as is known: by a sample, else by their files, else by name."""
    if one.get("weights") and other.get("weights"):
        return bool(one["weights"] != other["weights"])
    kinds = [_find_kind(base) for base in (one, other)]
    if kinds[0] == kinds[1] and one.get("files") and other.get("files"):
        return (one["files"], one.get("seed")) != (other["files"], other.get("seed"))
    return Path(str(one.get("model"))).name != Path(str(other.get("model"))).name


def _find_kind(base: dict[str, object]) -> str:
    if base.get("model") == "miniature":
        return "miniature"
    return "hub" if str(base.get("files")).startswith("hub:") else "folder"


def name_base(base: dict[str, object]) -> str:
    """A base in words that distinguish it from another of its name."""
    known = [f"seed {base['seed']}"] if base.get("seed") is not None else []
    if found := base.get("weights") or base.get("files"):
        known.append(f"{'weights' if base.get('weights') else 'files'} {str(found).removeprefix('hub:')[:12]}")
    return f"{base.get('model')} ({', '.join(known)})" if known else str(base.get("model"))


def find_base_doubts(base: dict[str, object], adapters: Sequence[Path]) -> list[str]:
    """Which adapters were made for another base; those of other tools are known by its name alone."""
    doubts = []
    for adapter in dict.fromkeys(adapters):
        origin = read_origin(adapter)
        if origin is not None:
            if differ(origin.base, base):
                doubts.append(
                    f"{mirror.name_place(adapter)} was made for base {name_base(origin.base)}, not for {name_base(base)}"
                )
            continue
        made_for = str(_read_config(adapter).get("base_model_name_or_path") or "")
        if made_for and Path(made_for).name != Path(str(base["model"])).name:
            doubts.append(f"{mirror.name_place(adapter)} was made for base {made_for}, not for {base['model']}")
    return doubts


def _read_config(adapter: Path) -> dict[str, object]:
    try:
        return read_mapping(adapter / CONFIG, _CARD_BYTES * 4)
    except InputError:
        return {}
