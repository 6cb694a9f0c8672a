"""Finds the nano world's shapes in 64x64 pictures by classical vision: no weights, two or three milliseconds a picture.

The background is the median of the border. Connected pixels that differ from it are one object. Its coverage
(how much of each pixel it fills) gives area and centre; each shape is drawn with that area and centre and
compared with the coverage, and the one that agrees best names the object. Confidence says how near, on
average, the edge of the object lies to that of the shape, and how far the next best shape is behind.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.nano import world
from crd.rewards.geneval.detector import Detection

BORDER = 2  # pixels that the world keeps free of shapes
FOREGROUND = 48.0  # RGB distance from the background; the palette's is at least 150
MIN_AREA = 40  # pixels; the world's smallest shape has 130
REACH = 2  # pixels beyond FOREGROUND's edge that soft edges may have
#: mean distance of the edges, in radii, that means confidence 1 and 0. Chosen on the embedded model's pictures,
#: so that what a person calls a clean shape passes GenEval's 0.9 and what has no name stays below 0.3
CLEAN, SHAPELESS = 0.075, 0.1
CLEAR = 0.77  # disagreement with the best shape, as a part of that with the next best, that leaves no doubt
SAME_COLOR = 0.7  # part of an object's pixels that a colour needs to name it
PALETTE = np.array(list(world.COLORS.values()), dtype=np.float32)
COLOR_RADIUS = 80.0  # RGB distance up to which a colour has the name of the palette's nearest


class NanoDetector:
    """Reads pictures of the nano world; raises CRDError for pictures of another size."""

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        return [detect(image) for image in images]


def detect(image: Image.Image) -> list[Detection]:
    """All objects of a picture, in reading order; one that resembles no shape has confidence 0."""
    if image.size != (world.SIZE, world.SIZE):
        raise CRDError(
            f"The nano world's detector reads pictures of {world.SIZE}x{world.SIZE} pixels, got {image.width}x{image.height}. "
            "GenEval on other pictures needs another detector."
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    distance = np.sqrt(((pixels - _background(pixels)) ** 2).sum(-1))
    labels = label_components(distance > FOREGROUND)
    areas = np.bincount(labels.ravel())
    return [_describe(pixels, distance, labels, k) for k in range(1, len(areas)) if areas[k] >= MIN_AREA]


def _background(pixels: np.ndarray) -> np.ndarray:
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(pixels[border], axis=0)


def label_components(mask: np.ndarray) -> np.ndarray:
    """Numbers the regions of a boolean ``(h, w)`` mask that are connected by sides 1, 2, ... in reading order; 0 elsewhere.

    Works on runs of pixels within a row: a run joins the runs above that it touches.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = (axis.tolist() for axis in np.nonzero(edges == 1))
    stops = np.nonzero(edges == -1)[1].tolist()
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    above = 0  # the first run that the current one may touch
    for i in range(len(rows)):
        while rows[above] < rows[i] - 1 or (rows[above] == rows[i] - 1 and stops[above] <= starts[i]):
            above += 1
        j = above
        while rows[j] == rows[i] - 1 and starts[j] < stops[i]:
            first, second = sorted((root(i), root(j)))
            parent[second] = first
            j += 1
    numbers: dict[int, int] = {}
    labels = np.zeros(mask.shape, dtype=np.int64)
    for i, row in enumerate(rows):
        labels[row, starts[i] : stops[i]] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels


# ------------------------------------------------------------------------------------------- one object


def _describe(pixels: np.ndarray, distance: np.ndarray, labels: np.ndarray, number: int) -> Detection:
    ys, xs = np.nonzero(labels == number)
    margin = 2 * REACH
    top, left = max(ys.min() - margin, 0), max(xs.min() - margin, 0)
    window = np.s_[top : ys.max() + 1 + margin, left : xs.max() + 1 + margin]
    own = labels[window] == number
    coverage = _coverage(np.where(own | (labels[window] == 0), distance[window], 0), own)
    agreements = {shape: _agreement(coverage, template) for shape, template in TEMPLATES.items()}
    shape = max(agreements, key=agreements.__getitem__)
    color = _color(pixels[window][own & (coverage > 0.9)])
    return Detection(shape, _confidence(agreements, shape), _tight_box(coverage, left, top), color)


