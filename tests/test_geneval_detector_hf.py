"""GenEval on transformers: figures of mmdetection itself, naive loops, another library's resize, and tiny models end to end.

tests/data/mmdet_mask2former.json was made with mmdetection 2.28.2 and mmcv 1.7.2: the configuration that GenEval runs, with few
and narrow layers, the weights of :func:`weight` (cls_embed.weight times 4), and the pictures of :func:`picture`. It holds all
names and shapes of the checkpoint, logits for one random input, and the first objects of its whole test pipeline.
"""

import json
import logging
import math
import pickle
import random
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from preference_models import clip_tokenizer
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from crd.errors import CRDError
from crd.nano.world import draw_prompt, render
from crd.rewards import resolve_reward
from crd.rewards.geneval import mask2former
from crd.rewards.geneval.clip_colors import ClipColors, object_alone
from crd.rewards.geneval.convert_mmdet import convert_checkpoint, detector_state, patches_outside
from crd.rewards.geneval.mask2former import (
    Mask2FormerDetector,
    enlarged,
    load_model,
    prepare,
    read_instances,
    resized_size,
    tight_box,
)
from crd.rewards.geneval.prompts import COCO_CLASSES, COLORS, color_attr, colors, counting, position, single_object
from crd.rewards.geneval.reward import GenEvalReward
from crd.rewards.preference.placement import make_placement

GOLDEN = json.loads((Path(__file__).parent / "data" / "mmdet_mask2former.json").read_text())
CPU = torch.device("cpu")
APPLE, CUP = COCO_CLASSES.index("apple"), COCO_CLASSES.index("cup")


# ------------------------------------------------------------------------------------------- tiny models


def weight(name, shape):
    """A weight of the checkpoint: a function of its name."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "query" in name:
        return drawn
    if len(shape) > 1:
        return drawn * drawn[0].numel() ** -0.5
    return 1 + 0.2 * drawn if name.endswith("weight") else 0.3 * drawn


def picture(height, width):
    y, x = np.mgrid[:height, :width] / 10
    waves = [np.sin(x + 2 * np.cos(y)), np.cos(2 * x * y / 9), np.sin(y - x / 2)]
    return Image.fromarray(np.stack([127.5 + 127 * wave for wave in waves], -1).round().astype(np.uint8))


def nano_pictures(count):
    rng = random.Random(0)
    return [render(draw_prompt("counting", rng), rng) for _ in range(count)]


@pytest.fixture(scope="module")
def mmdet_state():
    state = {name: weight(name, shape) for name, shape in GOLDEN["shapes"].items()}
    state["panoptic_head.cls_embed.weight"] *= 4
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, mmdet_state):
    """A checkpoint as mmdetection writes it."""
    path = tmp_path_factory.mktemp("mmdet") / "tiny.pth"
    torch.save({"meta": {"CLASSES": COCO_CLASSES, "epoch": 50}, "state_dict": mmdet_state}, path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("converted") / "detector"
    convert_checkpoint(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory):
    """A random Mask2Former that sees apples, and fewer cups, everywhere."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=4,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=2,
        mlp_ratio=1,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    sizes |= {"encoder_feedforward_dim": 8, "dim_feedforward": 8, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_attention_heads=2, num_queries=6, num_labels=80, **sizes)
    model = Mask2FormerForUniversalSegmentation(config)
    nn.init.normal_(model.model.transformer_module.queries_features.weight)
    nn.init.normal_(model.class_predictor.weight, std=0.2)
    model.class_predictor.bias.data[[APPLE, CUP]] = torch.tensor([7.0, 6.5])
    folder = tmp_path_factory.mktemp("detector") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place():
    return make_placement("geneval", "cpu", "float32", 2)


@pytest.fixture(scope="module")
def clip_colors(tiny_clip, place):
    return ClipColors(str(tiny_clip), place)


# ------------------------------------------------------------------------------- pictures to the network


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (800, 800)),
        (1024, 1024, (800, 800)),
        (480, 640, (800, 1067)),
        (640, 480, (1067, 800)),
        (300, 1000, (400, 1333)),
        (1000, 300, (1333, 400)),
    ],
)
def test_resized_size(height, width, expected):
    assert resized_size(height, width) == expected


