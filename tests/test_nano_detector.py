"""The nano world's detector: its own pictures are read exactly, other pictures are not taken for shapes."""

import random
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from crd.errors import CRDError
from crd.nano import world
from crd.nano.detector import NanoDetector, detect, label_components
from crd.rewards.geneval import GenEvalReward, judge
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet

PER_TASK = 90  # and split


def scenes():
    """(prompt, items, picture) of all tasks and both splits."""
    for task in world.SHAPE_TASKS:
        for split in ("train", "heldout"):
            for number in range(PER_TASK):
                prompt = world.draw_prompt(task, random.Random(f"{task} {split} {number}"), split)
                again = random.Random(number)
                picture = world.render(prompt, random.Random(number))
                again.choice(world.TINTS)  # as render does before it lays out
                yield prompt, world.layout(prompt.metadata, again), picture


@pytest.fixture(scope="module")
def drawn():
    return list(scenes())


def names(detections, threshold=0.9):
    return sorted((d.name, str(d.color)) for d in detections if d.score > threshold)


def reading(picture, threshold=0.9):
    return names(detect(picture), threshold)


def placed(items):
    return sorted((item.shape, item.color) for item in items)


def exact_rate(scenes, change):
    return np.mean([reading(change(picture)) == placed(items) for _, items, picture in scenes])


def test_own_pictures_are_read_exactly(drawn):
    assert len(drawn) >= 1000
    found = [detect(picture) for _, _, picture in drawn]
    assert np.mean([names(d) == placed(items) for d, (_, items, _) in zip(found, drawn, strict=True)]) >= 0.99
    judged = [judge(d, prompt.metadata) for d, (prompt, _, _) in zip(found, drawn, strict=True)]
    assert np.mean([j.correct and j.strict and j.score == 1 for j in judged]) >= 0.99


def test_boxes(drawn):
    """Centres within a pixel of where the world put the shape, sizes within two."""
    for _, items, picture in drawn[::10]:
        boxes = [d.box for d in detect(picture)]
        for item in items:
            if item.shape == "triangle":  # lies off the centre of its circle
                continue
            left, top, right, bottom = min(boxes, key=lambda b: abs(b[0] + b[2] - 2 * item.x) + abs(b[1] + b[3] - 2 * item.y))
            assert abs((left + right) / 2 - item.x) < 1 and abs((top + bottom) / 2 - item.y) < 1
            side = 0.85 * item.diameter if item.shape == "square" else item.diameter
            assert abs(right - left - side) < 2 and abs(bottom - top - side) < 2


def noisy(sigma):
    rng = np.random.default_rng(0)

    def change(picture):
        array = np.asarray(picture) + rng.normal(0, sigma, (64, 64, 3))
        return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))

    return change


def blurred(sigma):
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(sigma))


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        (blurred(0.5), 0.99, 1),
        (blurred(1), 0.9, 1),
        (blurred(2), 0, 0.3),
        (noisy(10), 0.95, 1),
        (noisy(25), 0.3, 0.7),
        (noisy(50), 0, 0.1),
    ],
    ids=["blur 0.5", "blur 1", "blur 2", "noise 10", "noise 25", "noise 50"],
)
def test_degraded_pictures(drawn, change, least, most):
    """Read at counting's threshold 0.9; what is hard to see is not read."""
    assert least <= exact_rate(drawn[::9], change) <= most


def test_confidence_falls_with_the_shape():
    """A circle that turns into a square and back: sure at both ends, unsure between."""
    circle, square = (Image.new("RGB", (64, 64), world.TINTS[0]) for _ in range(2))
    ImageDraw.Draw(circle).ellipse((18, 18, 45, 45), fill=world.COLORS["red"])
    ImageDraw.Draw(square).rectangle((18, 18, 45, 45), fill=world.COLORS["red"])
    halfway = Image.new("RGB", (64, 64), world.TINTS[0])
    ImageDraw.Draw(halfway).rounded_rectangle((18, 18, 45, 45), radius=8, fill=world.COLORS["red"])
    (first,), (second,), (between,) = detect(circle), detect(square), detect(halfway)
    assert (first.name, second.name) == ("circle", "square") and min(first.score, second.score) > 0.99 > between.score


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (64, 64), world.TINTS[1]),
        Image.new("RGB", (64, 64), "black"),
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)),
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64)),
    ],
    ids=["blank", "black", "noise", "clouds"],
)
def test_nothing_to_see(picture):
    assert reading(picture, threshold=0.3) == []


def test_signs_hold_no_shapes():
    """Not even the O a ring."""
    rng = random.Random(0)
    for word in rng.sample(list(world.TRAIN_WORDS), 100):
        assert reading(world.render(world.text_prompt(word), rng), threshold=0.3) == [], word


def two_shapes(first, second, color="red"):
    picture = Image.new("RGB", (64 * 4, 64 * 4), world.TINTS[0])
    pen = ImageDraw.Draw(picture)
    world.draw_item(pen, world.Item(first, color, 18, 32, 20))
    world.draw_item(pen, world.Item(second, color, 46, 32, 20))
    return picture.resize((64, 64), Image.Resampling.BOX)


