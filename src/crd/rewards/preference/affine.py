"""Layers without activations between them are one affine map: fold them once."""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AffineHead:
    """``x @ weight + bias``: (n, d) -> (n,)."""

    weight: torch.Tensor  # (d,) float32
    bias: float

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features.float().cpu() * self.weight).sum(-1) + self.bias  # no matrix product, which autocast would round


def fold(state: dict[str, torch.Tensor], prefix: str, mean: float = 0.0, deviation: float = 1.0) -> AffineHead:
    """The linear layers ``{prefix}.N.weight`` and ``.bias`` in the order of N, then ``(y - mean) / deviation``.

    Raises ValueError unless there are such layers, they fit together, and the last has one output.
    """
    numbers = sorted(int(found[1]) for key in state if (found := re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.weight", key)))
    layers = [(state[f"{prefix}.{n}.weight"].double(), state[f"{prefix}.{n}.bias"].double()) for n in numbers]
    if not layers or layers[-1][0].shape[0] != 1:
        raise ValueError(f"it has no layers {prefix}.N.weight that end in one number")
    weight, bias = layers[0]
    for matrix, offset in layers[1:]:
        if matrix.shape[1] != len(weight):
            raise ValueError(f"the layers {prefix}.N.weight do not fit together: {len(weight)} outputs, {matrix.shape[1]} inputs")
        weight, bias = matrix @ weight, matrix @ bias + offset
    return AffineHead((weight[0] / deviation).float(), (bias.item() - mean) / deviation)
