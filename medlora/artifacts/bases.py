"""Where a base model is, what identifies its weights, and its added words."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from medlora import miniature
from medlora.artifacts.base_checks import check_base, sample_weights
from medlora.config.model import BaseModelConfig
from medlora.data.reading.files import go_offline_without_hub
from medlora.errors import InputError
from medlora.turns import check_template

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_base(base: BaseModelConfig) -> str:
    """The base's folder, or its hub id unchanged; raises InputError when it is neither, without importing torch."""
    if base.model == "miniature":
        return base.model
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"base.model: {base.model} is a folder without config.json; name the folder of a Hugging Face model"
            )
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(base.model):
        raise InputError(
            f"base.model: there is no folder {base.model}; name a model's folder or a hub id such as google/medgemma-4b-it"
        )
    return base.model


def find_hub_commit(base: BaseModelConfig) -> str:
    """The commit of a hub model, from the local cache or the hub; raises InputError when neither has it."""
    return _find_snapshot(base).name


def _find_snapshot(base: BaseModelConfig) -> Path:
    """The folder of a hub model in the local cache, with its config at least; raises InputError."""
    go_offline_without_hub()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        config = hf_hub_download(base.model, "config.json", revision=base.revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"base.model: {base.model} is no folder here, and the Hugging Face hub did not give it ({reason}); "
            "download it where there is a hub (`hf download`) and name its folder: --set base.model=/path/to/it"
        ) from None
    return Path(config).parent


def find_base_folder(base: BaseModelConfig) -> Path | None:
    """The folder that holds a base's files here: its own, or the hub's cache; None for the miniature, which is built."""
    found = find_base(base)
    if found == "miniature":
        return None
    return Path(found) if Path(found).is_dir() else _find_snapshot(base)


def check_base_files(base: BaseModelConfig) -> None:
    """Look at a base's files, as far as they are here; raises InputError for what cannot be loaded."""
    folder = find_base_folder(base)
    if folder is not None:
        # What the hub's cache lacks is downloaded where there is a hub.
        complete = Path(base.model).expanduser().is_dir() or bool(os.environ.get("HF_HUB_OFFLINE"))
        check_base(folder, base.trust_remote_code, complete)


def identify_weights(base: BaseModelConfig, seed: int) -> dict[str, object]:
    """What distinguishes a base's weights from those of another of the same name, see `adapter_origin.differ`."""
    about: dict[str, object] = {"model": base.model, "files": identify_base(base)}
    folder = find_base_folder(base)
    if folder is None:
        about["seed"] = seed
    elif weights := sample_weights(folder):
        about["weights"] = weights
    return about


def identify_base(base: BaseModelConfig) -> str:
    """What distinguishes this base from another of its name: its files, its hub commit, or the miniature's recipe."""
    found = find_base(base)
    if found == "miniature":
        return miniature.fingerprint()
    folder = Path(found)
    if not folder.is_dir():
        return f"hub:{find_hub_commit(base)}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    # The weights of a 27B model take minutes to hash; their names and sizes identify a different model well enough.
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for path in sorted(folder.glob("tokenizer*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_extra_tokens(base: BaseModelConfig) -> tuple[str, ...]:
    """The words of `base.extra_tokens`; `file:PATH` reads one a line, `miniature:extra_tokens` the miniature's own."""
    words: list[str] = []
    for entry in base.extra_tokens:
        if entry == "miniature:extra_tokens":
            from medlora.miniature import corpus

            words += corpus.EXTRA_TOKENS
        elif entry.startswith("file:"):
            path = Path(entry.removeprefix("file:")).expanduser()
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"base.extra_tokens: {path} cannot be read: {error}") from None
            words += [line.strip() for line in lines if line.strip()]
        else:
            words.append(entry)
    return tuple(dict.fromkeys(words))


def check_base_template(base: BaseModelConfig) -> None:
    """Try the chat template of a base in a folder; raises InputError where it cannot write a question."""
    if base.model != "miniature" and Path(folder := find_base(base)).is_dir():
        check_template(Path(folder))
