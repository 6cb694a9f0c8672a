"""Reading the LoRA file of a run."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crd.errors import CRDError
from crd.lora_settings import DOWN, METADATA, UP


@dataclass(frozen=True)
class LoraLayers:
    """LoRA weights of one model of a pipeline: ``W' = W + alpha / rank * up @ down``."""

    backbone: str  # the model's name in its pipeline and the folder it is saved in: transformer or unet
    layers: dict[str, tuple[Tensor, Tensor]]  # name of a module -> down (rank, in, ...), up (out, rank, ...)
    alpha: float

    def delta(self, module: str) -> Tensor:
        """What the layer adds to the weight of ``module``, float32; the kernel of a convolution is flattened."""
        down, up = self.layers[module]
        return self.alpha / len(down) * (up.float().flatten(1) @ down.float().flatten(1))


def read_lora(path: Path) -> LoraLayers:
    """Reads a LoRA file as runs leave it; raises CRDError if it is damaged or not one."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA])
        tensors = load_file(path)
        backbone = next(iter(tensors)).partition(".")[0]
        modules = [key.removesuffix(DOWN) for key in tensors if key.endswith(DOWN)]
        layers = {m.removeprefix(f"{backbone}."): (tensors.pop(m + DOWN), tensors.pop(m + UP)) for m in modules}
        alpha = float(facts[f"{backbone}.lora_alpha"])
    except (OSError, SafetensorError, KeyError, ValueError, StopIteration) as error:
        raise CRDError(f"{path} is no LoRA file of a run, or it is damaged: {error!r}. Train again, or restore it.") from error
    if tensors:
        raise CRDError(f"{path} holds {next(iter(tensors))!r}, which is not of the LoRA weights that runs leave.")
    return LoraLayers(backbone, layers, alpha)
