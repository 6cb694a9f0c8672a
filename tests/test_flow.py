"""Conversions: float64 round trips and the scheduler's own formulas."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

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


def test_noise_and_v_predictions_become_velocities(point):
    """From the definitions: x_vp = a x0 + s eps with a^2 + s^2 = 1, v = a eps - s x0; and sigma = s / (a + s)."""
    x0, eps, _ = point
    angle = torch.linspace(0.1, 1.5, len(x0), dtype=torch.float64)
    a, s = angle.cos(), angle.sin()
    sigma = flow.sigma_from_ratio(s / a)
    torch.testing.assert_close(sigma, s / (a + s), rtol=0, atol=1e-15)
    torch.testing.assert_close(flow.vp_norm(sigma), 1 / (a + s), rtol=0, atol=1e-15)
    a, s = flow.expand(a, x0), flow.expand(s, x0)
    x = (a * x0 + s * eps) * flow.expand(flow.vp_norm(sigma), x0)
    torch.testing.assert_close(x, flow.interpolate(x0, eps, sigma), rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.velocity_from_v(x, a * eps - s * x0, sigma), eps - x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(flow.velocity_from_noise(x, eps, sigma), eps - x0, rtol=0, atol=1e-12)


def test_v_prediction_is_finite_where_there_is_no_signal_left(point):
    x0, eps, _ = point
    sigma = flow.sigma_from_ratio(torch.full((5,), torch.inf, dtype=torch.float64))
    assert (sigma == 1).all() and flow.sigma_from_ratio(torch.zeros(1)) == 0
    torch.testing.assert_close(flow.velocity_from_v(eps, -x0, sigma), eps - x0, rtol=0, atol=1e-15)  # there v = -x0


@pytest.mark.parametrize("zero", [False, True])
def test_timesteps_and_noise_levels_of_a_trained_schedule_are_inverse(zero):
    trained = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    signal = DDIMScheduler(**trained, rescale_betas_zero_snr=zero).alphas_cumprod
    table = flow.sigma_from_ratio(((1 - signal) / signal) ** 0.5)
    assert torch.equal(flow.timestep_from_sigma(table, table), torch.arange(1000.0))
    between = flow.timestep_from_sigma((table[:-1] + table[1:]) / 2, table) - torch.arange(999)
    assert ((between >= 0) & (between < 1)).all() and (between[:-1] > 0).all()  # the ratio's last step may be infinite
    ends = flow.timestep_from_sigma(torch.tensor([0.0, 1.0]), table)
    assert ends.tolist() == [0, 999]


def test_timesteps_between_are_those_of_the_euler_scheduler():
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table = flow.sigma_from_ratio(scheduler.sigmas[:-1].flip(0))
    scheduler.set_timesteps(37)
    told = flow.timestep_from_sigma(flow.sigma_from_ratio(scheduler.sigmas[:-1]), table)
    assert scheduler.timesteps.frac().any()
    torch.testing.assert_close(told, scheduler.timesteps, rtol=0, atol=3e-4)


def test_ddim_steps_are_euler_steps_in_flow_coordinates():
    """A naive DDIM loop over a nonlinear noise prediction."""
    signal = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    signal = torch.cat([signal[torch.arange(901, 0, -100)], torch.ones(1, dtype=torch.float64)])
    sigmas = flow.sigma_from_ratio(((1 - signal) / signal) ** 0.5)
    y = start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for here, there in itertools.pairwise(signal):
        noise = torch.sin(3 * y)
        clean = (y - (1 - here).sqrt() * noise) / here.sqrt()
        y = there.sqrt() * clean + (1 - there).sqrt() * noise

    def velocity(x, sigma):
        return flow.velocity_from_noise(x, torch.sin(3 * x / flow.expand(flow.vp_norm(sigma), x)), sigma)

    ours = euler(velocity, start * flow.vp_norm(sigmas[0]), sigmas)
    torch.testing.assert_close(ours, y, rtol=0, atol=1e-11)
