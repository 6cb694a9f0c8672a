"""What a detector finds in a picture."""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Detection:
    """One object: confidence in [0, 1], box in pixels (right and bottom exclusive), colour if there is one.

    The rules read ``color`` only from the most confident objects of a clause that names a colour. A detector
    whose colours are costly can therefore return objects of its own with these four attributes and classify
    when ``color`` is read.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom
    color: str | None


class Detector(Protocol):
    """The objects of each picture, in any order; at least all that are more confident than the rules' lowest threshold."""

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]: ...
