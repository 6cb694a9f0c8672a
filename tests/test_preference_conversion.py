"""Published weight formats to transformers' models: against the references' forward passes in plain torch, on tiny random
weights, and against the published sizes without any weights; folded heads against layered ones; preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image
from preference_models import (
    LENGTH,
    SIZE,
    OpenCLIP,
    ReferenceImageReward,
    bert_tokenizer,
    clip_tokenizer,
    layered_head,
    med_config,
    save_hpsv2,
    save_imagereward,
)
from torch.nn import functional
from transformers import BlipTextModel, BlipVisionModel, CLIPImageProcessorPil, CLIPModel

from crd.rewards.preference.affine import fold
from crd.rewards.preference.convert_imagereward import text_config, text_state, vision_config, vision_state
from crd.rewards.preference.convert_open_clip import clip_config, clip_state
from crd.rewards.preference.hpsv2 import HPSv2
from crd.rewards.preference.imagereward import ImageReward
from crd.rewards.preference.pixels import cropped_bicubic, cropped_bilinear, padded_bicubic

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a cat", "dog", "a very red cat and a dog 12", "", "cat " * 60]


def noise(width, height, seed=0):
    """A picture of random colours; smooth enough that a wrong crop or filter shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [noise(width, height, seed) for seed, (width, height) in enumerate([(8, 8), (24, 24), (31, 20), (9, 26), (40, 10)])]


def test_hpsv2_against_open_clip_in_plain_torch(tmp_path):
    reference = save_hpsv2(tmp_path / "hps")
    reward = HPSv2(path=str(tmp_path / "hps"), tokenizer=str(tmp_path / "hps"), device="cpu", batch_size=2)
    tokenizer = clip_tokenizer()
    for picture, prompt, score in zip(PICTURES, PROMPTS, reward(PICTURES, PROMPTS), strict=True):
        scale = SIZE / max(picture.size)
        small = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (SIZE, SIZE))
        canvas.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
        pixels = torch.tensor((np.asarray(canvas) / 255 - MEAN) / DEVIATION).float().permute(2, 0, 1)[None]
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[: LENGTH - 2]
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] + [0] * (LENGTH - 2 - len(ids))
        with torch.no_grad():
            expected = functional.cosine_similarity(reference.visual(pixels), reference.encode_text(torch.tensor([ids])))
        assert score == pytest.approx(expected.item(), abs=1e-5)


def test_published_size_of_hpsv2():
    with torch.device("meta"):
        state = OpenCLIP((1280, 16, 32), (1024, 16, 24), 224, 14, 1024, 49408, 77).state_dict()
        config = clip_config(state, 16, 16)
        model = CLIPModel(config)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (1280, 32, 14, 224)
    assert (vision.num_attention_heads, vision.intermediate_size, vision.hidden_act) == (16, 5120, "gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.intermediate_size, text.vocab_size, text.max_position_embeddings) == (4096, 49408, 77)
    assert (config.projection_dim, text.hidden_act, vision.layer_norm_eps) == (1024, "gelu", 1e-5)
    assert {k: v.shape for k, v in clip_state(state).items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # open_clip's count of ViT-H-14


def test_imagereward_against_its_reference_in_plain_torch(tmp_path):
    reference = save_imagereward(tmp_path / "ir")
    reward = ImageReward(path=str(tmp_path / "ir"), tokenizer=str(tmp_path / "ir"), device="cpu", batch_size=2)
    tokenizer = bert_tokenizer()
    for picture, prompt, score in zip(PICTURES, PROMPTS, reward(PICTURES, PROMPTS), strict=True):
        ids = [2, *tokenizer(prompt, add_special_tokens=False).input_ids[:33], 3]  # [CLS] and [SEP]
        padded = torch.tensor([ids + [0] * (35 - len(ids))])
        with torch.no_grad():
            expected = reference(cropped_bicubic([picture], SIZE), padded, torch.arange(35)[None] < len(ids))
        assert score == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert np.ptp(reward(PICTURES, PROMPTS)) > 0.1  # or the comparison would say little


def test_published_size_of_imagereward():
    with torch.device("meta"):
        state = ReferenceImageReward((1024, 16, 24), (768, 12, 12), 224, 16, 30524, 512).state_dict()
        vision = vision_config(state, 16)
        text = text_config(med_config(768, 12, 12, 30524, 512), vision.hidden_size)
        models = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 224, 16)
    assert (text.num_attention_heads, text.encoder_hidden_size, text.layer_norm_eps) == (12, 1024, 1e-12)
    assert vision.layer_norm_eps == 1e-6
    for model, converted in zip(models, (vision_state(state), text_state(state)), strict=True):
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["layers", "mlp.layers"])
def test_folded_head_is_the_layered_one(prefix):
    torch.manual_seed(0)
    head, features = layered_head(768), torch.randn(5, 768)
    state = {f"{prefix}.{key}": value for key, value in head.state_dict().items()}
    folded = fold({**state, "other.weight": torch.ones(1)}, prefix, mean=0.2, deviation=3.0)
    torch.testing.assert_close(folded(features), (head(features)[:, 0].detach() - 0.2) / 3.0, rtol=1e-5, atol=1e-6)