def _confidence(agreements: dict[str, float], shape: str) -> float:
    """In [0, 1]: how near the edge is to that of the shape, and how much nearer than to that of any other."""
    template, error = TEMPLATES[shape], 1 - agreements[shape]
    edge_distance = error * template.area / template.perimeter
    likeness = (SHAPELESS - edge_distance) / (SHAPELESS - CLEAN)
    next_error = min(1 - agreement for other, agreement in agreements.items() if other != shape)
    clarity = (1 - error / next_error) / (1 - CLEAR)
    return float(np.clip(min(likeness, clarity), 0, 1))


def _tight_box(coverage: np.ndarray, left: int, top: int) -> tuple[float, float, float, float]:
    """Around the pixels that are more than half filled."""
    ys, xs = np.nonzero(coverage > 0.5)
    return float(left + xs.min()), float(top + ys.min()), float(left + xs.max() + 1), float(top + ys.max() + 1)


def _coverage(distance: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How much of each pixel the object fills, in [0, 1]: its distance from the background, relative to the surroundings.

    Relative, because an object of several colours lies at several distances from the background.
    """
    smooth = _near(distance, 1, np.mean)  # so that noise does not make the largest value larger
    full = np.maximum(_near(smooth, REACH, np.max), FOREGROUND)
    return np.where(_near(own, REACH, np.max), np.minimum(distance / full, 1), 0)


def _near(values: np.ndarray, reach: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """``reduce`` (np.max, np.mean) of the values up to ``reach`` pixels away, in rows and in columns."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, reach), (2 * reach + 1,) * 2)
    return reduce(windows, axis=(-2, -1))


def _color(pixels: np.ndarray) -> str | None:
    """The palette's name for most of the pixels ``(n, 3)``; None for a mixture and for colours far from the palette."""
    if not len(pixels):
        return None
    distances = np.sqrt(((pixels[:, None] - PALETTE) ** 2).sum(-1))  # (n, 6)
    votes = np.bincount(distances.argmin(1), minlength=len(PALETTE))
    winner = int(votes.argmax())
    if votes[winner] < SAME_COLOR * len(pixels) or np.median(distances[:, winner]) > COLOR_RADIUS:
        return None
    return list(world.COLORS)[winner]


# ---------------------------------------------------------------------------------------------- shapes

SLANT = float(np.hypot(0.95, 1.75))  # side of the triangle, in radii

# Signed distance to the edge of a shape of radius r around (0, 0), negative inside, y down; sizes as in world.draw_item.


def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.79 * r) - 0.21 * r


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return _box(x, y, 0.85 * r, 0.85 * r)


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(y - 0.75 * r, (1.75 * np.abs(x) - 0.95 * (y + r)) / SLANT)


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.minimum(_box(x, y, r, 0.33 * r), _box(x, y, 0.33 * r, r))


@dataclass(frozen=True)
class Template:
    """A shape; lengths in radii."""

    edge: Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # signed distance at x, y for a radius
    area: float
    perimeter: float
    drop: float = 0.0  # of the centre of mass below the centre


TEMPLATES = {
    "circle": Template(_circle, np.pi, 2 * np.pi),
    "square": Template(_square, 1.7**2, 4 * 1.7),
    "triangle": Template(_triangle, 0.95 * 1.75, 2 * 0.95 + 2 * SLANT, drop=0.5 / 3),
    "cross": Template(_cross, 2 * 2 * 0.66 - 0.66**2, 8.0),
    "ring": Template(_ring, np.pi * (1 - 0.58**2), 2 * np.pi * 1.58),
}


def _agreement(coverage: np.ndarray, template: Template) -> float:
    """Intersection over union, in [0, 1], with the shape of the same area and centre of mass."""
    rows, columns = np.ogrid[: coverage.shape[0], : coverage.shape[1]]
    area = coverage.sum()
    radius = float(np.sqrt(area / template.area))
    x = columns - (coverage * columns).sum() / area
    y = rows - (coverage * rows).sum() / area + template.drop * radius
    drawn = np.clip(0.5 - template.edge(x, y, radius), 0, 1)
    return float(np.minimum(coverage, drawn).sum() / np.maximum(coverage, drawn).sum())
