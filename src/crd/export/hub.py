"""Uploading an export to the Hugging Face Hub."""

from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from crd.errors import CRDError

#: what a call of the hub ends with, if it fails; ValueError: a name that cannot be a repository's, or a refused model card
ERRORS = (OSError, ValueError, httpx2.HTTPError)


def check_login() -> None:
    """Raises CRDError unless the hub answers and knows the user; asked first, since an export can take long."""
    try:
        HfApi().whoami()
    except ERRORS as error:
        raise CRDError(f"--push-to-hub: {_reason(error)}") from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads all of ``folder`` as one commit to the model repository ``repo``, made if it is not there; returns its address."""
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise CRDError(f"--private: {repo} is on the hub already and is public. Nothing was uploaded.")
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload by crd export")
    except ERRORS as error:
        again = f"The export is whole in {folder}; to upload it later: hf upload {repo} {folder}"
        raise CRDError(f"--push-to-hub: {_reason(error)} {again}") from error
    return str(url)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to upload."
    if isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write."
    if isinstance(error, HfHubHTTPError):
        return f"the hub refused: {error}"
    return f"it cannot be uploaded: {error or type(error).__name__}."
