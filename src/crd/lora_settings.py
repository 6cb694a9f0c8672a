"""What a LoRA file of diffusers says of itself: where it lies, and the model settings that it fits."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from crd.errors import CRDError

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of a file's adapter
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def find_lora(place: Path) -> Path:
    """The file itself, or the one in a folder; raises CRDError if there is none."""
    path = place / FILE_NAME if place.is_dir() else place
    if not path.is_file():
        raise CRDError(
            f"--lora: there is no file {path.resolve()}. Give a LoRA file of diffusers, or the folder with {FILE_NAME}."
        )
    return path


def lora_settings(path: Path) -> dict[str, Any]:
    """Settings of ``model`` (rank, alpha, targets) that a LoRA file fits.

    A file without metadata has alpha = rank, as diffusers takes it. Raises CRDError for files of another make, and for those
    whose layers differ in rank or scale.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  (no dictionary)
            facts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CRDError(f"--lora: {path} cannot be read: {error}") from error
    ranks = {shape[0] for key, shape in shapes.items() if key.endswith(DOWN)}
    own = {key.partition(".")[2]: value for key, value in facts.items()}  # "transformer.r" and the like
    strange = [key for key in shapes if not key.endswith((DOWN, UP))]
    uneven = own.get("rank_pattern") or own.get("alpha_pattern") or own.get("use_rslora") or own.get("use_dora")
    if strange or len(ranks) != 1 or uneven:
        found = f"the tensor {strange[0]!r}" if strange else f"ranks {sorted(ranks)}, patterns or another scale"
        raise CRDError(
            f"--lora: {path} is not supported: it has {found}. Expected is a LoRA file as diffusers saves it, with *{DOWN} and "
            f"*{UP}, one rank and one alpha. Load it with diffusers, fuse it, save the pipeline and give that folder."
        )
    (rank,) = ranks
    modules = [key.removesuffix(DOWN).partition(".")[2] for key in shapes if key.endswith(DOWN)]
    return {"lora_rank": rank, "lora_alpha": float(own.get("lora_alpha", rank)), "lora_targets": tuple(modules)}
