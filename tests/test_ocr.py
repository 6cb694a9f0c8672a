"""The OCR reward: its formula on golden cases, and the real reader on pictures of the world."""

import random

import numpy as np
import pytest
from PIL import Image

from crd.nano import world
from crd.rewards.named import blueness, resolve_reward
from crd.rewards.ocr import OCRReward, exact_score, levenshtein, quoted_target, spelling_score


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "STAR"', "STAR"),
        ('"A b" and "C"', "A b"),
        ("no quotes", None),
        ('one " only', None),
        ('empty ""', None),
    ],
)
def test_quoted_target(prompt, target):
    assert quoted_target(prompt) == target


def test_curly_quotes_are_not_recognised():
    assert quoted_target("a sign that says “STAR”") is None


@pytest.mark.parametrize(
    ("recognised", "target", "score"),
    [
        ("STAR", "STAR", 1.0),
        ("s t a r", "STAR", 1.0),
        ("xxSTARyy", "STAR", 1.0),  # the substring rule, a hack channel that the exact form does not have
        ("STAB", "STAR", 0.75),
        ("STARR", "STAR", 1.0),
        ("TAR", "STAR", 0.75),
        ("", "STAR", 0.0),
        ("garbage longer than it", "STAR", 0.0),
        ("ab-c", "abc", 2 / 3),  # punctuation counts
    ],
)
def test_formula(recognised, target, score):
    assert spelling_score(recognised, target) == pytest.approx(score)
    assert exact_score(recognised, target) == float(recognised.replace(" ", "").lower() == target.lower())


def test_levenshtein_against_the_recursive_definition():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert levenshtein(a, b) == slow(a, b)


def signs(count=60):
    rng = random.Random(0)
    prompts = [world.draw_prompt("text", rng, "heldout") for _ in range(count)]
    return [world.render(p, rng) for p in prompts], [p.text for p in prompts]


def test_the_line_reader_reads_the_world():
    images, prompts = signs()
    scores = OCRReward(detect=False, exact=True)(images, prompts)
    assert np.mean(scores) >= 0.97
    wrong = OCRReward(detect=False)(images, prompts[1:] + prompts[:1])
    assert np.mean(wrong) < 0.4


def test_the_detecting_reader_reads_the_world_and_finds_text_anywhere():
    images, prompts = signs(4)
    assert np.mean(OCRReward(detect=True)(images, prompts)) >= 0.9
    page = Image.new("RGB", (256, 256), images[0].getpixel((0, 0)))
    page.paste(images[0], (180, 10))
    assert OCRReward(detect=True)([page], prompts[:1]) == [1.0]


def test_junk_scores_nothing():
    rng = np.random.default_rng(0)
    junk = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(8)] + [Image.new("RGB", (64, 64))]
    assert max(OCRReward(detect=False)(junk, ['a sign that says "STAR"'] * 9)) <= 0.25


def test_pictures_are_read_as_if_alone():
    """Of three sizes, two of them higher than a line, in one call."""
    (sign, other), prompts = signs(2)
    page, strip = Image.new("RGB", (256, 256), sign.getpixel((0, 0))), Image.new("RGB", (128, 64), sign.getpixel((0, 0)))
    page.paste(sign, (180, 10))
    strip.paste(other, (32, 0))
    images, prompts = [sign, page, strip, other], [prompts[0], prompts[0], prompts[1], prompts[1]]
    for order in (1, -1):
        assert OCRReward()(images[::order], prompts[::order]) == [1.0] * 4


def test_no_pictures():
    assert OCRReward()([], []) == []


def test_a_prompt_without_target_has_no_score():
    images, prompts = signs(2)
    assert OCRReward(detect=False)(images, [prompts[0], "a photo of a ring"])[1] is None


def test_blueness():
    flat = [Image.new("RGB", (4, 4), c) for c in [(0, 0, 255), (255, 255, 255), (100, 100, 151), (200, 0, 0)]]
    assert blueness(flat, [""] * 4) == pytest.approx([1.0, 0.0, 0.4, 0.0], abs=1e-6)


def test_named_rewards_resolve():
    assert resolve_reward("blue", {}) is blueness
    assert isinstance(resolve_reward("ocr", {"detect": False}), OCRReward)
