"""GenEval's prompts with their metadata, for any vocabulary; with the official one and seed 43, the official 553.

A row is ``{"tag", "include", "exclude" (counting only), "prompt"}`` in this order of keys.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crd.nano.world import article, plural
from crd.rewards.geneval.rules import RELATIONS, TAGS

Row = dict[str, Any]

#: the 80 classes of COCO in COCO's order, three of them renamed: computer mouse, tv remote, computer keyboard
COCO_CLASSES = tuple(
    " ".join(
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".split()
    ).split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Vocabulary:
    """What prompts may name; counts from 1 to 10."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    counts: tuple[int, ...] = (2, 3, 4)
    relations: tuple[str, ...] = RELATIONS
    never_colored: str | None = None  # this class gets no colour

    @property
    def colored_classes(self) -> tuple[str, ...]:
        return tuple(name for name in self.classes if name != self.never_colored)


OFFICIAL = Vocabulary(COCO_CLASSES, COLORS, never_colored="person")
OFFICIAL_SEED = 43
OFFICIAL_DRAWS = dict.fromkeys(TAGS, 100)  # single_object has 80 only, and repeated draws are dropped


# ------------------------------------------------------------------------------------ one row of each task


def single_object(name: str) -> Row:
    return {"tag": "single_object", "include": [_clause(name)], "prompt": f"a photo of {article(name)}"}


def two_object(a: str, b: str) -> Row:
    return {"tag": "two_object", "include": [_clause(a), _clause(b)], "prompt": f"a photo of {article(a)} and {article(b)}"}


def counting(name: str, count: int) -> Row:
    """Exactly ``count``: one more is excluded."""
    include, exclude = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
    return {
        "tag": "counting",
        "include": include,
        "exclude": exclude,
        "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
    }


def colors(color: str, name: str) -> Row:
    return {"tag": "colors", "include": [_clause(name, color)], "prompt": f"a photo of {article(color)} {name}"}


def position(a: str, relation: str, b: str) -> Row:
    """``a`` stands in the relation to ``b``; the clause of ``b`` comes first, since that of ``a`` points at it."""
    subject = {**_clause(a), "position": [relation, 0]}
    return {"tag": "position", "include": [_clause(b), subject], "prompt": f"a photo of {article(a)} {relation} {article(b)}"}


def color_attr(color_a: str, a: str, color_b: str, b: str) -> Row:
    text = f"a photo of {article(color_a)} {a} and {article(color_b)} {b}"
    return {"tag": "color_attr", "include": [_clause(a, color_a), _clause(b, color_b)], "prompt": text}


def _clause(name: str, color: str | None = None) -> Row:
    return {"class": name, "count": 1} | ({"color": color} if color else {})


# ------------------------------------------------------------------------------------------------ drawing


def generate(vocabulary: Vocabulary = OFFICIAL, draws: dict[str, int] = OFFICIAL_DRAWS, seed: int = OFFICIAL_SEED) -> list[Row]:
    """``draws[tag]`` rows of each task, repeated ones kept once, in the order of ``TAGS``.

    One stream of random numbers runs through all tasks, so that every number depends on all before it.
    single_object is drawn without replacement and gives at most one row per class.
    """
    rng = np.random.default_rng(seed)
    names = rng.choice(vocabulary.classes, size=min(draws["single_object"], len(vocabulary.classes)), replace=False)
    rows = [single_object(str(name)) for name in names]
    for tag, draw in _SAMPLERS.items():
        rows += [draw(vocabulary, rng) for _ in range(draws[tag])]
    return list({json.dumps(row): row for row in rows}.values())


def to_jsonl(rows: list[Row]) -> str:
    """One JSON object a line, as in the official ``evaluation_metadata.jsonl``."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _draw(values: tuple[Any, ...], rng: np.random.Generator) -> Any:
    return values[rng.integers(len(values))]


def _draw_two(values: tuple[str, ...], rng: np.random.Generator) -> Iterator[str]:
    return (values[i] for i in rng.choice(len(values), size=2, replace=False))


def _draw_two_object(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    return two_object(*_draw_two(vocabulary.classes, rng))


def _draw_counting(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    name = _draw(vocabulary.classes, rng)
    return counting(name, _draw(vocabulary.counts, rng))


def _draw_colors(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    name = _draw(vocabulary.colored_classes, rng)
    return colors(_draw(vocabulary.colors, rng), name)


def _draw_position(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    a, b = _draw_two(vocabulary.classes, rng)
    return position(a, _draw(vocabulary.relations, rng), b)


def _draw_color_attr(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    a, b = _draw_two(vocabulary.colored_classes, rng)
    color_a, color_b = _draw_two(vocabulary.colors, rng)
    return color_attr(color_a, a, color_b, b)


_SAMPLERS: dict[str, Callable[[Vocabulary, np.random.Generator], Row]] = {
    "two_object": _draw_two_object,
    "counting": _draw_counting,
    "colors": _draw_colors,
    "position": _draw_position,
    "color_attr": _draw_color_attr,
}
