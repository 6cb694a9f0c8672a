"""GenEval's prompt generator: the official 553, and any vocabulary."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest

from crd.nano import world
from crd.rewards.geneval import prompts
from crd.rewards.geneval.prompts import COCO_CLASSES, OFFICIAL, Vocabulary, generate, to_jsonl
from crd.rewards.geneval.rules import TAGS, check_metadata

# Prompts by their place among the 553, taken from the captions of the benchmark's published human annotations
# (annotations_sdv2.csv), which number them; they span all six tasks.
PUBLISHED = {
    14: "a photo of a parking meter",
    33: "a photo of a train",
    35: "a photo of a chair",
    48: "a photo of an orange",
    53: "a photo of a toothbrush",
    103: "a photo of a broccoli and a parking meter",
    108: "a photo of a skateboard and a sink",
    156: "a photo of a computer keyboard and a cell phone",
    159: "a photo of a tv and a cell phone",
    171: "a photo of a baseball glove and a carrot",
    208: "a photo of three zebras",
    220: "a photo of four donuts",
    232: "a photo of two trucks",
    240: "a photo of three pizzas",
    252: "a photo of three cows",
    316: "a photo of a yellow orange",
    328: "a photo of a white teddy bear",
    345: "a photo of a green bus",
    349: "a photo of a blue book",
    352: "a photo of a red cake",
    371: "a photo of a bus below a toothbrush",
    417: "a photo of a bicycle above a parking meter",
    421: "a photo of a chair left of a zebra",
    469: "a photo of a black kite and a green bear",
}


def test_official_prompts():
    rows = generate()
    assert len({row["prompt"] for row in rows}) == len(rows) == 553
    assert list(Counter(row["tag"] for row in rows).items()) == list(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    assert {place: rows[place]["prompt"] for place in PUBLISHED} == PUBLISHED
    # Every prompt depends on all draws before it, so the places above fix the stream up to the last of them; the
    # counts after duplicates fix it to its end. Key order and separators follow lines quoted in public documents.
    digest = hashlib.sha256(to_jsonl(rows).encode()).hexdigest()
    assert digest == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            prompts.single_object("bench"),
            '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
        ),
        (
            prompts.counting("clock", 2),
            '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
            '"exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}',
        ),
        (
            prompts.position("cat", "right of", "tv remote"),
            '{"tag": "position", "include": [{"class": "tv remote", "count": 1}, '
            '{"class": "cat", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a cat right of a tv remote"}',
        ),
    ],
)
def test_lines_as_published(row, line):
    assert to_jsonl([row]) == line + "\n"


def test_wording():
    assert prompts.counting("skis", 3)["prompt"] == "a photo of three skises"
    assert prompts.counting("knife", 4)["prompt"] == "a photo of four knifes"
    assert prompts.colors("orange", "cat")["prompt"] == "a photo of an orange cat"
    assert prompts.two_object("oven", "umbrella")["prompt"] == "a photo of an oven and an umbrella"


def test_classes():
    assert len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[39], COCO_CLASSES[79]) == ("person", "bottle", "toothbrush")
    assert all(name == " ".join(name.split()) for name in COCO_CLASSES)


def test_a_vocabulary_of_our_own():
    vocabulary = Vocabulary(
        ("ox", "bee", "cat", "dog"), ("red", "azure"), counts=(2, 5), relations=("above",), never_colored="cat"
    )
    rows = generate(vocabulary, dict.fromkeys(TAGS, 300), seed=1)
    assert Counter(row["tag"] for row in rows) == {
        "single_object": 4,
        "two_object": 4 * 3,
        "counting": 4 * 2,
        "colors": 3 * 2,
        "position": 4 * 3,
        "color_attr": 3 * 2 * 2,  # ordered classes and ordered colours, both without repetition
    }
    assert not any("color" in clause and clause["class"] == "cat" for row in rows for clause in row["include"])
    for row in rows:
        check_metadata(row)
    assert rows == generate(vocabulary, dict.fromkeys(TAGS, 300), seed=1)
    assert rows != generate(vocabulary, dict.fromkeys(TAGS, 300), seed=2)


def test_draws_are_uniform():
    draws = {**dict.fromkeys(TAGS, 0), "counting": 20_000}
    rng_rows = generate(OFFICIAL, draws, seed=3)
    assert Counter(row["include"][0]["count"] for row in rng_rows) == {2: 80, 3: 80, 4: 80}  # all there are
    # against an independent stream: the first class of an empty single_object draw is the stream's first number
    expected = int(np.random.default_rng(3).integers(80))
    assert rng_rows[0]["include"][0]["class"] == COCO_CLASSES[expected]


def test_the_nano_world_words_its_prompts_alike():
    """world.draw_prompt and the rows here are one format: for every drawn prompt the row of the same content is equal."""
    builders = {
        "single_object": lambda a: prompts.single_object(a["class"]),
        "two_object": lambda a, b: prompts.two_object(a["class"], b["class"]),
        "counting": lambda a: prompts.counting(a["class"], a["count"]),
        "colors": lambda a: prompts.colors(a["color"], a["class"]),
        "position": lambda b, a: prompts.position(a["class"], a["position"][0], b["class"]),
        "color_attr": lambda a, b: prompts.color_attr(a["color"], a["class"], b["color"], b["class"]),
    }
    for task in world.SHAPE_TASKS:
        rng = random.Random(task)
        for _ in range(50):
            drawn = world.draw_prompt(task, rng)
            assert builders[task](*drawn.metadata["include"]) == drawn.metadata
            assert drawn.metadata == json.loads(json.dumps(drawn.metadata))
