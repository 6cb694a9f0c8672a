"""Plain statistics of a picture that drift when a model is pushed too far: saturation, and how much is background."""

from typing import Any

import numpy as np
from PIL import Image

TOLERANCE = 24  # grey levels, in each channel: noise of a decoder stays within, an object does not


def saturation(images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
    """Mean over pixels of HSV saturation ``(max - min) / max`` of the three channels, 0 for black: in [0, 1]."""
    return [_saturation(np.asarray(image.convert("RGB"), dtype=np.float32)) for image in images]


def _saturation(rgb: np.ndarray) -> float:
    high, low = rgb.max(-1), rgb.min(-1)
    return float(((high - low) / np.maximum(high, 1)).mean())


def background(images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
    """Share of pixels, in [0, 1], whose channels all lie within 24 of 255 of the border's median colour."""
    return [_background(np.asarray(image.convert("RGB"), dtype=np.float32)) for image in images]


def _background(rgb: np.ndarray) -> float:
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    return float((np.abs(rgb - np.median(border, axis=0)).max(-1) <= TOLERANCE).mean())
