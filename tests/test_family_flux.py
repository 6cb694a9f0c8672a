"""FLUX.1: dev, whose backbone is told a guidance, and schnell, whose is not."""

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
    naive_tokens,
)
from tiny_flux import tiny_flux

from crd.config import ModelConfig
from crd.errors import CRDError

SETTINGS = ModelConfig(height=8, width=12, max_sequence_length=10, lora_rank=2, lora_alpha=4)


def true_cfg(scale):
    return {"negative_prompt": [""] * 3, "true_cfg_scale": scale} if scale > 1 else {}


DEV = Case(lambda: tiny_flux(True), SETTINGS, lambda scale: {**true_cfg(scale), "guidance_scale": 3.5})
SCHNELL = Case(lambda: tiny_flux(False), SETTINGS, true_cfg)


@pytest.fixture(params=[DEV, SCHNELL], ids=["dev", "schnell"])
def case(request):
    return request.param


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rollout_equals_the_pipelines_own(case, scale):
    check_rollout(case, scale)


def test_distilled_guidance_is_what_the_backbone_is_told():
    settings = SETTINGS.model_copy(update={"distilled_guidance": 1.5})
    told = Case(DEV.make, settings, lambda scale: {"guidance_scale": 1.5})
    assert (check_rollout(told, 1.0) - check_rollout(DEV, 1.0)).abs().max() > 1e-3
    with pytest.raises(CRDError, match="distilled_guidance is 1\\.5"):
        Case(SCHNELL.make, settings, true_cfg).policy()


def test_training_changes_only_lora_weights(case, tmp_path):
    check_training(case, tmp_path, 2.0)


def test_exported_lora_in_plain_diffusers(case, tmp_path):
    check_export(case, tmp_path, 1.0)


def test_rows_are_independent_and_prompts_matter(case):
    check_rows_are_independent(case)


def test_gradient_checkpointing(case):
    check_gradient_checkpointing(case)


def test_bfloat16(case):
    check_bfloat16(case)


def test_saved_folder(case, tmp_path):
    check_folder(case, tmp_path)


def test_noise_levels_against_the_formula():
    """dev: the logarithm of the shift is linear in tokens, 0.5 at 256 and 1.15 at 4096; schnell: no shift at all."""
    mu = 0.5 + (6 - 256) * (1.15 - 0.5) / (4096 - 256)  # 2 x 3 tokens
    even = [1.0, 0.75, 0.5, 0.25, 0.0]
    dev, schnell = (c.policy().model for c in (DEV, SCHNELL))
    expected = torch.tensor([math.exp(mu) * s / (1 + (math.exp(mu) - 1) * s) for s in even])
    torch.testing.assert_close(dev.sigmas(4), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(schnell.sigmas(4), torch.tensor(even), rtol=0, atol=1e-6)
    fixed = torch.tensor([2 * s / (1 + s) for s in even])
    for family in (dev, schnell):
        torch.testing.assert_close(family.sigmas(4, shift=2.0), fixed, rtol=0, atol=1e-6)
        assert family.sigmas(4, shift=2.0).dtype == torch.float32


def test_decoding_against_naive_packing():
    family = DEV.policy().model
    grid = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = naive_tokens(grid)
    assert tokens.shape[1:] == family.latent_shape == (6, 16)
    with torch.no_grad():
        decoded = family.pipeline.vae.decode(grid / 0.36 + 0.12).sample
    expected = family.pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert expected[0].size == (12, 8)
    assert farthest(family.decode(tokens), expected) <= 1


def test_size_that_does_not_pack_is_refused():
    with pytest.raises(CRDError, match=r"model.width is 10.*multiple of 4"):
        Case(DEV.make, SETTINGS.model_copy(update={"width": 10}), true_cfg).policy()


def test_unknown_words_and_default_lengths():
    family = DEV.policy().model
    assert family.unknown_words("a photo of a zebra") == ["zebra"]
    plain = Case(DEV.make, ModelConfig(path="hub/id"), true_cfg).policy().model
    assert (plain.max_sequence_length, plain.height, plain.width) == (512, 256, 256)  # 128 times the tiny VAE's factor of 2
