"""SDXL on a tiny random pipeline."""

import pytest
import torch
from family_checks import (
    PROMPTS,
    Case,
    check_bfloat16,
    check_export,
    check_folder,
    check_gradient_checkpointing,
    check_rollout,
    check_rows_are_independent,
    check_training,
    noise,
)
from tiny_unet import tiny_sdxl

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.models.families import open_family

CASE = Case(
    make=tiny_sdxl,
    settings=ModelConfig(height=16, width=24, lora_rank=4, lora_alpha=8),
    guidance=lambda scale: {"guidance_scale": scale},
)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rollout_is_the_pipelines_own(scale):
    check_rollout(CASE, scale)


def encoded_prompts():
    pipeline = tiny_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    return pipeline


def test_rollout_of_a_pipeline_that_encodes_the_empty_prompt():
    check_rollout(Case(encoded_prompts, CASE.settings, CASE.guidance), 4.5)


@pytest.mark.parametrize("make, zero", [(tiny_sdxl, True), (encoded_prompts, False)])
def test_the_empty_prompt_is_what_the_unconditional_branch_takes(make, zero):
    policy = CASE.policy(make())
    with torch.no_grad():
        _, states, _, pooled = policy.model.pipeline.encode_prompt(PROMPTS[0], do_classifier_free_guidance=True)
        both = policy.model.encode([PROMPTS[0], ""])
    torch.testing.assert_close(both.states[1:], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(both.pooled[1:], pooled, rtol=0, atol=1e-6)
    assert (not both.states[1].any() and not both.pooled[1].any()) == zero and both.states[0].any()


@torch.no_grad()
def test_half_precision_vae_decodes_in_float32_as_the_pipelines_does():
    policy = CASE.policy()
    vae = policy.model.pipeline.vae
    vae.half().float()  # rounds the weights
    expected = policy.model.decode(noise(policy))
    vae.half()
    got = policy.model.decode(noise(policy))
    assert vae.dtype == torch.float16
    assert [picture.tobytes() for picture in got] == [picture.tobytes() for picture in expected]


def test_consistency_models_are_refused():
    pipeline = tiny_sdxl()
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(CRDError, match="guidance as a number"):
        open_family(pipeline, CASE.settings)


def test_training_changes_lora_weights_only(tmp_path):
    check_training(CASE, tmp_path, 2.0)


def test_export(tmp_path):
    check_export(CASE, tmp_path, 2.0)


def test_rows_are_independent():
    check_rows_are_independent(CASE)


def test_gradient_checkpointing():
    check_gradient_checkpointing(CASE)


def test_bfloat16():
    check_bfloat16(CASE)


def test_folder(tmp_path):
    check_folder(CASE, tmp_path)
