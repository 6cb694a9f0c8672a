"""The base pipeline with the tuned weights in it: a folder for plain diffusers, without any LoRA.

Only the files of the backbone are rewritten, one at a time, so the memory needed is that of the largest of them; every
other component is copied as it is. A LoRA is added in float32 and rounded to what the base's file holds; a whole
backbone takes the place of the base's.
"""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from crd.errors import CRDError
from crd.export.base_model import pipeline_index
from crd.export.lora_file import LoraLayers

#: weights that are no safetensors; nothing of ours loads them, so they are left behind
UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


def write_merged(lora: LoraLayers, base: Path, folder: Path) -> None:
    """Writes the pipeline of ``base`` with ``lora`` merged into its backbone; raises CRDError if the two do not fit."""
    _copy(base, folder, {lora.backbone: ("*.safetensors",)})
    merged: set[str] = set()
    for file in tqdm(sorted((base / lora.backbone).glob("*.safetensors")), desc="merging", unit="file"):
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CRDError(f"the base model's {file} cannot be read: {error}") from error
        merged |= merge(lora, tensors)
        save_file(tensors, folder / lora.backbone / file.name, metadata)
    if missing := sorted(lora.layers.keys() - merged):
        raise CRDError(f"the base model in {base} has no weight for {missing[0]!r} of the LoRA: it is not the run's base model.")


def write_replaced(backbone: Path, base: Path, folder: Path) -> None:
    """Writes the pipeline of ``base`` with a tuned ``backbone`` folder in the place of its own."""
    kind, name = class_and_component(backbone)
    if (own := pipeline_index(str(base)).get(name, [None, None])[1]) != kind:
        raise CRDError(f"the base model in {base} has a {own} where the run has a {kind}: it is not the run's base model.")
    for file in backbone.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):  # it checks the size
                pass
        except (OSError, SafetensorError) as error:
            raise CRDError(f"{file} is damaged: {error}. Train again, or restore it.") from error
    _copy(base, folder, {name: ("*",)})
    shutil.copytree(backbone, folder / name, dirs_exist_ok=True)


def class_and_component(backbone: Path) -> tuple[str, str]:
    """Class of a saved backbone, and its name in pipelines; raises CRDError if it is damaged."""
    try:
        kind = json.loads((backbone / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CRDError(f"{backbone} is no backbone of a run, or it is damaged: {error!r}. Train again, or restore it.") from error
    return kind, "unet" if kind.startswith("UNet") else "transformer"


def _copy(base: Path, folder: Path, without: dict[str, tuple[str, ...]]) -> None:
    """Copies a pipeline; ``without`` names the files of components to leave out."""
    components = [name for name in pipeline_index(str(base)) if (base / name).is_dir()]
    for component in tqdm(components, desc="copying", unit="folder"):
        ignored = shutil.ignore_patterns(*UNSAFE, *without.get(component, ()))
        shutil.copytree(base / component, folder / component, ignore=ignored)
    for extra in [base / "model_index.json", *base.glob("LICEN[CS]E*")]:
        shutil.copyfile(extra, folder / extra.name)


def merge(lora: LoraLayers, tensors: dict[str, Tensor]) -> set[str]:
    """Adds the LoRA to those weights of its modules that are among ``tensors``, in place; returns these modules."""
    found = {module for module in lora.layers if f"{module}.weight" in tensors}
    for module in found:
        weight, delta = tensors[f"{module}.weight"], lora.delta(module)
        if weight.numel() != delta.numel() or len(weight) != len(delta):
            raise CRDError(f"the LoRA's {module!r} does not fit the base model's weight of shape {tuple(weight.shape)}.")
        tensors[f"{module}.weight"] = (weight.float() + delta.view(weight.shape)).to(weight.dtype)
    return found
