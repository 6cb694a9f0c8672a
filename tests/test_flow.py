"""Conversions: float64 round trips and the scheduler's own formulas."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from crd import flow
from crd.solvers import euler


@pytest.fixture
def point():
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    sigma = torch.rand(5, generator=rng, dtype=torch.float64) * 0.9 + 0.05
    return x0, eps, sigma


def test_conversions_are_inverse(point):
    x0, eps, sigma = point
    x, v = flow.interpolate(x0, eps, sigma), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.clean_from_velocity(x, v, sigma), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.noise_from_velocity(x, v, sigma), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.velocity_from_clean(x, x0, sigma), v, rtol=0, atol=1e-11)
    torch.testing.assert_close(flow.velocity_from_noise(x, eps, sigma), v, rtol=0, atol=1e-11)


def test_velocity_is_the_derivative_of_the_path(point):
    x0, eps, sigma = point
    step = 1e-6
    slope = (flow.interpolate(x0, eps, sigma + step) - flow.interpolate(x0, eps, sigma - step)) / (2 * step)
    torch.testing.assert_close(slope, flow.velocity_target(x0, eps), rtol=0, atol=1e-8)


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_other(point):
    a, b, _ = point
    torch.testing.assert_close(flow.guide(a, b, 1.0), b)
    torch.testing.assert_close(flow.guide(a, b, 0.0), a)
    torch.testing.assert_close(flow.guide(a, b, 4.5), 4.5 * b - 3.5 * a)


def test_shift_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(flow.shift_sigma(plain.sigmas, 3.0), scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_euler_equals_the_schedulers_step_and_solves_a_linear_ode():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x, return_dict=False)[0]
    torch.testing.assert_close(euler(lambda y, s: torch.sin(y), start, scheduler.sigmas), x, rtol=0, atol=1e-6)
    # dx/dsigma = x from sigma 1 to 0 divides by e
    fine = torch.linspace(1, 0, 4001, dtype=torch.float64)
    solved = euler(lambda y, s: y, start.double(), fine)
    torch.testing.assert_close(solved, start.double() / torch.e, rtol=2e-4, atol=0)
