"""Stable Diffusion 1 and 2 on a tiny random pipeline: noise prediction and v-prediction, and the grids of their schedulers."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
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
from tiny_unet import TRAINED, ddim, euler, tiny_sd
from torch.utils._python_dispatch import TorchDispatchMode

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.flow import clean_from_velocity, noise_from_velocity
from crd.models.noise_schedule import NoiseSchedule
from crd.recipe import build_config
from crd.rollout import draw_latents
from crd.step import TrainStep

SIZE = {"height": 16, "width": 24}


def case(scheduler=ddim, **options):
    return Case(
        make=lambda: tiny_sd(scheduler(**options)),
        settings=ModelConfig(**SIZE, lora_rank=4, lora_alpha=8),
        guidance=lambda scale: {"guidance_scale": scale},
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rollout_is_the_pipelines_own(scale):
    check_rollout(case(), scale)


@pytest.mark.parametrize(
    "scheduler, options",
    [
        (ddim, {"prediction_type": "v_prediction"}),
        (euler, {}),
        (euler, {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}),
        (euler, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ],
)
def test_rollout_with_other_schedulers(scheduler, options):
    check_rollout(case(scheduler, **options), 2.0)


def pipelines_latents(policy, steps):
    return policy.model.pipeline(
        PROMPTS, latents=noise(policy), num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **SIZE
    ).images


@torch.no_grad()
def test_rollout_that_begins_where_there_is_no_signal():
    """Zero terminal signal: sigma is exactly 1. The steps divide 1000, else DDIM steps to levels that are not the next ones."""
    policy = case(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True).policy()
    sigmas = policy.model.sigmas(4)
    ours = draw_latents(policy, policy.encode(PROMPTS), noise(policy), sigmas, 1.0)
    assert sigmas[0] == 1
    torch.testing.assert_close(ours, pipelines_latents(policy, 4), rtol=0, atol=1e-5)


@torch.no_grad()
def test_ddim_that_stops_before_the_end_decodes_what_we_would_add_its_noise_to():
    """The schedulers of SD 1.5 and 2.1 leave the noise of timestep 0 in the picture; a rollout ends at the clean latent."""
    policy = case(set_alpha_to_one=False).policy()
    sigmas = policy.model.sigmas(3)
    start, conditioning = noise(policy), policy.encode(PROMPTS)
    with policy.using("pretrained"):
        before = draw_latents(policy, conditioning, start, sigmas[:-1], 1.0)
        sigma = sigmas[-2].expand(len(before))
        velocity = policy.velocity(before, sigma, conditioning)
        theirs = pipelines_latents(policy, 3)
        ours = draw_latents(policy, conditioning, start, sigmas, 1.0)
    clean, left = clean_from_velocity(before, velocity, sigma), noise_from_velocity(before, velocity, sigma)
    torch.testing.assert_close(ours, clean, rtol=0, atol=1e-6)
    signal = policy.model.pipeline.scheduler.alphas_cumprod[0]
    torch.testing.assert_close(signal.sqrt() * clean + (1 - signal).sqrt() * left, theirs, rtol=0, atol=1e-5)
    assert 1e-3 < (ours - theirs).abs().max() < 0.1


def test_grid_of_schedulers_whose_solver_is_another():
    """PNDM visits DDIM's timesteps, one of them twice; DPM-Solver has timesteps of its own, which grow by one step's worth."""
    kinds = {"pndm": PNDMScheduler(**TRAINED, skip_prk_steps=True), "ddim": ddim()}
    grids = {name: NoiseSchedule.of(scheduler).sigmas(10, None) for name, scheduler in kinds.items()}
    assert torch.equal(grids["pndm"], grids["ddim"]) and len(grids["ddim"]) == 11
    schedule = NoiseSchedule.of(DPMSolverMultistepScheduler(**TRAINED, timestep_spacing="leading"))
    grid = schedule.sigmas(10, None)
    torch.testing.assert_close(schedule.timesteps(grid[:-1]), schedule.scheduler.timesteps.float(), rtol=0, atol=1e-2)
    assert grid[-1] == 0 and (grid.diff() < 0).all()


def test_the_table_of_levels_moves_once():
    """A copy in every pass would wait for the device; the grid stays where it is made."""
    schedule, sigma = NoiseSchedule.of(ddim()), torch.ones(2, device="meta")
    grid = schedule.sigmas(4, None)
    copies = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            copies.append(function is torch.ops.aten._to_copy.default and arguments[0].device != sigma.device)
            return function(*arguments, **(named or {}))

    for expected in (1, 1, 1):
        with Listener():
            schedule.timesteps(sigma)
        assert sum(copies) == expected
    assert torch.equal(schedule.sigmas(4, None), grid)
    assert schedule.timesteps(grid).device == grid.device


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("make", [ddim, euler])
def test_the_unet_is_told_the_schedulers_own_timesteps(make, spacing, steps):
    schedule = NoiseSchedule.of(make(timestep_spacing=spacing))
    grid = schedule.sigmas(steps, None)
    told = schedule.timesteps(grid[:-1])
    theirs = schedule.scheduler.timesteps
    assert told.dtype == torch.float32 and grid.shape == (steps + 1,) and grid[-1] == 0
    if spacing == "linspace" and make is euler:  # fractions of a timestep
        torch.testing.assert_close(told, theirs, rtol=0, atol=3e-4)
    else:
        assert torch.equal(told, theirs.float())


def test_zero_terminal_signal_is_refused_for_noise_prediction():
    with pytest.raises(CRDError, match="rescale_betas_zero_snr"):
        NoiseSchedule.of(ddim(rescale_betas_zero_snr=True))


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(**TRAINED), ddim(prediction_type="sample")])
def test_other_schedulers_are_refused(scheduler):
    with pytest.raises(CRDError, match="supported"):
        NoiseSchedule.of(scheduler)


def test_settings_that_do_not_fit_are_refused():
    model = case().policy().model
    with pytest.raises(CRDError, match=r"rollout.shift is 3"):
        model.sigmas(4, shift=3.0)
    with pytest.raises(CRDError, match=r"model.max_sequence_length is 5.*16 tokens"):
        Case(tiny_sd, ModelConfig(max_sequence_length=5), lambda scale: {}).policy()


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


def test_own_file_is_read_again(tmp_path):
    policy = case().policy()
    with torch.no_grad():
        for _, parameter in policy.parameters("student"):
            parameter.normal_()
    policy.save(tmp_path)
    other = case().policy()
    other.load(tmp_path / "pytorch_lora_weights.safetensors")
    for (_, got), (_, expected) in zip(other.parameters("student"), policy.parameters("student"), strict=True):
        assert torch.equal(got, expected)


def test_no_noise_level_left_to_train_at_is_an_error():
    config = build_config({"noise": {"minimum": 0.99}, "rollout": {"steps": 4}, "train": {"micro_batch": 4}})
    with pytest.raises(
        CRDError, match=r"noise.minimum is 0.99, but the highest noise level of this rollout is 0.8\d+: .*Lower it"
    ):
        TrainStep(case().policy(), config, Accelerator(cpu=True))
