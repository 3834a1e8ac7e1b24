"""Uploads an exported folder to a model hub (huggingface_hub). Nothing is sent before `push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from collm.errors import ConfigError, RunError
from collm.runs.directory import command

if TYPE_CHECKING:
    from collm.models.policy import Policy


def check_push(repo: str) -> None:
    """Raise ConfigError for a name that no repository can have, or without a token of the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is not the name of a repository: {error} Write OWNER/NAME.") from error
    if get_token() is None:
        raise ConfigError(f"--push {repo!r} needs a login: run `hf auth login`, or set HF_TOKEN to a token that may write.")


def check_complete(policy: Policy, *, merged: bool) -> None:
    """Raise ConfigError for an adapter on a base that only this machine has; its path would be in the upload, too."""
    if policy.adapter is not None and not merged and Path(policy.source).exists():
        raise ConfigError(
            f"--push uploads an adapter without its base, and this one's base is the local folder {policy.source!r}. Add "
            "--merged to upload a whole model."
        )


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to a repository, made private if it does not exist, and return its address.

    Raises RunError where the hub refuses it or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="collm")
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="collm export")
    except Exception as error:
        again = f"The exported folder is complete; to try again: {command('hf', 'upload', repo, folder, '--private')}"
        raise RunError(f"--push {repo!r} failed: {_reason(error)}. {again}") from error
    return str(made)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token; run `hf auth login` with one that may write"
    if status in (403, 409):
        return "the repository exists and is not yours, or your token may not write there; name one of your own"
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"the hub answered {status}: {said}" if status else f"the hub cannot be reached ({said})"
