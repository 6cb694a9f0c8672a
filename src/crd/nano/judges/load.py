"""The trained networks, from the weights beside this file or from a folder of ``crd nano judges``."""

import functools
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file

from crd.errors import CRDError
from crd.nano.judges.alignment import AlignmentNet
from crd.nano.judges.detector_net import DetectorNet


def judges_folder() -> Path:
    """Where the embedded weights lie."""
    return Path(str(files("crd.nano.judges") / "weights"))


def _weights(folder: Path | None, name: str) -> dict[str, torch.Tensor]:
    path = (folder or judges_folder()) / f"{name}.safetensors"
    if not path.is_file():
        raise CRDError(f"the nano judges: there is no file {path}. `crd nano judges --output {path.parent}` trains it.")
    return load_file(path)


@functools.cache
def load_detector(folder: Path | None = None) -> DetectorNet:
    """The detector network in float32, ready to look; None: the embedded one."""
    net = DetectorNet()
    net.load_state_dict(_weights(folder, "detector"))
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@functools.cache
def load_alignment(folder: Path | None = None) -> AlignmentNet:
    """The alignment network in float32, ready to look; None: the embedded one."""
    net = AlignmentNet()
    net.load_state_dict(_weights(folder, "alignment"))
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