def test_a_second_object_counts():
    row = {"tag": "counting", "include": [{"class": "ring", "count": 1}], "exclude": [{"class": "ring", "count": 2}]}
    assert judge(detect(two_shapes("ring", "cross")), row).correct
    assert not judge(detect(two_shapes("ring", "ring")), row).correct


def test_wrong_and_foreign_colors():
    row = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}]}
    for color in world.COLORS:
        assert judge(detect(two_shapes("ring", "cross", color)), row).correct == (color == "red")
    canvas = Image.new("RGB", (64, 64), world.TINTS[0])
    ImageDraw.Draw(canvas).ellipse((18, 18, 45, 45), fill=(230, 130, 190))  # pink is no colour of the world
    assert [(d.name, d.color) for d in detect(canvas)] == [("circle", None)]
    for part, color in ((10, None), (4, "red")):  # of 28 rows; 10 are too many to call the square red
        ImageDraw.Draw(canvas).rectangle((18, 18, 45, 45), fill=world.COLORS["red"])
        ImageDraw.Draw(canvas).rectangle((18, 18, 45, 17 + part), fill=world.COLORS["blue"])
        assert [(d.name, d.color) for d in detect(canvas)] == [("square", color)]


def test_another_size():
    with pytest.raises(CRDError, match=r"64x64 pixels, got 128x64"):
        NanoDetector()([Image.new("RGB", (128, 64))])


def test_labels_against_flood_fill():
    rng = np.random.default_rng(1)
    for density in (0.1, 0.4, 0.6, 0.8):
        mask = rng.random((20, 23)) < density
        labels, number = label_components(mask), 0
        expected = np.zeros(mask.shape, dtype=int)
        for start in zip(*np.nonzero(mask), strict=True):
            if expected[start]:
                continue
            number += 1
            stack = [start]
            while stack:
                y, x = stack.pop()
                if 0 <= y < 20 and 0 <= x < 23 and mask[y, x] and not expected[y, x]:
                    expected[y, x] = number
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert (labels == expected).all()
    assert label_components(np.zeros((3, 3), dtype=bool)).max() == 0


# ------------------------------------------------------------------------------------------------ reward


def test_reward_through_the_reward_set(drawn):
    """Own pictures score 1; a prompt that is not GenEval's gets no score, and costs nothing."""
    chosen = drawn[::40]
    pictures = [picture for _, _, picture in chosen] + [Image.new("RGB", (64, 64), "white")]
    prompts = [prompt for prompt, _, _ in chosen] + [world.text_prompt("STAR")]
    rewards = RewardSet(
        [NamedReward(name, resolve_reward(name, {})) for name in ("geneval", "geneval_correct", "geneval_strict")]
    )
    scores = rewards.score(pictures, [p.text for p in prompts], [p.metadata for p in prompts])
    for values in scores.parts.values():
        assert (values[:-1] == 1).all() and np.isnan(values[-1])
    blank = [Image.new("RGB", (64, 64), "white")] * len(prompts)
    scores = rewards.score(blank, [p.text for p in prompts], [p.metadata for p in prompts])
    assert all((values[:-1] == 0).all() for values in scores.parts.values())


def test_reward_without_any_metadata():
    assert GenEvalReward(NanoDetector())([Image.new("RGB", (64, 64))] * 2, ["a", "b"]) == [None, None]


def test_modes_and_options():
    rings = two_shapes("ring", "ring")
    row = {"tag": ["two_object"], "include": [[{"class": "cross", "count": 1}, {"class": "ring", "count": 1}]]}
    four = Image.new("RGB", (64, 64), world.TINTS[0])
    for top in (2, 34):
        four.paste(rings.crop((4, 18, 60, 46)), (4, top))
    assert len(detect(four)) == 4
    assert resolve_reward("geneval", {})([four], ["x"], **row) == [0]
    assert resolve_reward("geneval", {"mode": "reference"})([four], ["x"], **row) == [-1]  # (0 - 2) / 2: no cross, four rings
    with pytest.raises(CRDError, match="mode 'official'"):
        resolve_reward("geneval", {"mode": "official"})
    with pytest.raises(CRDError, match="options"):
        resolve_reward("geneval", {"threshold": 0.5})
    with pytest.raises(CRDError, match="output 'reward'"):
        GenEvalReward(NanoDetector(), "reward")


def test_reward_with_unknown_tag():
    with pytest.raises(CRDError, match="tag None"):
        GenEvalReward(NanoDetector())([Image.new("RGB", (64, 64))], ["x"], include=[[{"class": "ring", "count": 1}]])


def test_speed(drawn):
    began = time.process_time()
    NanoDetector()([picture for _, _, picture in drawn[:200]])
    assert (time.process_time() - began) / 200 < 0.02  # seconds; about 0.003 here, the rest is for slow machines