def opencv_pixels(image):
    """mmdetection's test pipeline on OpenCV: resize 8 bits, pad with grey 128, normalise."""
    height, width = resized_size(image.height, image.width)
    resized = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
    padded = cv2.copyMakeBorder(resized, 0, -height % 32, 0, -width % 32, cv2.BORDER_CONSTANT, value=(128, 128, 128))
    normalised = (padded - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    return torch.from_numpy(normalised).float().permute(2, 0, 1)[None]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (90, 64), (1000, 1100)])
def test_prepared_as_with_opencv(height, width):
    image = picture(height, width)
    pixels, resized = prepare([image], CPU)
    expected = opencv_pixels(image)
    assert pixels.shape == expected.shape and resized == resized_size(height, width)
    steps = ((pixels - expected) * torch.tensor(mask2former.STD).view(3, 1, 1)).abs()
    assert steps.max() < 1.1  # OpenCV interpolates in fixed point: one step of 8 bits
    assert steps.mean() < 0.15
    outside = torch.ones(pixels.shape[2:], dtype=torch.bool)
    outside[: resized[0], : resized[1]] = False
    assert (steps[..., outside] < 1e-3).all()


# -------------------------------------------------------------------------------- the network to objects


def naive_bilinear(values, height, width):
    """Half-pixel centres, edges repeated, one output pixel after the other."""
    rows, columns = values.shape
    out = np.zeros((height, width))
    for i in range(height):
        y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
        for j in range(width):
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
            lower = values[bottom, left] * (1 - (x - left)) + values[bottom, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def naive_instances(classes, masks, padded, resized, original):
    found = []
    for logits, small in zip(classes.double().numpy(), masks.double().numpy(), strict=True):
        exponentials = [math.exp(value) for value in logits]
        full = naive_bilinear(naive_bilinear(small, *padded)[: resized[0], : resized[1]], *original)
        inside = [(y, x) for y in range(original[0]) for x in range(original[1]) if full[y, x] > 0]
        quality = sum(1 / (1 + math.exp(-full[y, x])) for y, x in inside) / (len(inside) + 1e-6)
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if inside else (0, 0, 0, 0)
        for label in range(len(logits) - 1):
            probability = exponentials[label] / sum(exponentials)
            found.append((probability, label, probability * quality, box, set(inside)))
    return sorted(found, key=lambda f: -f[0])[:100]


def test_instances_against_a_naive_loop():
    """More pairs than are looked at, a query of several classes, an empty mask, padding on both sides."""
    rng = torch.Generator().manual_seed(0)
    classes, masks = 2 * torch.randn(15, 9, generator=rng), 3 * torch.randn(15, 4, 5, generator=rng)
    masks[3] = -1.0
    sizes = ((16, 20), (14, 17), (21, 23))
    found = read_instances(classes, masks, *sizes)
    expected = naive_instances(classes, masks, *sizes)
    assert len(found) == len(expected) == 100 < 15 * 8
    for instance, (_, label, score, box, inside) in zip(found, expected, strict=True):
        assert instance.label == label
        assert instance.score == pytest.approx(score, abs=1e-5)
        assert instance.box == box
        assert {(int(y), int(x)) for y, x in np.argwhere(instance.mask)} == inside
    assert any(instance.score == 0 and instance.box == (0, 0, 0, 0) for instance in found)


def test_a_floor_keeps_all_scores_above_it():
    rng = torch.Generator().manual_seed(1)
    classes, masks = 3 * torch.randn(60, 9, generator=rng), 20 * torch.randn(60, 4, 4, generator=rng)  # masks without doubt
    arguments = classes, masks, (16, 16), (16, 16), (9, 9)
    whole, above = ({(i.label, i.score) for i in read_instances(*arguments, floor=floor)} for floor in (0, 0.3))
    assert {found for found in whole if found[1] > 0.3} == {found for found in above if found[1] > 0.3}
    assert 0 < len(above) < len(whole)
    assert read_instances(*arguments, floor=1.0) == []


def test_tight_box():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    assert tight_box(mask) == (0, 0, 0, 0)
    mask[2, 3] = True
    assert tight_box(mask) == (3, 2, 4, 3)
    mask[4, 6] = True
    assert tight_box(mask) == (3, 2, 7, 5)


def test_masks_lose_the_padding_before_they_fit_the_picture():
    masks = torch.cat([torch.full((1, 4, 2), 5.0), torch.full((1, 4, 2), -5.0)], -1)  # the right half is padding
    assert (enlarged(masks, (16, 16), (16, 7), (30, 13)) > 0).all()


# ---------------------------------------------------------------------- mmdetection's weights and figures


def test_logits_are_mmdetections(converted, place):
    model = load_model(str(converted), place)
    pixels = torch.randn((1, 3, 256, 288), generator=torch.Generator().manual_seed(0))
    output = model(pixels)
    for logits, name in (
        (output.class_queries_logits[0, :, ::4], "class_logits"),
        (output.masks_queries_logits[0, :, ::16, ::16], "mask_logits"),
    ):
        torch.testing.assert_close(logits, torch.tensor(GOLDEN[name]), atol=5e-5, rtol=0)
        assert logits.std() > 1  # so that 5e-5 is little


@pytest.mark.parametrize("case", GOLDEN["instances"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_objects_are_mmdetections(converted, place, case):
    """Exactly, from OpenCV's pixels; nearly, from our own."""
    model, image = load_model(str(converted), place), picture(case["height"], case["width"])
    for pixels, score, area in ((opencv_pixels(image), 5e-5, 0), (prepare([image], CPU)[0], 2e-3, 8)):
        assert list(pixels.shape[2:]) == case["pad_shape"]
        output = model(pixels)
        sizes = tuple(case["pad_shape"]), tuple(case["img_shape"]), (case["height"], case["width"])
        found = read_instances(output.class_queries_logits[0], output.masks_queries_logits[0], *sizes)
        strongest = sorted(found, key=lambda instance: -instance.score)
        for expected in case["first"]:
            label, expected_score, box, pixels_inside = expected
            assert any(
                instance.label == label
                and abs(instance.score - expected_score) < score
                and np.abs(np.subtract(instance.box, box)).max() <= min(area, 1)
                and abs(int(instance.mask.sum()) - pixels_inside) <= area
                for instance in strongest[: len(case["first"])]
            ), expected


def test_merged_patches_in_the_order_of_unfold():
    """Norm and reduction of nn.Unfold's patches are those of Swin's with permuted weights; another order is not."""
    torch.manual_seed(0)
    picture_, norm, reduce = torch.randn(2, 6, 8, 10), nn.LayerNorm(24), nn.Linear(24, 12, bias=False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    unfolded = reduce(norm(functional.unfold(picture_, 2, stride=2).transpose(1, 2)))
    rows = picture_.permute(0, 2, 3, 1)
    swin = torch.cat([rows[:, 0::2, 0::2], rows[:, 1::2, 0::2], rows[:, 0::2, 1::2], rows[:, 1::2, 1::2]], -1).flatten(1, 2)
    for change, same in ((patches_outside, True), (lambda value: value, False)):
        normed = functional.layer_norm(swin, (24,), change(norm.weight), change(norm.bias))
        assert torch.allclose(normed @ change(reduce.weight).T, unfolded, atol=1e-5) is same


def test_queries_keys_and_values_are_split(mmdet_state):
    """Self-attention of transformers' three matrices is that of torch's module on mmdetection's one."""
    there, here = (
        "panoptic_head.transformer_decoder.layers.0.attentions.1.attn",
        "model.transformer_module.decoder.layers.0.self_attn",
    )
    module = nn.MultiheadAttention(32, 8, batch_first=True)
    module.load_state_dict({key.removeprefix(f"{there}."): value for key, value in mmdet_state.items() if there in key})
    weights = detector_state(mmdet_state)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        functional.linear(x, weights[f"{here}.{p}_proj.weight"], weights[f"{here}.{p}_proj.bias"])
        .unflatten(-1, (8, 4))
        .transpose(1, 2)
        for p in "qkv"
    )
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = functional.linear(mixed, weights[f"{here}.out_proj.weight"], weights[f"{here}.out_proj.bias"])
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])


def test_the_command_converts(crd, checkpoint, tmp_path, tiny_clip, caplog):
    code, printed = crd("convert-geneval-detector", checkpoint, tmp_path / "detector")
    assert code == 0 and "wrote" in printed
    with caplog.at_level(logging.WARNING, "crd"):
        reward = resolve_reward("geneval", {"detector": str(tmp_path / "detector"), "clip": str(tiny_clip), "device": "cpu"})
    assert reward.detector.is_the_benchmarks and "HF detector" not in caplog.text


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_other_files_are_not_converted(crd, mmdet_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lacking = dict(list(mmdet_state.items())[5:])
    cut = {**mmdet_state, "panoptic_head.query_embed.weight": torch.zeros(3, 32)}
    files = {"lacking": lacking, "cut": cut, "unknown": {**mmdet_state, "bbox_head.weight": torch.zeros(2)}, "empty": {}}
    for name, state in files.items():
        torch.save({"state_dict": state}, tmp_path / name)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    for name in (*files, "evil.pth", "absent"):
        code, printed = crd("convert-geneval-detector", tmp_path / name, tmp_path / "out")
        assert code == 2 and "Traceback" not in printed and name in printed
        assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------------------------------- colours


def test_an_object_alone():
    """Grey outside of the mask, then cut to the box; halves are rounded to even."""
    image, mask = picture(20, 30), np.zeros((20, 30), dtype=bool)
    mask[5:12, 8:15] = True
    alone = object_alone(image, mask, (6.5, 5.0, 15.5, 12.0))
    pixels, original = np.asarray(alone), np.asarray(image)
    assert alone.size == (16 - 6, 7)
    assert (pixels[:, :2] == 153).all() and (pixels[:, 9:] == 153).all()
    assert (pixels[:, 2:9] == original[5:12, 8:15]).all()


def test_color_vectors(clip_colors):
    """The mean direction of three sentences, from the model's own joint forward pass; kept by class."""
    vectors = clip_colors.vectors("cup")
    for color, vector in zip(COLORS, vectors, strict=True):
        texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
        tokens = clip_colors.tokenizer(texts, padding=True, return_tensors="pt")
        embedded = clip_colors.model(**tokens, pixel_values=torch.zeros(1, 3, 8, 8)).text_embeds  # of length 1
        torch.testing.assert_close(vector, functional.normalize(embedded.mean(0), dim=0))
    assert clip_colors.vectors("cup") is vectors and not torch.allclose(clip_colors.vectors("dog"), vectors)


def test_the_color_is_the_nearest(clip_colors):
    """As with transformers' own preprocessing and joint forward pass."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        image = Image.fromarray((rng.random((16, 16, 3)) * rng.integers(0, 256, 3)).astype(np.uint8))
        mask = rng.random((16, 16)) > 0.3
        pixels = processor(object_alone(image, mask, (0, 0, 16, 16)), return_tensors="pt")["pixel_values"]
        tokens = clip_colors.tokenizer(["a"], return_tensors="pt")
        embedded = clip_colors.model(**tokens, pixel_values=pixels).image_embeds[0]
        expected = COLORS[int((clip_colors.vectors("cup") @ embedded).argmax())]
        assert clip_colors(image, mask, (0, 0, 16, 16), "cup") == expected
        seen.add(expected)
    assert len(seen) > 1


class Counting(ClipColors):
    asked = 0

    def __call__(self, *arguments):
        self.asked += 1
        return super().__call__(*arguments)


def test_colors_are_classified_only_where_the_rules_ask(tiny_detector, tiny_clip, place):
    counted = Counting(str(tiny_clip), place)
    reward = GenEvalReward(Mask2FormerDetector(load_model(str(tiny_detector), place), counted, place), "correct", "reference")
    (image,) = nano_pictures(1)
    for row, asked in (
        (single_object("apple"), 0),
        (counting("apple", 2), 0),
        (colors("red", "apple"), 1),
        (colors("red", "dog"), 1),
    ):
        assert len(reward.detector([image])[0]) > 1
        reward([image], [row["prompt"]], **{key: [value] for key, value in row.items()})
        assert counted.asked == asked


# -------------------------------------------------------------------------------------------- the reward


def rows_as_metadata(rows):
    return {key: [row.get(key) for row in rows] for key in ("tag", "include", "exclude")}


ROWS = [
    single_object("apple"),
    counting("cup", 3),
    colors("red", "apple"),
    color_attr("red", "apple", "blue", "cup"),
    position("apple", "left of", "cup"),
    single_object("tv remote"),
]


def test_end_to_end(tiny_detector, tiny_clip, caplog):
    """Random networks on pictures of the nano world: a finite score for each prompt, and none where there is nothing to judge."""
    options = {"detector": str(tiny_detector), "clip": str(tiny_clip), "device": "cpu", "batch_size": 4}
    with caplog.at_level(logging.WARNING, "crd"):
        rewards = [resolve_reward(name, options) for name in ("geneval", "geneval_correct")]
    assert "GenEval (HF detector)" in caplog.text
    assert rewards[0].detector is rewards[1].detector
    spelt_out = dict(reversed(options.items()), dtype="float32")
    assert resolve_reward("geneval", spelt_out).detector is rewards[0].detector
    metadata = rows_as_metadata([*ROWS, {}])
    images, prompts = nano_pictures(7), [row["prompt"] for row in ROWS] + ["a dream"]
    scores = [reward(images, prompts, **metadata) for reward in rewards]
    assert all(row[-1] is None and all(0 <= score <= 1 for score in row[:-1]) for row in scores)
    assert scores[0][-2] == 0 and scores[1][0] == 1  # no remote control is seen, and apples are


def described(found):
    return [(d.name, round(d.score, 3), d.box) for d in found]


def test_batches_change_nothing(tiny_detector, clip_colors, place):
    """Pictures of several sizes and modes in any company are seen as each alone."""
    model = load_model(str(tiny_detector), place)
    detector = Mask2FormerDetector(model, clip_colors, place)
    images = [*nano_pictures(3), picture(60, 80), nano_pictures(1)[0].convert("RGBA"), picture(60, 80).rotate(180)]
    together = detector(images)
    assert [described(found) for found in together] == [described(detector([image])[0]) for image in images]
    assert {d.name for found in together for d in found} == {"apple", "cup"}
    assert described(together[0]) != described(together[1]) and together[3][0].box[2] > 64
    assert all(d.color in COLORS for d in together[3])


def test_half_precision(tiny_detector, tiny_clip):
    options = {"detector": str(tiny_detector), "clip": str(tiny_clip), "device": "cpu", "dtype": "bfloat16"}
    row = colors("red", "apple")
    (score,) = resolve_reward("geneval", options)(nano_pictures(1), [row["prompt"]], **rows_as_metadata([row]))
    assert 0 <= score <= 1


def test_weights_that_have_no_part_may_be_missing(tiny_detector, place, tmp_path):
    """As in the published file; any other missing weight would be random."""
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_detector / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_detector / "config.json").read_text())
    used = {key: value for key, value in state.items() if not key.endswith(mask2former.UNUSED)}
    assert len(used) == len(state) - 3
    save_file(used, tmp_path / "model.safetensors", metadata={"format": "pt"})
    x = torch.randn(1, 3, 64, 64)
    first, second = (load_model(str(folder), place)(x).masks_queries_logits for folder in (tiny_detector, tmp_path))
    assert torch.equal(first, second)
    used.pop("class_predictor.bias")
    save_file(used, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CRDError, match=r"lacks 1 weights, class_predictor\.bias"):
        load_model(str(tmp_path), place)


def test_wrong_options(tiny_detector, tiny_clip, tmp_path):
    with pytest.raises(CRDError, match="need a detector"):
        resolve_reward("geneval", {"clip": str(tiny_clip)})
    with pytest.raises(CRDError, match=r"options\.detector is .*not a mask2former for COCO's 80"):
        resolve_reward("geneval", {"detector": str(tiny_clip), "clip": str(tiny_clip)})
    with pytest.raises(CRDError, match=r"options\.detector is .*absent"):
        resolve_reward("geneval", {"detector": str(tmp_path / "absent")})
    with pytest.raises(CRDError, match=r"options\.clip is"):
        resolve_reward("geneval", {"detector": str(tiny_detector), "clip": str(tiny_detector)})
    with pytest.raises(CRDError, match=r"options\.dtype"):
        resolve_reward("geneval", {"detector": str(tiny_detector), "clip": str(tiny_clip), "dtype": "int8"})
    with pytest.raises(CRDError, match="do not fit"):
        resolve_reward("geneval", {"detector": str(tiny_detector), "colour": "red"})
