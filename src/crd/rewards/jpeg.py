"""Size of a picture as a JPEG file: rewards without a model, for trying things out. Formula: DDPO's, as in Flow-GRPO."""

import io
from typing import Any

from PIL import Image

QUALITY = 95  # of 100, in Pillow's scale
SCALE = 500  # kB that count as -1


def kilobytes(image: Image.Image) -> float:
    """Size of the JPEG file in kB (1000 bytes)."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000


def jpeg_incompressibility(images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
    """The size in kB: higher for busy pictures."""
    return [kilobytes(image) for image in images]


def jpeg_compressibility(images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
    """``-kB / 500``: higher, up to 0, for smooth pictures."""
    return [-kilobytes(image) / SCALE for image in images]