def test_head_of_ten_layers_is_folded_in_the_order_of_numbers():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 3) for _ in range(11)] + [torch.nn.Linear(3, 1)]
    state = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)}).state_dict()
    features = torch.randn(4, 3)
    expected = torch.nn.Sequential(*layers)(features)[:, 0].detach()
    torch.testing.assert_close(fold(state, "layers")(features), expected)


def test_what_is_no_head():
    with pytest.raises(ValueError, match="no layers"):
        fold({"x": torch.ones(1)}, "layers")
    with pytest.raises(ValueError, match="fit together"):
        state = {"layers.0.weight": torch.ones(3, 2), "layers.0.bias": torch.ones(3)}
        fold({**state, "layers.1.weight": torch.ones(1, 4), "layers.1.bias": torch.ones(1)}, "layers")


def undone(pixels):
    """(h, w, 3) from 0 to 255 of one normalised picture."""
    return (pixels.permute(1, 2, 0).numpy() * DEVIATION + MEAN) * 255


def resized_by_torch(picture, height, width, mode):
    """Another implementation of Pillow's filters, on floats."""
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None].float()
    return functional.interpolate(pixels, (height, width), mode=mode, antialias=True)[0].clamp(0, 255).permute(1, 2, 0).numpy()


def assert_like_pillow(actual, expected):
    """Pillow rounds and cuts off to 8 bits between its two passes, torch does not: a few levels where colours overshoot."""
    difference = abs(actual - expected)
    assert np.quantile(difference, 0.95) < 1.1
    assert difference.max() < 5


@pytest.mark.parametrize(
    ("width", "height", "top", "left"),  # of the middle square after the resize
    [(300, 300, 0, 0), (448, 300, 0, 55), (75, 50, 0, 56), (64, 500, 763, 0), (305, 300, 0, 2)],
)
def test_short_side_and_middle(width, height, top, left):
    picture, short = noise(width, height), min(width, height)
    shape = (height * 224 // short, width * 224 // short)
    expected = resized_by_torch(picture, *shape, "bicubic")[top : top + 224, left : left + 224]
    assert_like_pillow(undone(cropped_bicubic([picture], 224)[0]), expected)
    expected = resized_by_torch(picture, *shape, "bilinear")[top : top + 224, left : left + 224]
    np.testing.assert_allclose(undone(cropped_bilinear([picture], 224)[0]), expected, atol=1e-2)


def test_bilinear_against_pillow_on_floats():
    picture = noise(90, 61)
    planes = [band.convert("F").resize((330, 224), Image.Resampling.BILINEAR) for band in picture.split()]
    expected = np.stack(planes, -1)[:, 53:277]
    np.testing.assert_allclose(undone(cropped_bilinear([picture], 224)[0]), expected, atol=1e-3)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (64, 64), (224, 112), (1000, 3), (33, 77)])
def test_long_side_and_black_border(width, height):
    picture = noise(width, height)
    square = undone(padded_bicubic([picture], 224)[0])
    tall, wide = max(1, round(height * 224 / max(width, height))), max(1, round(width * 224 / max(width, height)))
    top, left = (224 - tall) // 2, (224 - wide) // 2
    inside = np.zeros((224, 224), dtype=bool)
    inside[top : top + tall, left : left + wide] = True
    np.testing.assert_allclose(square[~inside], 0, atol=1e-4)  # black, not the mean's grey
    expected = resized_by_torch(picture, tall, wide, "bicubic").reshape(-1, 3)
    assert_like_pillow(square[inside], expected)


@pytest.mark.parametrize("size", [(300, 300), (320, 240), (130, 390)])
def test_own_crop_is_the_image_processors_where_margins_are_even(size):
    picture = noise(*size)
    theirs = CLIPImageProcessorPil()([picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(cropped_bicubic([picture], 224), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_are_made_rgb(mode):
    picture = noise(40, 30).convert(mode)
    for function in (cropped_bicubic, cropped_bilinear, padded_bicubic):
        assert torch.equal(function([picture], 16), function([picture.convert("RGB")], 16))
