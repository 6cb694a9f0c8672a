"""The nano world: seeded, disjoint, and its pictures show what the captions say."""

import random

import numpy as np
import pytest

from crd.nano import world
from crd.nano.base import make_tokenizer
from crd.nano.build import random_word
from crd.nano.pretrain import CaptionNoise
from crd.prompts import load_prompts

TASKS = [*world.SHAPE_TASKS, "text"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_picture_is_a_function_of_its_seed(task, split):
    def draw(seed):
        rng = random.Random(seed)
        prompt = world.draw_prompt(task, rng, split)
        return prompt, np.asarray(world.render(prompt, rng))

    (a, x), (b, y), (_, z) = draw(1), draw(1), draw(2)
    assert a == b and np.array_equal(x, y) and not np.array_equal(x, z)
    assert x.shape == (64, 64, 3) and x.dtype == np.uint8
    assert a.metadata["tag"] == task and a.metadata["prompt"] == a.text


def test_splits_are_disjoint():
    assert not set(world.TRAIN_WORDS) & set(world.HELD_OUT_WORDS)
    assert all(3 <= len(w) <= 5 and w.isupper() for w in (*world.TRAIN_WORDS, *world.HELD_OUT_WORDS))
    assert not set(world.color_pairs("train")) & set(world.color_pairs("heldout"))
    assert len(world.color_pairs("train")) + len(world.color_pairs("heldout")) == len(world.COLORS) * len(world.SHAPES)
    rng = random.Random(0)
    assert not {random_word(rng) for _ in range(20_000)} & set(world.HELD_OUT_WORDS)


def test_training_pictures_never_show_a_held_out_pair():
    rng = random.Random(0)
    for _ in range(300):
        prompt = world.draw_prompt(rng.choice(world.SHAPE_TASKS), rng, "train")
        for item in world.layout(prompt.metadata, rng):
            assert (item.color, item.shape) not in world.HELD_OUT_PAIRS


@pytest.mark.parametrize("task", world.SHAPE_TASKS)
def test_layouts_keep_what_the_metadata_asks(task):
    rng = random.Random(0)
    for _ in range(50):
        prompt = world.draw_prompt(task, rng)
        items = world.layout(prompt.metadata, rng)
        wanted = [(e["class"], e.get("color")) for e in prompt.metadata["include"] for _ in range(e["count"])]
        assert [i.shape for i in items] == [shape for shape, _ in wanted]
        assert all(color in (None, item.color) for item, (_, color) in zip(items, wanted, strict=True))
        assert all(i.diameter / 2 <= min(i.x, i.y, 64 - i.x, 64 - i.y) for i in items)
        if task == "position":
            (relation, other), (b, a) = prompt.metadata["include"][1]["position"], items
            assert other == 0
            offset = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
            assert offset > 0
            assert f"{world.article(a.shape)} {relation} {world.article(b.shape)}" in prompt.text


def test_the_asked_colour_is_on_the_picture():
    rng = random.Random(0)
    for _ in range(40):
        prompt = world.draw_prompt("colors", rng)
        color = np.array(world.COLORS[prompt.metadata["include"][0]["color"]])
        pixels = np.asarray(world.render(prompt, rng)).reshape(-1, 3).astype(int)
        assert (abs(pixels - color).max(1) <= 3).sum() > 60


def test_bad_words_are_refused():
    for word in ("HI", "TOOLONG", "star", "A1B", "ÄÖÜ"):
        with pytest.raises(ValueError, match="3 to 5 capital letters"):
            world.text_prompt(word)


def test_tokenizer_knows_every_caption_and_marks_the_rest():
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    for task in TASKS:
        for split in ("train", "heldout"):
            ids = tokenizer(world.draw_prompt(task, rng, split).text).input_ids
            assert tokenizer.unk_token_id not in ids and len(ids) <= tokenizer.model_max_length
    assert tokenizer.tokenize('says "STAR"') == ["says", '"', "S", "T", "A", "R", '"']
    assert tokenizer.unk_token_id in tokenizer("a photo of a zeppelin").input_ids


def test_caption_noise_replaces_within_a_kind_at_its_rate():
    import torch

    noise = CaptionNoise.make({"x": 0, "A": 1, "B": 2, "red": 3, "blue": 4}, [(0.5, ["A", "B"]), (0.2, ["red", "blue"])])
    tokens = torch.tensor([[0, 1, 3]]).repeat(20_000, 1)
    noisy = noise(tokens, torch.Generator().manual_seed(0))
    assert (noisy[:, 0] == 0).all() and set(noisy[:, 1].tolist()) == {1, 2} and set(noisy[:, 2].tolist()) == {3, 4}
    assert (noisy[:, 1] == 2).float().mean() == pytest.approx(0.25, abs=0.02)  # half are drawn again, half of those the same
    assert (noisy[:, 2] == 4).float().mean() == pytest.approx(0.10, abs=0.02)


def test_prompt_sets_of_the_world():
    train, held_out = load_prompts("nano/text/train"), load_prompts("nano/text/heldout")
    assert not set(train.texts) & set(held_out.texts)
    assert len(train) == len(world.TRAIN_WORDS)
    epoch = [g.index for e in range(4) for g in train.epoch(0, e, 94)]
    assert sorted(epoch) == list(range(376))  # four epochs of 94 are one permutation
    assert [g.index for g in train.epoch(0, 1, 94)] == epoch[94:188]
