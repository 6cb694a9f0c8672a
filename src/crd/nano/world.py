"""The nano world: a seeded generator of captioned 64x64 pictures.

Two kinds of picture share one caption vocabulary:

* shapes in GenEval's six tasks (single_object, two_object, counting, colors, position, color_attr),
  with GenEval's metadata format, and
* signs: a word of 3 to 5 capital letters, centered, of one letter size per length.

Everything is a function of the ``random.Random`` that is passed in. What the caption does not say
(tint of the background, ink, place, size) is drawn at random, so that pictures of one prompt differ.
Train and held-out prompts are disjoint in words and in (colour, shape) pairs. Tasks without either (single_object,
two_object, counting, position) have the same prompts in both; `crd.nano.geneval` splits those too.
"""

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crd.nano.words import HELD_OUT_WORDS, TRAIN_WORDS

SIZE = 64  # pixels, both sides
SUPERSAMPLING = 4  # pictures are drawn this much larger, then averaged down

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (40, 160, 60),
    "blue": (38, 80, 210),
    "yellow": (245, 205, 30),
    "purple": (145, 60, 185),
    "black": (20, 20, 22),
}
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
TINTS = ((244, 244, 240), (226, 236, 247), (250, 233, 212), (228, 243, 226))  # light backgrounds
INKS = ((18, 18, 20), (20, 40, 120), (130, 20, 25), (15, 85, 45))  # dark, for words

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr", "text"]
Split = Literal["train", "heldout"]
SHAPE_TASKS: tuple[Task, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

#: (colour, shape) pairs that no training caption or picture of a captioned colour contains.
HELD_OUT_PAIRS = frozenset(
    {("red", "ring"), ("green", "cross"), ("blue", "triangle"), ("yellow", "square"), ("purple", "circle"), ("black", "cross")}
)

#: pixels between letters and font size, by word length; whole multiples of a latent cell where possible
LETTER_PITCH = {3: (16, 24), 4: (16, 24), 5: (12, 19)}


@dataclass(frozen=True)
class Prompt:
    """A caption with what a judge needs to know about it (GenEval's format: tag, include, exclude; or word)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One shape of a scene; centre and diameter in pixels."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


# ---------------------------------------------------------------------------------------- prompts


def text_prompt(word: str) -> Prompt:
    """``a sign that says "STAR"``; raises ValueError for anything but 3 to 5 capital letters."""
    if not (word.isascii() and word.isalpha() and word.isupper() and len(word) in LETTER_PITCH):
        raise ValueError(f"the nano world writes words of 3 to 5 capital letters A-Z, got {word!r}")
    text = f'a sign that says "{word}"'
    return Prompt(text, {"tag": "text", "prompt": text, "word": word})


def color_pairs(split: Split) -> list[tuple[str, str]]:
    """(colour, shape) pairs that captions of this split may name."""
    return [(c, s) for c in COLORS for s in SHAPES if ((c, s) in HELD_OUT_PAIRS) == (split == "heldout")]


def draw_prompt(task: Task, rng: random.Random, split: Split = "train") -> Prompt:
    """One random prompt of a task, in GenEval's wording and metadata; the split matters to text, colors and color_attr alone."""
    if task == "text":
        return text_prompt(rng.choice(TRAIN_WORDS if split == "train" else HELD_OUT_WORDS))
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]] = []
    if task == "single_object":
        shape = rng.choice(SHAPES)
        text, include = f"a photo of {article(shape)}", [{"class": shape, "count": 1}]
    elif task == "two_object":
        a, b = rng.sample(SHAPES, 2)
        text = f"a photo of {article(a)} and {article(b)}"
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    elif task == "counting":
        shape, count = rng.choice(SHAPES), rng.randint(2, 4)
        text = f"a photo of {COUNT_WORDS[count]} {plural(shape)}"
        include, exclude = [{"class": shape, "count": count}], [{"class": shape, "count": count + 1}]
    elif task == "colors":
        color, shape = rng.choice(color_pairs(split))
        text, include = f"a photo of {article(color)} {shape}", [{"class": shape, "count": 1, "color": color}]
    elif task == "position":
        a, b = rng.sample(SHAPES, 2)
        relation = rng.choice(RELATIONS)
        text = f"a photo of {article(a)} {relation} {article(b)}"
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    else:
        (c1, a), (c2, b) = _two_pairs(rng, split)
        text = f"a photo of {article(c1)} {a} and {article(c2)} {b}"
        include = [{"class": a, "count": 1, "color": c1}, {"class": b, "count": 1, "color": c2}]
    metadata = {"tag": task, "prompt": text, "include": include}
    if exclude:
        metadata["exclude"] = exclude
    return Prompt(text, metadata)


