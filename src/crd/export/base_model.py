"""The base model of a run: where its files are, and what they say of it."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import httpx2
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from crd.errors import CRDError
from crd.models.load import nano_folder

#: what looking on the hub can end with: offline, unknown, gated, no such file, no name of a repository
HUB_ERRORS = (OSError, httpx2.HTTPError, HFValidationError)


def local_folder(path: str) -> Path | None:
    """The folder of a base model that is one; None for a hub id."""
    folder = nano_folder() if path == "nano" else Path(path)
    return folder if folder.is_dir() else None


def hub_id(path: str) -> str | None:
    """``path`` if it can only be the name of a repository on the hub."""
    return path if local_folder(path) is None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) else None


def public_name(path: str) -> str:
    """How others may know the base model: a hub id or "nano" as it is, of a folder only its name."""
    return path if path == "nano" or hub_id(path) else Path(path).name


def pipeline_folder(path: str) -> Path:
    """The folder with all files of the base pipeline; what is not on this machine yet is fetched from the hub."""
    try:
        folder = local_folder(path) or Path(DiffusionPipeline.download(path, use_safetensors=True))
        if not (folder / "model_index.json").is_file():
            raise OSError(f"{folder} has no model_index.json.")
        return folder
    except (*HUB_ERRORS, ValueError) as error:
        raise CRDError(
            f"the base model {path!r} of this run is needed and cannot be had: {error} "
            "Put it where it was, or correct model.path in the run's config.yaml."
        ) from error


def pipeline_index(path: str) -> dict[str, Any]:
    """``model_index.json`` of the base pipeline; empty if it cannot be had."""
    file = base_file(path, "model_index.json")
    try:
        return json.loads(file.read_text()) if file else {}
    except ValueError as error:
        raise CRDError(f"the base model's {file} is damaged: {error}") from error


def base_file(path: str, name: str) -> Path | None:
    """A small file of the base model, from its folder or the hub; None if there is none or it cannot be had."""
    if folder := local_folder(path):
        return folder / name if (folder / name).is_file() else None
    with contextlib.suppress(*HUB_ERRORS):
        return Path(hf_hub_download(path, name))
    return None
