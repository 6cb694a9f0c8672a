"""Sana on a tiny random pipeline, with Euler steps and with the DPM-Solver that it is published with."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from family_checks import (
    PROMPTS,
    STEPS,
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
from tiny_sana import dpm, tiny_sana
from torch.nn.functional import pad

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.errors import CRDError
from crd.rollout import draw_latents
from crd.solvers import dpmsolver


def case(scheduler=None):
    return Case(
        make=lambda: tiny_sana(scheduler),
        settings=ModelConfig(height=32, width=64, max_sequence_length=12, lora_rank=4, lora_alpha=8),
        guidance=lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rollout_is_the_pipelines_own(scale):
    check_rollout(case(), scale)


class UnroundedDPM(DPMSolverMultistepScheduler):
    """Tells the model the timestep itself, not its whole part."""

    def set_timesteps(self, *arguments, **options):
        super().set_timesteps(*arguments, **options)
        self.timesteps = self.sigmas[:-1] * 1000


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("kind, tolerance", [(DPMSolverMultistepScheduler, 0.2), (UnroundedDPM, 1e-5)])
def test_rollout_with_dpm_solver(kind, tolerance, scale):
    """The pipeline's scheduler cuts timesteps to whole numbers; that is all that is different."""
    ours_case = case(kind.from_config(dpm().config))
    policy = ours_case.policy()
    start = noise(policy)
    ours = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(STEPS), scale, dpmsolver)
    theirs, _ = ours_case.own(policy.model.pipeline, policy.model, start, scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_another_time_shift():
    for scheduler in (None, dpm()):
        model = case(scheduler).policy().model
        first, other = model.sigmas(4), model.sigmas(4, shift=1.0)
        assert first.shape == other.shape == (5,) and first[-1] == other[-1] == 0
        assert (other[1:-1] < first[1:-1]).all()
        assert torch.equal(model.sigmas(4), first)


def test_the_empty_prompt_goes_without_the_instruction_and_others_with_it():
    policy = case().policy()
    pipeline, length = policy.model.pipeline, policy.model.max_sequence_length
    states, _, empty, empty_mask = pipeline.encode_prompt(
        PROMPTS[0], max_sequence_length=length, complex_human_instruction=["Say it", "again: "]
    )
    ours = policy.model.encode([PROMPTS[0], ""])
    assert torch.equal(ours.states[1:], empty) and torch.equal(ours.mask[1:], empty_mask.bool())
    assert not torch.equal(ours.states[:1], states)  # this is another instruction than the default
    assert torch.equal(ours.states[:1], pipeline_default(pipeline, length))


def pipeline_default(pipeline, length):
    seen = {}
    hook = pipeline.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    pipeline(
        PROMPTS[0],
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=length,
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="latent",
    )
    hook.remove()
    return seen["encoder_hidden_states"]


@torch.no_grad()
def test_padding_says_nothing():
    policy = case().policy()
    x, sigma, known = noise(policy), torch.full((len(PROMPTS),), 0.5), policy.encode(PROMPTS)
    longer = Conditioning(pad(known.states, (0, 0, 0, 5), value=3.0), mask=pad(known.mask, (0, 5)))
    torch.testing.assert_close(policy.velocity(x, sigma, longer), policy.velocity(x, sigma, known), rtol=0, atol=1e-5)


def test_schedulers_that_know_no_flow_are_refused():
    with pytest.raises(CRDError, match="no flow scheduler"):
        case(DPMSolverMultistepScheduler()).policy()


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
    check_folder(case(dpm()), tmp_path)
