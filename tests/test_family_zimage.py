"""Z-Image on a tiny random pipeline."""

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
)
from tiny_zimage import tiny_zimage

from crd.config import ModelConfig


def case(**scheduler):
    return Case(
        make=lambda: tiny_zimage(**scheduler),
        settings=ModelConfig(height=16, width=24, max_sequence_length=64, lora_rank=4, lora_alpha=8),
        guidance=lambda scale: {"guidance_scale": scale - 1},
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rollout_is_the_pipelines_own_at_our_guidance_minus_1(scale):
    check_rollout(case(), scale)


def test_rollout_with_dynamic_shifting():
    check_rollout(case(use_dynamic_shifting=True), 1.0)


def test_grid_of_the_turbo_scheduler_and_another_time_shift():
    model = case().policy().model
    even = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    torch.testing.assert_close(model.sigmas(4), 3 * even / (1 + 2 * even), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.sigmas(4, shift=5.0), 5 * even / (1 + 4 * even), rtol=0, atol=1e-6)


def test_encoding_leaves_the_callers_prompts_alone():
    prompts = list(PROMPTS)
    conditioning = case().policy().model.encode(prompts)
    assert prompts == PROMPTS
    assert len(set(conditioning.mask.sum(1).tolist())) > 1  # of different lengths
    assert not conditioning.states[~conditioning.mask].any()


def test_training_changes_lora_weights_only(tmp_path):
    check_training(case(), tmp_path, 2.0)


def test_export(tmp_path):
    check_export(case(), tmp_path, 2.0)


def test_rows_are_independent():
    check_rows_are_independent(case())


def test_gradient_checkpointing():
    check_gradient_checkpointing(case())


def test_bfloat16():
    check_bfloat16(case())


def test_folder(tmp_path):
    check_folder(case(), tmp_path)
