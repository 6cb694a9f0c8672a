"""Solvers on a flow with a known solution, and against diffusers' own loops; scoring beside the drawing."""

import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny import tiny_config

from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.models.family import check_guidance
from crd.models.load import load_policy
from crd.recipe import build_config
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rollout import collect, rollout_sampling
from crd.solvers import SOLVERS, euler

MEAN, SPREAD = 0.7, 0.5  # of the data: x0 ~ N(MEAN, SPREAD^2)


def gaussian_velocity(x, sigma):
    """``E[eps - x0 | x]`` in closed form."""
    s = sigma.reshape(-1, 1)
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    centered = x - (1 - s) * MEAN
    return (s * centered - (1 - s) * SPREAD**2 * centered) / variance - MEAN


def spread(sigma):
    return ((1 - sigma) ** 2 * SPREAD**2 + sigma**2) ** 0.5


def error(solver, steps, first=1.0, last=0.0):
    """The ODE keeps every point at its number of standard deviations from the mean."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1)
    sigmas = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    ends = [(1 - sigma) * MEAN + spread(sigma) * z for sigma in (first, last)]
    return float((solver(gaussian_velocity, ends[0], sigmas) - ends[1]).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_converge_to_the_exact_flow(name):
    coarse, fine = (error(SOLVERS[name], steps, 0.9, 0.1) for steps in (16, 32))
    order = np.log2(coarse / fine)
    assert fine < 0.03
    assert 0.7 < order < 1.3 if name == "euler" else order > 1.6, f"{name}: {coarse} {fine}"


def test_second_order_beats_first_at_equal_steps():
    assert error(SOLVERS["dpmsolver++"], 10) < 0.5 * error(euler, 10)
    assert error(SOLVERS["unipc"], 10) < 0.5 * error(euler, 10)


@pytest.mark.parametrize(("name", "kind"), [("dpmsolver++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)])
def test_on_diffusers_own_grid_the_steps_are_diffusers_own(name, kind):
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(7)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = start
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma.expand(4)), t, x, return_dict=False)[0]
    torch.testing.assert_close(SOLVERS[name](gaussian_velocity, start, scheduler.sigmas), x, rtol=0, atol=1e-6)


def test_a_recipes_shift_replaces_the_schedulers(pipeline):
    policy = load_policy(pipeline, tiny_config("unused").model, torch.device("cpu"))
    plain = policy.model.sigmas(8, 1.0)
    for shift in (2.0, 3.0):
        # the scheduler spaces its levels between the shifted ends; with 1.0 its ends are 1 and 0.001
        ends = [shift * end / (1 + (shift - 1) * end) for end in (1.0, 0.001)]
        spaced = torch.linspace(*ends, 8)
        expected = shift * spaced / (1 + (shift - 1) * spaced)
        torch.testing.assert_close(policy.model.sigmas(8, shift)[:-1], expected, rtol=1e-5, atol=1e-6)
    assert plain[0] == 1 and plain[-1] == 0 and (plain.diff() < 0).all()


def test_a_rollout_with_another_solver_is_another_picture_on_the_same_grid(pipeline):
    settings = {"solver": "unipc", "shift": 2.0, "steps": 4}
    config = tiny_config("unused", rollout=settings)
    policy = load_policy(pipeline, config.model, torch.device("cpu"))
    prompts = [PromptGroup(0, "a photo of a ring", {})] * 2
    drawn = collect(policy, RewardSet([]), prompts, [0, 1], rollout_sampling(config, 0))
    first = collect(policy, RewardSet([]), prompts, [0, 1], rollout_sampling(tiny_config("unused", rollout={"steps": 4}), 0))
    assert drawn.x0.shape == first.x0.shape and (drawn.x0 - first.x0).abs().max() > 1e-3


def test_pictures_are_scored_while_the_next_are_drawn_and_in_order(pipeline):
    config = tiny_config("unused", rollout={"batch_size": 1})
    policy = load_policy(pipeline, config.model, torch.device("cpu"))
    threads, drawn_by_then = set(), []
    progress: list[int] = []

    def slow(images, prompts, **metadata):
        threads.add(threading.current_thread())
        time.sleep(0.2)
        drawn_by_then.append(len(progress))
        return [float(np.asarray(image).mean()) for image in images]

    prompts = [PromptGroup(0, "a photo of a ring", {})] * 4
    drawn = collect(
        policy, RewardSet([NamedReward("slow", slow)]), prompts, [0, 1, 2, 3], rollout_sampling(config, 0), progress.append
    )
    assert threads and threading.main_thread() not in threads
    assert drawn_by_then[0] > 1, "the second picture was not drawn while the first was scored"
    np.testing.assert_allclose(drawn.scores.total, [np.asarray(picture).mean() for picture in drawn.pictures])


def test_guidance_that_a_family_does_not_have_is_refused(pipeline):
    config = build_config({"anchor": {"guidance_scale": 4.5}})
    family = load_policy(pipeline, tiny_config("unused").model, torch.device("cpu")).model
    check_guidance(family, config)
    family.has_unconditional = False
    with pytest.raises(CRDError, match=r"anchor.guidance_scale is 4.5.*Set it to 1"):
        check_guidance(family, config)
    check_guidance(family, build_config({"anchor": {"guidance_scale": 1.0}}))


def test_flow_grpo_takes_no_other_solver():
    with pytest.raises(CRDError, match=r"rollout.solver is unipc, but algorithm flow_grpo"):
        build_config({"algorithm": "flow_grpo", "rollout": {"solver": "unipc"}})