def _two_pairs(rng: random.Random, split: Split) -> tuple[tuple[str, str], tuple[str, str]]:
    first = rng.choice(color_pairs(split))
    second = rng.choice([p for p in color_pairs(split) if p[0] != first[0] and p[1] != first[1]])
    return first, second


# --------------------------------------------------------------------------------------- pictures


def layout(metadata: dict[str, Any], rng: random.Random) -> list[Item]:
    """Places the shapes that the metadata asks for, without overlap and in the asked relation.

    Colours that the caption leaves open are drawn from the pairs that training captions may name, so
    that a held-out pair is never seen in training by accident.
    """
    wanted = [(entry["class"], entry.get("color")) for entry in metadata["include"] for _ in range(entry["count"])]
    relation = next((entry["position"][0] for entry in metadata["include"] if "position" in entry), None)
    low, high = {1: (26, 38), 2: (20, 25), 3: (17, 21), 4: (16, 19)}[len(wanted)]
    while True:
        items = []
        for shape, color in wanted:
            diameter = rng.uniform(low, high)
            margin = diameter / 2 + 2
            x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
            open_colors = [c for c, s in color_pairs("train") if s == shape]
            items.append(Item(shape, color or rng.choice(open_colors), x, y, diameter))
        if _apart(items) and (relation is None or _related(items[1], relation, items[0])):
            return items


def _apart(items: list[Item]) -> bool:
    """True if no two bounding circles (with a small gap) overlap."""
    return all(
        (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > ((a.diameter + b.diameter) / 2 + 4) ** 2
        for i, a in enumerate(items)
        for b in items[:i]
    )


def _related(a: Item, relation: str, b: Item) -> bool:
    """True if a stands in the relation to b, clearly: the other axis differs less."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(across) < 0.6 * abs(along) and (along < 0) == (relation in ("left of", "above"))


def render(prompt: Prompt, rng: random.Random) -> Image.Image:
    """A 64x64 RGB picture that the prompt describes."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, rng.choice(TINTS))
    pen = ImageDraw.Draw(canvas)
    if prompt.metadata["tag"] == "text":
        _write(pen, prompt.metadata["word"], rng.choice(INKS))
    else:
        for item in layout(prompt.metadata, rng):
            draw_item(pen, item)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # DejaVu Sans Mono comes inside matplotlib's wheel: the same glyphs on every machine
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(path, pixels * SUPERSAMPLING)


def _write(pen: ImageDraw.ImageDraw, word: str, ink: tuple[int, int, int]) -> None:
    pitch, pixels = LETTER_PITCH[len(word)]
    left = (SIZE - pitch * len(word)) / 2
    for index, letter in enumerate(word):
        center = ((left + pitch * (index + 0.5)) * SUPERSAMPLING, SIZE / 2 * SUPERSAMPLING)
        pen.text(center, letter, font=_font(pixels), fill=ink, anchor="mm")


def draw_item(pen: ImageDraw.ImageDraw, item: Item) -> None:
    """Draws one shape on a canvas that is ``SUPERSAMPLING`` times larger than the picture."""
    x, y, r = (value * SUPERSAMPLING for value in (item.x, item.y, item.diameter / 2))
    color = COLORS[item.color]
    if item.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif item.shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=round(0.42 * r))
    elif item.shape == "square":
        s = 0.85 * r
        pen.rectangle((x - s, y - s, x + s, y + s), fill=color)
    elif item.shape == "triangle":
        pen.polygon([(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)], fill=color)
    else:  # cross
        w = 0.33 * r
        pen.rectangle((x - r, y - w, x + r, y + w), fill=color)
        pen.rectangle((x - w, y - r, x + w, y + r), fill=color)


def to_array(pictures: list[Image.Image]) -> np.ndarray:
    """PIL pictures to a float32 array (N, 3, 64, 64) in [-1, 1], the range of the VAE."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return stacked.transpose(0, 3, 1, 2) / 127.5 - 1.0


def captions_vocabulary() -> list[str]:
    """Every word that a caption of this world can contain, quotes and capital letters included."""
    words = ["a", "an", "photo", "of", "and", "sign", "that", "says", '"', *COUNT_WORDS.values(), *COLORS]
    words += [w for relation in RELATIONS for w in relation.split() if w != "of"]
    words += [form for shape in SHAPES for form in (shape, plural(shape))]
    return words + [chr(ord("A") + i) for i in range(26)]
