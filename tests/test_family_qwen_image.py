"""Qwen-Image: prompts of any length, guidance of unchanged length, a video VAE."""

import math

import pytest
import torch
from family_checks import (
    Case,
    check_bfloat16,
    check_export,
    check_folder,
    check_gradient_checkpointing,
    check_rollout,
    check_rows_are_independent,
    check_training,
    farthest,
    levels,
    naive_tokens,
    noise,
)
from tiny_qwen import tiny_qwen_image

from crd.config import ModelConfig
from crd.errors import CRDError

SETTINGS = ModelConfig(height=8, width=12, max_sequence_length=20, lora_rank=2, lora_alpha=4)


def true_cfg(scale):
    return {"negative_prompt": [""] * 3, "true_cfg_scale": scale} if scale > 1 else {"true_cfg_scale": 1.0}


QWEN = Case(tiny_qwen_image, SETTINGS, true_cfg)


@pytest.fixture(scope="module")
def case():
    return QWEN


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rollout_equals_the_pipelines_own(scale):
    check_rollout(QWEN, scale)


def test_guidance_keeps_the_length_of_every_token():
    family = QWEN.policy().model
    empty, prompt = torch.randn(2, 3, 6, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    guided = family.guide(empty, prompt, 4.0)
    for i in range(3):
        for j in range(6):
            towards = empty[i, j] + 4.0 * (prompt[i, j] - empty[i, j])
            expected = towards * (prompt[i, j] @ prompt[i, j]).sqrt() / (towards @ towards).sqrt()
            torch.testing.assert_close(guided[i, j], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(family.guide(empty, prompt, 1.0), prompt, rtol=1e-5, atol=1e-6)


def test_prompts_have_their_own_lengths():
    policy = QWEN.policy()
    conditioning = policy.encode(["a ring", "a photo of a red circle"])
    assert conditioning.mask.sum(1).tolist() == [2 + 5, 6 + 5]  # and the five tokens that end the template
    assert conditioning.states.shape[1] == 11 and conditioning.states[0, 7:].abs().max() == 0


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter():
    policy = QWEN.policy()
    conditioning = policy.encode(["a ring", "a photo of a red circle"])
    x, sigma = noise(policy)[:2], levels()[:2]
    before = policy.velocity(x, sigma, conditioning)
    conditioning.states[0, 7:] = 100.0
    torch.testing.assert_close(policy.velocity(x, sigma, conditioning), before, rtol=0, atol=1e-6)
    conditioning.states[0, 6:] = 100.0  # the last token that is there does
    assert (policy.velocity(x, sigma, conditioning) - before).abs().max() > 1e-4


def test_training_changes_only_lora_weights(case, tmp_path):
    check_training(case, tmp_path, 2.0)


def test_exported_lora_in_plain_diffusers(case, tmp_path):
    check_export(case, tmp_path, 2.0)


def test_rows_are_independent_and_prompts_matter(case):
    check_rows_are_independent(case)


def test_gradient_checkpointing(case):
    check_gradient_checkpointing(case)


def test_bfloat16(case):
    check_bfloat16(case)


def test_saved_folder(case, tmp_path):
    check_folder(case, tmp_path)


def test_noise_levels_against_the_formula():
    """Shifted by the number of tokens, then stretched so that the last level before 0 is 0.02."""
    mu = 0.5 + (6 - 256) * (0.9 - 0.5) / (8192 - 256)
    even = [1.0, 0.75, 0.5, 0.25]
    family = QWEN.policy().model
    for shift, given in ((math.exp(mu), None), (2.0, 2.0)):
        shifted = [shift * s / (1 + (shift - 1) * s) for s in even]
        stretched = [1 - (1 - s) * (1 - 0.02) / (1 - shifted[-1]) for s in shifted]
        torch.testing.assert_close(family.sigmas(4, given), torch.tensor([*stretched, 0.0]), rtol=0, atol=1e-6)
    with pytest.raises(CRDError, match=r"1 solver step.*at least 2"):
        family.sigmas(1)


def test_decoding_against_naive_packing():
    """Latents are normalised per channel, and the VAE takes a video of one frame."""
    family = QWEN.policy().model
    grid = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    mean, deviation = torch.tensor([0.3, -0.5, 0.1, 0.9]), torch.tensor([0.5, 1.5, 1.0, 2.0])
    tokens = naive_tokens((grid - mean[:, None, None]) / deviation[:, None, None])
    assert tokens.shape[1:] == family.latent_shape == (6, 16)
    with torch.no_grad():
        frame = family.pipeline.vae.decode(grid[:, :, None]).sample[:, :, 0]
    expected = family.pipeline.image_processor.postprocess(frame, output_type="pil")
    assert expected[0].size == (12, 8)
    assert farthest(family.decode(tokens), expected) <= 1


def test_guidance_that_the_backbone_cannot_be_told_is_refused():
    with pytest.raises(CRDError, match=r"distilled_guidance is 3\.5"):
        Case(QWEN.make, SETTINGS.model_copy(update={"distilled_guidance": 3.5}), true_cfg).policy()


def test_unknown_words_and_default_lengths():
    assert QWEN.policy().model.unknown_words("a photo of a zebra") == ["zebra"]
    plain = Case(QWEN.make, ModelConfig(path="hub/id"), true_cfg).policy().model
    assert (plain.max_sequence_length, plain.height, plain.width) == (512, 256, 256)
