"""Find a PEFT adapter in a folder or a store, and read its config."""

from __future__ import annotations

from pathlib import Path

from medlora.artifacts.headers import CONFIG, WEIGHTS, read_mapping
from medlora.errors import InputError
from medlora.runs import mirror
from medlora.runs.object_store import is_store

_CONFIG_BYTES = 4 * 2**20


_PLACES = ("lora_adapter", "final", "adapter", "")


def fetch_adapter(where: str, cache: str | None) -> Path:
    """The PEFT adapter of a folder, or of a copy of what is at an `s3://` or `gs://` URI; raises what `find_adapter` raises."""
    if not is_store(where):
        return find_adapter(Path(where).expanduser().absolute())
    copy = mirror.find_copy(where, cache, "read")
    mirror.pull(copy, exclude=("checkpoints", "best"))
    return find_adapter(copy)


def find_adapter(folder: str | Path) -> Path:
    """The PEFT adapter in the `lora_adapter/`, `final/` or `adapter/` of a folder, or in the folder itself.

    Raises InputError when there is none, or it is no LoRA adapter with safetensors weights.
    """
    places = [Path(folder) / place for place in _PLACES]
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        looked = ", ".join(mirror.name_place(place) for place in places)
        raise InputError(f"{mirror.name_place(Path(folder))}: no adapter here; looked for {CONFIG} in {looked}")
    kind = read_adapter_json(found).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{found / CONFIG}: peft_type is {kind!r}; only LORA adapters make a chain")
    if (found / WEIGHTS).is_file():
        return found
    if (found / "adapter_model.bin").is_file():
        raise InputError(f"{found}: adapter_model.bin is a pickle, which can run code on loading; save it as {WEIGHTS}")
    raise InputError(f"{found}: has no {WEIGHTS}; the adapter was not saved completely")


def read_adapter_json(folder: Path) -> dict[str, object]:
    """The adapter's config as its file holds it; raises InputError when it is no JSON mapping."""
    return read_mapping(folder / CONFIG, _CONFIG_BYTES)
