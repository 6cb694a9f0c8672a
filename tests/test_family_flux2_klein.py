"""FLUX.2 [klein]: base, with an unconditional branch, and distilled, without."""

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
from tiny import tiny_config
from tiny_flux import tiny_klein

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.models.family import check_guidance

SETTINGS = ModelConfig(height=8, width=12, max_sequence_length=20, lora_rank=2, lora_alpha=4)


def guided(scale):
    return {"guidance_scale": scale}


def as_grid(family, tokens):
    """The pipeline takes ``(n, channels, rows, columns)`` and packs it by itself."""
    grid = torch.zeros(len(tokens), tokens.shape[2], family.rows, family.columns)
    for i in range(family.rows):
        for j in range(family.columns):
            grid[:, :, i, j] = tokens[:, i * family.columns + j]
    return grid


BASE = Case(lambda: tiny_klein(False), SETTINGS, guided, as_grid)
DISTILLED = Case(lambda: tiny_klein(True), SETTINGS, guided, as_grid)


@pytest.fixture(scope="module")
def case():
    return BASE


@pytest.mark.parametrize(("case", "scale"), [(BASE, 1.0), (BASE, 4.0), (DISTILLED, 1.0)])
def test_rollout_equals_the_pipelines_own(case, scale):
    check_rollout(case, scale)


def test_distilled_model_has_no_guidance():
    """The pipeline ignores any, with a warning; we refuse it."""
    family = DISTILLED.policy().model
    assert BASE.policy().model.has_unconditional and not family.has_unconditional
    check_guidance(family, tiny_config("run", anchor={"guidance_scale": 1}))
    with pytest.raises(CRDError, match=r"anchor.guidance_scale is 4.*no unconditional branch"):
        check_guidance(family, tiny_config("run", anchor={"guidance_scale": 4}))


def test_training_of_the_distilled_model(tmp_path):
    check_training(DISTILLED, tmp_path, 1.0)


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


def test_noise_levels_against_the_published_fit():
    """The logarithm of the shift: linear in tokens at 10 and at 200 steps, and between them linear in steps."""
    tokens, steps = 6, 4
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    mu = at_10 + (at_200 - at_10) * (steps - 10) / 190
    even = [1.0, 0.75, 0.5, 0.25, 0.0]
    family = BASE.policy().model
    expected = torch.tensor([math.exp(mu) * s / (1 + (math.exp(mu) - 1) * s) for s in even])
    torch.testing.assert_close(family.sigmas(4), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(family.sigmas(4, shift=2.0), torch.tensor([2 * s / (1 + s) for s in even]), rtol=0, atol=1e-6)


def test_decoding_against_naive_packing():
    """Tokens are normalised by the running statistics that the VAE keeps of them."""
    family = BASE.policy().model
    grid = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    vae = family.pipeline.vae
    tokens = (naive_tokens(grid) - vae.bn.running_mean) / (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    assert tokens.shape[1:] == family.latent_shape == (6, 16)
    with torch.no_grad():
        expected = family.pipeline.image_processor.postprocess(vae.decode(grid).sample, output_type="pil")
    assert expected[0].size == (12, 8)
    assert farthest(family.decode(tokens), expected) <= 1


def test_guidance_that_the_backbone_cannot_be_told_is_refused():
    with pytest.raises(CRDError, match=r"distilled_guidance is 3\.5"):
        Case(BASE.make, SETTINGS.model_copy(update={"distilled_guidance": 3.5}), guided).policy()


def test_unknown_words_and_default_lengths():
    assert BASE.policy().model.unknown_words("a photo of a zebra") == ["zebra"]
    plain = Case(BASE.make, ModelConfig(path="hub/id"), guided).policy().model
    assert (plain.max_sequence_length, plain.height, plain.width) == (512, 256, 256)
