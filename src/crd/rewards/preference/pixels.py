"""Pictures to the input of a vision transformer, where the reference does it otherwise than transformers' image processor.

Every function takes PIL pictures of any sizes and modes and returns (n, 3, size, size) float32, normalised by CLIP's
channel means and deviations.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def cropped_bicubic(images: list[Image.Image], size: int) -> torch.Tensor:
    """Short side to ``size``, bicubic on 8 bits by Pillow, middle square (ImageReward)."""
    squares = []
    for image in images:
        height, width = _short_side_to(size, image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        squares.append(_middle(_unit_range(resized), size))
    return _normalised(torch.stack(squares))


def cropped_bilinear(images: list[Image.Image], size: int) -> torch.Tensor:
    """Short side to ``size``, bilinear with antialiasing on floats, middle square (DiffusionNFT's CLIPScore)."""
    squares = []
    for image in images:
        pixels = _unit_range(image.convert("RGB"))[None]
        shape = _short_side_to(size, image.height, image.width)
        squares.append(_middle(functional.interpolate(pixels, shape, mode="bilinear", antialias=True)[0], size))
    return _normalised(torch.stack(squares))


def padded_bicubic(images: list[Image.Image], size: int) -> torch.Tensor:
    """Long side to ``size``, bicubic on 8 bits by Pillow, black on both sides of the short one (HPSv2)."""
    squares = []
    for image in images:
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        resized = _unit_range(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        left, top = (size - width) // 2, (size - height) // 2
        squares.append(functional.pad(resized, (left, size - width - left, top, size - height - top)))
    return _normalised(torch.stack(squares))  # after the padding, which is thus black and not grey


def _unit_range(image: Image.Image) -> torch.Tensor:
    """(3, height, width) from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _short_side_to(size: int, height: int, width: int) -> tuple[int, int]:
    """(height, width); the long side is rounded down."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _middle(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """An odd margin is split as torchvision does, half to even."""
    top, left = (round((side - size) / 2) for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / deviation
