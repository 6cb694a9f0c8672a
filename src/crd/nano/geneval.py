"""Which GenEval prompts of the nano world are for training with rewards, and which are held out from it.

Held out are what a picture shows, not wordings: both orders of two objects, and "A left of B" with "B right of A".

* single_object: all 5 prompts; the published weights of the training mixture give the task 0.
* two_object: 3 of 10 pairs (6 of 20 prompts). counting: one count per shape (5 of 15 prompts).
* colors, color_attr: the (colour, shape) pairs that the base model never saw either (6 of 30; 28 prompts of two).
* position: for each of 10 pairs one of its 4 arrangements (20 of 80 prompts).

Training takes every other prompt of two_object (14), counting (10), colors (24) and position (60), and so many of
color_attr (26) that it stands to position as published, 0.3 to 0.7. A set holds each prompt once, so counting's
published weight of 0.5 cannot be had: the world has too few such prompts.
"""

import itertools

from crd.nano.world import COUNT_WORDS, SHAPES, Split, color_pairs
from crd.rewards.geneval import prompts
from crd.rewards.geneval.prompts import Row
from crd.seeding import python_rng

PAIRS = tuple(itertools.combinations(SHAPES, 2))
HELD_OUT_TOGETHER = frozenset({("circle", "square"), ("triangle", "cross"), ("square", "ring")})
HELD_OUT_COUNTS = frozenset({("circle", 2), ("square", 3), ("triangle", 4), ("cross", 2), ("ring", 3)})
COLOR_ATTR_PROMPTS = 26  # in training


def geneval_rows(split: Split) -> list[Row]:
    """Distinct rows in a fixed order: shuffled for training; held out, one task after the other in turn.

    The first 36 that are held out are 5 of single_object and of counting (all there are), 6 of two_object and of
    colors (all), and 7 of position and of color_attr.
    """
    rng = python_rng(0, "nano-geneval", split)
    tasks = [_single_object, _two_object, _counting, _colors, _position, _color_attr]
    rows = [rng.sample(kept := task(split), len(kept)) for task in tasks]
    if split == "heldout":
        return [row for turn in itertools.zip_longest(*rows) for row in turn if row is not None]
    rows[-1] = rows[-1][:COLOR_ATTR_PROMPTS]
    mixture = list(itertools.chain(*rows))
    return rng.sample(mixture, len(mixture))


def _single_object(split: Split) -> list[Row]:
    return [prompts.single_object(shape) for shape in SHAPES] if split == "heldout" else []


def _two_object(split: Split) -> list[Row]:
    kept = [pair for pair in PAIRS if (pair in HELD_OUT_TOGETHER) == (split == "heldout")]
    return [prompts.two_object(*order) for pair in kept for order in (pair, pair[::-1])]


def _counting(split: Split) -> list[Row]:
    kept = [(s, n) for s in SHAPES for n in COUNT_WORDS if ((s, n) in HELD_OUT_COUNTS) == (split == "heldout")]
    return [prompts.counting(shape, count) for shape, count in kept]


def _colors(split: Split) -> list[Row]:
    return [prompts.colors(color, shape) for color, shape in color_pairs(split)]


def _position(split: Split) -> list[Row]:
    rows = []
    for number, (a, b) in enumerate(PAIRS):
        # in two wordings each: a left, b left, a above, b above
        arrangements = [(x, y, words) for words in (("left of", "right of"), ("above", "below")) for x, y in ((a, b), (b, a))]
        for index, (x, y, (relation, opposite)) in enumerate(arrangements):
            if (index == number % 4) == (split == "heldout"):
                rows += [prompts.position(x, relation, y), prompts.position(y, opposite, x)]
    return rows


def _color_attr(split: Split) -> list[Row]:
    pairs = itertools.permutations(color_pairs(split), 2)
    return [prompts.color_attr(c1, a, c2, b) for (c1, a), (c2, b) in pairs if c1 != c2 and a != b]
