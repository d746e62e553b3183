"""Upload an export to the Hugging Face hub, or to another server that HF_ENDPOINT names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from medlora.errors import InputError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TOKEN = re.compile(r"\S{1,1000}")


def check_target(repository: str, token_file: Path | None) -> None:
    """Raise InputError, before anything is written, for a name that the hub does not take, or where no token is found."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InputError(f"--push {repository}: write OWNER/NAME, letters, digits and ._- alone")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise InputError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    find_token(token_file)


def find_token(token_file: Path | None) -> str:
    """The token of a file, else of HF_TOKEN or `hf auth login`; no message shows its text."""
    if token_file is None:
        from huggingface_hub import get_token

        token = get_token()
        if not token:
            raise InputError("--push: no token; set HF_TOKEN, run `hf auth login`, or name a file with --token-file")
        return str(token)
    try:
        token = token_file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {token_file}: cannot be read: {type(error).__name__}") from None
    if not _TOKEN.fullmatch(token):
        raise InputError(f"--token-file {token_file}: must hold one token and nothing else")
    return token


def upload(folder: Path, repository: str, is_public: bool, token_file: Path | None) -> str:
    """Upload everything in a folder as one commit and return its address.

    Raises InputError where the server refuses, and, unless `is_public`, where the repository is there already and public.
    """
    from huggingface_hub import HfApi, errors

    token = find_token(token_file)
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True, repo_type="model")
        if not is_public and not api.model_info(repository).private:
            raise InputError(f"--push {repository}: is a public repository; add --public, or name another")
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from medlora")
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(token, "***")
        raise InputError(
            f"--push {repository}: the hub did not take it ({reason}); the export is whole in {folder}, push it again "
            f"with `hf upload {repository} {folder}`"
        ) from None
    return str(done)
