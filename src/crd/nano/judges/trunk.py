"""The convolutional stack that both networks begin with."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from crd.nano.world import SIZE, to_array

CHANNELS = 96  # of the trunk's output
CELL = 8  # pixels that one output cell stands for
BATCH = 128  # pictures that a network looks at together


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def make_trunk() -> nn.Sequential:
    """Pictures ``(n, 3, 64, 64)`` in [-1, 1] to ``(n, 96, 8, 8)``; a cell sees the 39 pixels around its middle."""
    return nn.Sequential(
        _convolution(3, 24, 2),
        _convolution(24, 48, 2),
        _convolution(48, 48),
        _convolution(48, CHANNELS, 2),
        _convolution(CHANNELS, CHANNELS),
    )


def batches(images: list[Image.Image]) -> Iterator[Tensor]:
    """Pictures of any size as the networks want them, some at a time: ``(n, 3, 64, 64)`` in [-1, 1]."""
    for start in range(0, len(images), BATCH):
        part = [image.convert("RGB") for image in images[start : start + BATCH]]
        fitted = [i if i.size == (SIZE, SIZE) else i.resize((SIZE, SIZE), Image.Resampling.BOX) for i in part]
        yield torch.from_numpy(to_array(fitted)).contiguous(memory_format=torch.channels_last)
